"""The C++ runtime by its example program: the ids it generates, and what it says of mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from export_helpers import PLAIN, make_export
from tolerances import LOGITS, assert_equal

from tinylm.generate import stream
from tinylm_export.ort_session import OrtSession

ROOT = Path(__file__).resolve().parents[1]
BODIES = "-"  # no ops library
CONTEXT = 64
# Random models with tied embeddings repeat one token.
UNTIED = {"tie_embeddings": False}
PROMPTS = {"one token": [7], "a few tokens": [1, 2, 3], "most of the context": [*range(100, 155)]}


def built(name: str) -> Path:
    """Find a file of the native build, or skip."""
    folder = Path(os.environ.get("TINYLM_NATIVE_DIR", ROOT / "build" / "native"))
    found = sorted(path for path in folder.rglob(name) if path.is_file())
    if not found:
        pytest.skip(f"{folder} holds no {name}: build trt_plugins/, or set TINYLM_NATIVE_DIR")
    return found[0]


@pytest.fixture(scope="module")
def program() -> Path:
    return built("generate_ort")


@pytest.fixture(params=["function bodies", "ops library"])
def ops_library(request: pytest.FixtureRequest) -> str:
    return BODIES if request.param == "function bodies" else str(built("libtinylm_ort.so"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("one"), **UNTIED)[1]


def run(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def numbers(values: list[int]) -> str:
    return " ".join(map(str, values))


def generated(program: Path, directory: Path, ops: str, prompt: list[int], limit: int) -> list[int]:
    done = run(program, directory, ops, ",".join(map(str, prompt)), limit)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [int(line) for line in done.stdout.split()]


def steps(directory: Path, ops: str, text: str) -> subprocess.CompletedProcess[bytes]:
    """Run the steps that ``text`` describes; standard output holds their logits."""
    return subprocess.run(
        [built("ort_model_steps"), directory, ops],
        input=text.encode(),
        capture_output=True,
        timeout=120,
    )


def expected_ids(
    directory: Path, prompt: list[int], limit: int, eos_token_id: int | None = None
) -> list[int]:
    chosen = stream(
        OrtSession(directory, num_threads=1),
        torch.tensor([prompt]),
        torch.tensor([len(prompt)]),
        max_new_tokens=limit,
        eos_token_id=eos_token_id,
    )
    return [int(tokens) for tokens in chosen]


def refusal(program: Path, *arguments: object, **environment: str) -> str:
    """Return the message of a run that must fail."""
    done = run(program, *arguments, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("generate_ort: ")
    return done.stderr


def edited(directory: Path, target: Path, file: str, **changes: object) -> Path:
    """Copy an exported directory with other values in one of its JSON files."""
    shutil.copytree(directory, target)
    values = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**values, **changes}))
    return target


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_greedy_ids_are_pythons(
    program: Path, directory: Path, ops_library: str, prompt: list[int]
) -> None:
    found = generated(program, directory, ops_library, prompt, 40)
    assert found == expected_ids(directory, prompt, 40)
    assert len(found) == min(40, CONTEXT - len(prompt))


def test_logits_at_every_position(program: Path, directory: Path, tmp_path: Path) -> None:
    """The same weights: the last position of each step decides."""
    all_logits = make_export(tmp_path, all_logits=True, **UNTIED)[1]
    found = generated(program, all_logits, BODIES, [1, 2, 3], 40)
    assert found == expected_ids(directory, [1, 2, 3], 40)


@pytest.mark.parametrize("all_logits", [False, True])
def test_steps_are_pythons(ops_library: str, tmp_path: Path, all_logits: bool) -> None:
    """Chunks, single tokens and rows that pause; the same kernels give the same bits."""
    directory = make_export(tmp_path, all_logits=all_logits)[1]
    session = OrtSession(directory, num_threads=1)
    session.start(3, 20)
    generator = torch.Generator().manual_seed(0)
    text, expected, valid = "3 20\n", [], []
    for lens in ([5, 1, 3], [1, 1, 1], [1, 0, 1], [0, 4, 2], [1, 1, 0], [3, 3, 3]):
        ids = torch.randint(512, (3, max(lens)), generator=generator)
        seq_lens = torch.tensor(lens)
        text += f"{max(lens)} {numbers(lens)} {numbers(ids.flatten().tolist())}\n"
        expected.append(session.step(ids, seq_lens).reshape(-1, 512))
        held = torch.arange(max(lens)) < seq_lens[:, None]  # [B, S]
        valid.append(held.flatten() if all_logits else seq_lens > 0)
    found = torch.frombuffer(
        bytearray(steps(directory, ops_library, text).stdout), dtype=torch.float32
    )
    found = found.reshape(-1, 512)[torch.cat(valid)]
    if ops_library == BODIES:
        assert_equal(found, torch.cat(expected)[torch.cat(valid)])
    else:
        LOGITS.assert_close(found, torch.cat(expected)[torch.cat(valid)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 8", "batch_size must be at least 1, found 0"),
        ("2 65", "capacity must be from 1 to max_seq_len = 64, found 65"),
        ("2 4  3 3 4 1 2 3 4 5 6", "seq_lens of row 1 must be from 0 to length = 3, found 4"),
        ("2 4  3 1 3 1 2 3 4 5 6  2 1 2 1 2 3 4", "holds 4 tokens a row and row 1 needs 5"),
        ("2 4  1 1 1 1 512", "below vocab_size 512, found 512 at position 0 of row 1"),
    ],
)
def test_bad_steps(directory: Path, text: str, message: str) -> None:
    done = steps(directory, BODIES, text)
    assert done.returncode == 2
    assert message in done.stderr.decode()


def test_fp8_activations(program: Path, ops_library: str, tmp_path: Path) -> None:
    directory = make_export(tmp_path, activation="fp8_e4m3", **UNTIED)[1]
    found = generated(program, directory, ops_library, [1, 2, 3], 20)
    assert found == expected_ids(directory, [1, 2, 3], 20)


def test_stops_after_the_end_token(program: Path, directory: Path, tmp_path: Path) -> None:
    free = expected_ids(directory, [1, 2, 3], 20)
    eos = free[4]
    assert eos != free[0]
    directory = edited(directory, tmp_path / "onnx", "config.json", eos_token_id=eos)
    found = generated(program, directory, BODIES, [1, 2, 3], 20)
    assert found == free[: free.index(eos) + 1]


def test_no_new_tokens(program: Path, directory: Path) -> None:
    assert generated(program, directory, BODIES, [1, 2, 3], 0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1,512,3"], "below vocab_size 512, found 512 at position 1 of row 0"),
        (["1,-2,3"], "below vocab_size 512, found -2 at position 1 of row 0"),
        ([",".join(["5"] * 64)], "the prompt has 64 tokens, and the context of 64 must hold"),
        ([""], "the prompt is empty"),
        (["1,two,3"], "an integer expected, found 'two'"),
        (["1,2", "-1"], "max_new_tokens must be 0 or more, found -1"),
        ([], "usage: generate_ort DIR"),
    ],
)
def test_bad_arguments(program: Path, directory: Path, arguments: list[str], message: str) -> None:
    assert message in refusal(program, directory, BODIES, *arguments)


def test_not_an_exported_directory(program: Path, tmp_path: Path) -> None:
    message = refusal(program, tmp_path / "none", BODIES, "1,2")
    assert "none/export.json: not found" in message
    assert "tinylm-export onnx" in message


@pytest.mark.parametrize("file", ["config.json", "export.json", "model.onnx"])
def test_missing_file(program: Path, directory: Path, tmp_path: Path, file: str) -> None:
    directory = Path(shutil.copytree(directory, tmp_path / "onnx"))
    (directory / file).unlink()
    assert f"onnx/{file}: not found" in refusal(program, directory, BODIES, "1,2")


def test_missing_weights(program: Path, directory: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(directory, tmp_path / "onnx"))
    (directory / "model.onnx_data").unlink()
    message = refusal(program, directory, BODIES, "1,2")
    assert "can't load it" in message
    assert "model.onnx_data" in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "llama", 'model_type "tinylm" expected, found "llama"'),
        ("format_version", 2, "format_version 1 expected, found 2"),
        ("latent_rank", None, "latent_rank must be a positive integer, found null"),
        ("eos_token_id", 512, "eos_token_id must be an integer from 0 to below vocab_size 512"),
    ],
)
def test_bad_config(
    program: Path, directory: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    directory = edited(directory, tmp_path / "onnx", "config.json", **{field: value})
    assert message in refusal(program, directory, BODIES, "1,2")


def test_config_that_is_not_json(program: Path, directory: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(directory, tmp_path / "onnx"))
    (directory / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(program, directory, BODIES, "1,2")


def test_config_of_another_model(program: Path, directory: Path, tmp_path: Path) -> None:
    """ONNX Runtime compares the shapes of bound buffers with the graph's."""
    directory = edited(directory, tmp_path / "onnx", "config.json", latent_rank=16)
    assert "latent" in refusal(program, directory, BODIES, "1,2")


def test_task_without_a_cache(program: Path, tmp_path: Path) -> None:
    directory = make_export(tmp_path, task=PLAIN)[1]
    message = refusal(program, directory, BODIES, "1,2")
    assert "task text-generation-with-past expected, found text-generation" in message
    assert "--task text-generation-with-past" in message


def test_ops_library_that_is_not_there(program: Path, directory: Path) -> None:
    message = refusal(program, directory, "none.so", "1,2")
    assert "none.so: not found" in message
    assert "libtinylm_ort.so" in message


def test_ops_library_that_is_none(program: Path, directory: Path, tmp_path: Path) -> None:
    library = tmp_path / "text.so"
    library.write_text("text")
    assert "text.so: the ops library can't be loaded" in refusal(program, directory, library, "1,2")


def test_onnxruntime_that_can_not_be_loaded(program: Path, directory: Path) -> None:
    message = refusal(
        program, directory, BODIES, "1,2", TINYLM_ONNXRUNTIME_LIBRARY="none/libonnxruntime.so"
    )
    assert "ONNX Runtime can't be loaded: none/libonnxruntime.so" in message
    assert "Set TINYLM_ONNXRUNTIME_LIBRARY" in message
