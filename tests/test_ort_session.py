from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from export_helpers import PLAIN, make_export
from model_helpers import ragged_batch
from native_helpers import kernel_calls, needs_library
from tolerances import LOGITS, assert_equal
from torch import Tensor

from tinylm import TinyLM
from tinylm.errors import ExportError
from tinylm.generate import TorchSession, stream
from tinylm.latent_cache import LatentCache
from tinylm_export.ort_session import OrtSession, make_inference_session


class Pair(NamedTuple):
    model: TinyLM
    directory: Path
    native: bool

    def session(self) -> OrtSession:
        return OrtSession(self.directory, num_threads=1, native=self.native)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="bodies"),
        pytest.param(True, id="native", marks=needs_library),
    ],
)
def native(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module", params=["int8", "fp8_e4m3"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, native: bool
) -> Pair:
    folder = tmp_path_factory.mktemp("ort")
    return Pair(*make_export(folder, activation=request.param), native)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, native: bool) -> Pair:
    return Pair(*make_export(tmp_path_factory.mktemp("plain"), task=PLAIN), native)


@needs_library
def test_the_library_is_used_unless_told_otherwise(pair: Pair) -> None:
    session = OrtSession(pair.directory)
    assert re.fullmatch(r"tinylm 0\.1\.0 native, [a-z0-9-]+", session.kernels)
    before = kernel_calls("FlashMLA")
    session.start(1, 4)
    session.step(torch.ones(1, 2, dtype=torch.int64), torch.tensor([2]))
    assert kernel_calls("FlashMLA") == before + pair.model.config.num_layers
    session = OrtSession(pair.directory, native=False)
    assert session.kernels == "function bodies in standard ops"
    session.start(1, 4)
    session.step(torch.ones(1, 2, dtype=torch.int64), torch.tensor([2]))
    assert kernel_calls("FlashMLA") == before + pair.model.config.num_layers


def test_greedy_text_is_pytorchs(pair: Pair) -> None:
    batch = ragged_batch(seed=2)
    lens = torch.tensor(batch.lens)
    runs = [
        torch.stack(list(stream(session, batch.input_ids, lens, max_new_tokens=30)))
        for session in (TorchSession(pair.model), pair.session())
    ]
    assert_equal(runs[1], runs[0])
    whole = pair.model.generate(batch.input_ids, batch.attention_mask, max_new_tokens=30)
    for row, length in enumerate(batch.lens):
        assert_equal(runs[1][:, row], whole[row, length : length + 30])


def test_rows_that_end_early_do_not_disturb_the_others(pair: Pair) -> None:
    batch = ragged_batch(seed=3)
    lens = torch.tensor(batch.lens)
    free = torch.stack(
        list(stream(pair.session(), batch.input_ids, lens, max_new_tokens=20))
    )  # [20, 4]
    eos = int(free[4, 0])
    stopped = torch.stack(
        list(stream(pair.session(), batch.input_ids, lens, max_new_tokens=20, eos_token_id=eos))
    )
    for row in range(4):
        ends = (free[:, row] == eos).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(stopped)
        assert_equal(stopped[:length, row], free[:length, row])
        assert (stopped[length:, row] == eos).all()


def test_steps_of_different_lengths(pair: Pair) -> None:
    """Chunks, single tokens and rows that pause; compared step by step with PyTorch."""
    session, reference = pair.session(), TorchSession(pair.model)
    generator = torch.Generator().manual_seed(0)
    session.start(3, 20)
    reference.start(3, 20)
    for lens in ([5, 1, 3], [1, 1, 1], [1, 0, 1], [0, 4, 2], [1, 1, 0], [3, 3, 3]):
        seq_lens = torch.tensor(lens)
        ids = torch.randint(512, (3, max(lens)), generator=generator)
        found, expected = session.step(ids, seq_lens), reference.step(ids, seq_lens)
        LOGITS.assert_close(found[seq_lens > 0], expected[seq_lens > 0])


def test_a_row_may_be_filled_to_the_last_slot(pair: Pair) -> None:
    """A full row pauses while another goes on; what it holds is still right afterwards."""
    session, alone = pair.session(), pair.session()
    ids = torch.randint(512, (2, 6), generator=torch.Generator().manual_seed(1))
    session.start(2, 6)
    session.step(ids[:, :5], torch.tensor([5, 2]))
    session.step(ids[:, 5:], torch.tensor([1, 0]))
    for column in (2, 3, 4):
        session.step(ids[:, column : column + 1], torch.tensor([0, 1]))
    logits = session.step(ids[:, 5:], torch.tensor([0, 1]))
    alone.start(1, 6)
    LOGITS.assert_close(logits[1:], alone.step(ids[1:], torch.tensor([6])))


def test_cache_in_place_equals_a_separate_cache(pair: Pair) -> None:
    config = pair.model.config
    session = pair.session()
    batch = ragged_batch(seed=4, batch=2, length=6)
    session.start(2, 9)
    cache = LatentCache(config, 2, 9)
    past = {
        f"past.{i}.{part}": getattr(cache, part)[i].numpy()
        for i in range(config.num_layers)
        for part in ("latent", "scale", "rope")
    }
    past_lens = torch.zeros(2, dtype=torch.int32)
    names = [output.name for output in session.session.get_outputs()]
    for ids, lens in (
        (batch.input_ids, torch.tensor(batch.lens)),
        (batch.input_ids[:, :1], torch.tensor([1, 1])),
        (batch.input_ids[:, :1], torch.tensor([0, 1])),
    ):
        found = session.step(ids, lens)
        results = session.session.run(
            names,
            {
                "input_ids": ids.numpy(),
                "past_lens": past_lens.numpy(),
                "seq_lens": lens.int().numpy(),
                **past,
            },
        )
        outputs = dict(zip(names, results, strict=True))
        assert_equal(found, torch.from_numpy(outputs.pop("logits")))
        past = {name.replace("present", "past"): array for name, array in outputs.items()}
        past_lens += lens.int()


