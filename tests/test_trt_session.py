"""The TensorRT session: what it refuses, and on a GPU that its steps are PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_helpers import edit_manifest, flip_byte, make_engine_directory, needs_gpu
from export_helpers import make_export
from model_helpers import ragged_batch
from tolerances import assert_equal
from torch import Tensor

from tinylm import TinyLM
from tinylm.errors import ExportError
from tinylm.generate import TorchSession, stream
from tinylm_export.manifest import MANIFEST_FILE
from tinylm_export.trt_engine import ENGINE_FILE, require_gpu
from tinylm_export.trt_session import TrtSession

gpu = [pytest.mark.gpu, needs_gpu]
MAX_BATCH, MAX_LENGTH = 4, 64


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("trt"))[1]


@pytest.fixture
def fake(onnx: Path, tmp_path: Path) -> Path:
    return make_engine_directory(onnx, tmp_path / "engine")


def test_not_an_engine_directory(onnx: Path) -> None:
    with pytest.raises(ExportError, match=r"manifest\.json.*tinylm-export trt"):
        TrtSession(onnx)


def test_a_manifest_that_is_not_one(fake: Path) -> None:
    (fake / MANIFEST_FILE).write_text("[1]")
    with pytest.raises(ExportError, match=r"manifest\.json"):
        TrtSession(fake)


@pytest.mark.parametrize("name", [ENGINE_FILE, MANIFEST_FILE, "config.json"])
def test_an_altered_file_is_refused_before_tensorrt_reads_it(fake: Path, name: str) -> None:
    if name == MANIFEST_FILE:
        text = (fake / name).read_text()
        (fake / name).write_text(text.replace("H100", "H200"))
    else:
        flip_byte(fake / name)
    with pytest.raises(ExportError, match=r"truncated or altered .* expected SHA-256"):
        TrtSession(fake)


def test_a_missing_engine(fake: Path) -> None:
    (fake / ENGINE_FILE).unlink()
    with pytest.raises(ExportError, match=r"model\.engine: expected a file, found none"):
        TrtSession(fake)


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match="needs an NVIDIA GPU, and PyTorch finds none"):
        require_gpu()


class Pair(NamedTuple):
    model: TinyLM
    directory: Path


@pytest.fixture(scope="module", params=["int8", "fp8_e4m3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from tinylm_export.to_engine import build_engine

    folder = tmp_path_factory.mktemp("engine")
    model, onnx = make_export(folder, activation=request.param, tie_embeddings=False)
    directory = folder / "engine"
    build_engine(onnx, directory, dtype="fp32", max_batch_size=MAX_BATCH, max_seq_len=MAX_LENGTH)
    return Pair(model, directory)


@pytest.fixture(scope="module", params=[True, False], ids=["graph", "no graph"])
def session(request: pytest.FixtureRequest, pair: Pair) -> Iterator[TrtSession]:
    yield TrtSession(pair.directory, cuda_graph=request.param)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """A quantised activation may round the other way, which moves a logit by about 1e-2."""
    assert torch.isfinite(found).all()
    assert float((found - expected).abs().mean()) < 1e-3


class TestOnGpu:
    pytestmark = gpu

    def test_steps_of_different_lengths(self, session: TrtSession, pair: Pair) -> None:
        """Chunks, single tokens and rows that pause; compared step by step with PyTorch."""
        reference = TorchSession(pair.model)
        generator = torch.Generator().manual_seed(0)
        session.start(3, 24)
        reference.start(3, 24)
        one = [1, 1, 1]
        for lens in ([5, 1, 3], one, [1, 0, 1], [0, 4, 2], [1, 1, 0], [3, 3, 3], one, one, one):
            seq_lens = torch.tensor(lens)
            ids = torch.randint(512, (3, max(lens)), generator=generator)
            found, expected = session.step(ids, seq_lens), reference.step(ids, seq_lens)
            assert found.device.type == "cpu" and found.dtype == torch.float32
            assert_close(found[seq_lens > 0], expected[seq_lens > 0])

    def test_the_graph_changes_no_bit(self, pair: Pair) -> None:
        batch = ragged_batch(seed=2)
        runs = []
        for cuda_graph in (True, False):
            session = TrtSession(pair.directory, cuda_graph=cuda_graph)
            session.start(4, 40)
            logits = [session.step(batch.input_ids, torch.tensor(batch.lens))]
            for _ in range(8):
                tokens = logits[-1].argmax(dim=-1, keepdim=True)
                logits.append(session.step(tokens, torch.ones(4, dtype=torch.int64)))
            runs.append(torch.stack(logits))
        assert_equal(runs[0], runs[1])

    def test_repeated_steps_take_the_last_tokens(self, session: TrtSession) -> None:
        ids, one = torch.arange(6)[None], torch.tensor([1])
        token, other = torch.tensor([[9]]), torch.tensor([[3]])
        session.start(1, 12)
        session.step(ids, torch.tensor([6]))
        for _ in range(5):
            session.step(token, one)
        expected = session.step(other, one)
        session.start(1, 12)
        session.step(ids, torch.tensor([6]))
        session.step(token, one)
        session.repeat_decode(4)
        assert_equal(session.step(other, one), expected)
        with pytest.raises(ValueError, match="holds 12 tokens a row and 13 are needed"):
            session.repeat_decode(1)

    def test_start_forgets(self, session: TrtSession) -> None:
        ids = torch.arange(6)[None]
        session.start(1, 12)
        first = session.step(ids, torch.tensor([6]))
        for token in range(4):
            session.step(torch.tensor([[token]]), torch.tensor([1]))
        session.start(1, 12)
        assert_equal(session.step(ids, torch.tensor([6])), first)
        session.start(2, 12)
        both = session.step(ids.expand(2, -1), torch.tensor([6, 6]))
        assert_close(both, first.expand(2, -1))

    def test_greedy_text_is_pytorchs(self, session: TrtSession, pair: Pair) -> None:
        prompt, lens = torch.tensor([[1, 2, 3]]), torch.tensor([3])
        texts = [
            torch.stack(list(stream(s, prompt, lens, max_new_tokens=20)))
            for s in (session, TorchSession(pair.model))
        ]
        assert float((texts[0] == texts[1]).float().mean()) > 0.9

    def test_sizes_beyond_the_engines(self, session: TrtSession) -> None:
        with pytest.raises(ExportError, match=r"batch_size must be from 1 to 4.*found 5.*--max-b"):
            session.start(5, 8)
        with pytest.raises(ExportError, match=r"capacity must be from 1 to 64.*--max-seq-len"):
            session.start(1, 65)

    def test_steps_out_of_order(self, pair: Pair) -> None:
        session = TrtSession(pair.directory)
        with pytest.raises(ValueError, match=r"the cache has 0 rows and the input 1; call start"):
            session.step(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]))
        session.start(1, 4)
        with pytest.raises(ValueError, match="holds 4 tokens a row and 5 are needed"):
            session.step(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([5]))
        with pytest.raises(ValueError, match=r"below vocab_size 512, found 0 \.\. 512"):
            session.step(torch.tensor([[0, 512]]), torch.tensor([2]))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tensorrt_version": "10.3.0"}, r"TensorRT.*10\.3\.0"),
            ({"compute_capability": "8.0"}, r"8\.0"),
            ({"plugin_version": "0.0.9"}, r"plugin.*0\.0\.9"),
        ],
    )
    def test_an_engine_for_another_machine(
        self, pair: Pair, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ExportError, match=message):
            TrtSession(edit_manifest(pair.directory, tmp_path / "engine", **changes))

    def test_bytes_that_are_no_engine(self, pair: Pair, tmp_path: Path) -> None:
        directory = edit_manifest(pair.directory, tmp_path / "engine")
        (directory / ENGINE_FILE).write_bytes(b"no engine" * 100)
        with pytest.raises(ExportError, match=r"model\.engine: TensorRT .* can't load it"):
            TrtSession(directory, verify=False)