def test_cache_holds_what_pytorch_keeps(pair: Pair) -> None:
    config = pair.model.config
    batch = ragged_batch(seed=5)
    cache = LatentCache(config, 4, 24)
    with torch.no_grad():
        pair.model(batch.input_ids, batch.attention_mask, cache=cache)
    empty = LatentCache(config, 4, 24)
    feeds = {
        "input_ids": batch.input_ids.numpy(),
        "past_lens": torch.zeros(4, dtype=torch.int32).numpy(),
        "seq_lens": torch.tensor(batch.lens, dtype=torch.int32).numpy(),
    }
    parts = [(i, part) for i in range(config.num_layers) for part in ("latent", "scale", "rope")]
    feeds |= {f"past.{i}.{part}": getattr(empty, part)[i].numpy() for i, part in parts}
    names = [f"present.{i}.{part}" for i, part in parts]
    results = pair.session().session.run(names, feeds)
    for (i, part), array in zip(parts, results, strict=True):
        assert_equal(torch.from_numpy(array), getattr(cache, part)[i])


def test_start_forgets(pair: Pair) -> None:
    session = pair.session()
    ids = torch.arange(6)[None]
    session.start(1, 8)
    first = session.step(ids, torch.tensor([6]))
    session.start(1, 8)
    assert_equal(session.step(ids, torch.tensor([6])), first)


def test_steps_out_of_order(pair: Pair) -> None:
    session = pair.session()
    with pytest.raises(ValueError, match=r"the cache has 0 rows and the input 1; call start\(\)"):
        session.step(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]))
    session.start(2, 4)
    with pytest.raises(ValueError, match="the cache has 2 rows and the input 3"):
        session.step(torch.zeros(3, 2, dtype=torch.int64), torch.tensor([2, 2, 2]))


def test_a_full_cache_is_named_and_left_intact(pair: Pair) -> None:
    session, fresh = pair.session(), pair.session()
    ids = torch.arange(12).reshape(2, 6)
    session.start(2, 6)
    session.step(ids[:, :4], torch.tensor([4, 4]))
    with pytest.raises(ValueError, match="the cache holds 6 tokens a row and 7 are needed"):
        session.step(ids[:, :3], torch.tensor([1, 3]))
    after = session.step(ids[:, 4:], torch.tensor([2, 2]))
    fresh.start(2, 6)
    fresh.step(ids[:, :4], torch.tensor([4, 4]))
    assert_equal(after, fresh.step(ids[:, 4:], torch.tensor([2, 2])))


MASKS = {
    "none": None,
    "all": [[1, 1, 1, 1, 1]] * 3,
    "right": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "gaps": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 1], [1, 1, 0, 0, 1]],
    "an empty row": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]],
    "nothing": [[0, 0, 0, 0, 0]] * 3,
    "other numbers": [[2, 0, -1, 0, 7], [1, 1, 1, 1, 1], [0, 3, 3, 0, 0]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_plain_task_takes_any_mask(plain: Pair, mask: list[list[int]] | None) -> None:
    ids = torch.randint(512, (3, 5), generator=torch.Generator().manual_seed(0))
    attention_mask = None if mask is None else torch.tensor(mask)
    found = plain.session().logits(ids, attention_mask)
    with torch.no_grad():
        expected = plain.model(ids, attention_mask)
    assert found.isfinite().all()
    valid = torch.ones_like(ids) if attention_mask is None else attention_mask
    LOGITS.assert_close(found[valid != 0], expected[valid != 0])


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 64), (5, 3)])
def test_plain_task_takes_any_size(plain: Pair, batch: int, length: int) -> None:
    ids = torch.randint(512, (batch, length), generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        LOGITS.assert_close(plain.session().logits(ids), plain.model(ids))


def test_all_logits_steps(tmp_path: Path) -> None:
    model, directory = make_export(tmp_path, all_logits=True)
    session = OrtSession(directory, num_threads=1)
    batch = ragged_batch(seed=6)
    session.start(4, 24)
    found = session.step(batch.input_ids, torch.tensor(batch.lens))
    with torch.no_grad():
        expected: Tensor = model(batch.input_ids, batch.attention_mask)
    valid = batch.attention_mask == 1
    LOGITS.assert_close(found[valid], expected[valid])


def test_text_of_an_export_with_all_logits(tmp_path: Path) -> None:
    model, directory = make_export(tmp_path, all_logits=True)
    batch = ragged_batch(seed=6)  # rows of different lengths: their last tokens are not the last
    lens = torch.tensor(batch.lens)
    text = [
        torch.stack(list(stream(session, batch.input_ids, lens, max_new_tokens=8)))
        for session in (TorchSession(model), OrtSession(directory, num_threads=1))
    ]
    assert_equal(text[1], text[0])


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(ExportError, match=r"the model: ONNX Runtime .* can't load it"):
        make_inference_session(b"not a model")
