from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from cli_helpers import Cli, command_line
from training_helpers import inputs, trainer

from tinylm.directory import write_checksums
from tinylm_export.cli import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(main, capsys)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on real text."""
    out = tmp_path_factory.mktemp("export-cli") / "run"
    trainer(out).train()
    return out


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    directory = run_dir.parent / "onnx"
    with pytest.raises(SystemExit) as end:
        main(["onnx", str(run_dir), "--out", str(directory)])
    assert not end.value.code
    return directory


def test_two_commands_from_text_to_a_parity_report(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    code, out, err = cli("onnx", run_dir, "--out", tmp_path / "onnx", "--parity")
    assert code == 0, err
    assert "model.onnx_data" in out and "parity holds" in out
    assert (tmp_path / "onnx-parity.png").is_file()


@pytest.mark.parametrize("activation", ["int8", "fp8"])
def test_parity_takes_the_file_the_run_was_validated_on(
    cli: Cli, run_dir: Path, tmp_path: Path, activation: str
) -> None:
    directory = tmp_path / "onnx"
    assert cli("onnx", run_dir, "--out", directory, "--activation", activation)[0] == 0
    json_file, picture = tmp_path / "parity.json", tmp_path / "layers.png"
    code, _, err = cli(
        *("parity", directory, "--tokens", 200, "--json", json_file, "--plot", picture)
    )
    assert code == 0, err
    report = json.loads(json_file.read_text())
    assert report["passed"] is True
    assert report["data"]["file"] == str(inputs().val)
    assert report["model"]["activation"] == {"int8": "int8", "fp8": "fp8_e4m3"}[activation]
    assert picture.is_file()


def test_parity_that_fails_exits_with_1(cli: Cli, exported: Path, tmp_path: Path) -> None:
    directory = tmp_path / "onnx"
    shutil.copytree(exported, directory)
    model = ir.load(exported / "model.onnx")
    weight = model.graph.initializers["norm.weight"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.5)
    ir.save(model, directory / "model.onnx", external_data="model.onnx_data")
    checkpoint = exported.parent / "run"
    arguments = ("parity", directory, "--checkpoint", checkpoint, "--tokens", 200)
    code, _, err = cli(*arguments)
    assert code == 2 and "truncated or altered" in err
    write_checksums(directory)
    code, out, _ = cli(*arguments)
    assert code == 1
    assert "parity FAILED" in out


def test_generate_streams_text_from_onnx_runtime(
    cli: Cli, exported: Path, run_dir: Path, tmp_path: Path
) -> None:
    from tinylm.cli import main as tinylm_main

    arguments = ["--prompt", "def ", "--max-new-tokens", 12, "--temperature", 0]
    code, out, err = cli("generate", exported, *arguments, "--json", tmp_path / "ort.json")
    assert code == 0 and out.startswith("def ") and "tokens/s" in err
    with pytest.raises(SystemExit):
        tinylm_main(
            ["generate", str(run_dir), *map(str, arguments), "--json", str(tmp_path / "torch.json")]
        )
    ort, torch = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("ort", "torch"))
    assert ort["ids"] == torch["ids"] and ort["text"] == torch["text"]


def test_bench_inspect_and_doctor_print_and_write_json(
    cli: Cli, exported: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    small = ("--prompt-len", 8, "--new-tokens", 4, "--repeats", 1)
    code, out, err = cli(*("bench", exported, *small, "--runtime", "onnxruntime", "--json", file))
    assert code == 0, err
    assert "onnxruntime" in out
    assert json.loads(file.read_text())["results"][0]["runtime"] == "onnxruntime"
    code, out, _ = cli("inspect", exported, "--json", file)
    assert code == 0 and "tinylm::FlashMLA" in out
    assert len(json.loads(file.read_text())["layers"]) == 14
    code, out, _ = cli("doctor", "--json", file)
    assert code == 0 and "ONNX Runtime" in out
    assert json.loads(file.read_text())["healthy"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx", "none", "--out", "x"), "none: expected a checkpoint"),
        (("onnx", "RUN", "--out", "RUN"), "exists and holds no model.onnx, so it is not replaced"),
        (("parity", "none"), "none: not an exported model"),
        (("parity", "ONNX", "--file", "no.jsonl"), "no.jsonl: not found"),
        (("parity", "ONNX", "--tokens", 10**9), "parity needs 1000000000 held-out tokens, found"),
        (("generate", "ONNX", "--prompt", "x " * 90), "context of 32 tokens"),
        (("generate", "ONNX", "--prompt", "x", "--top-k", -1), "top_k must be 0 or more"),
        (("bench", "ONNX", "--prompt-len", 40), "need a context of 72, the model has 32"),
        (("bench", "ONNX", "--prompt-len", 4, "--new-tokens", 4, "--runtime", "tf"), "found 'tf'"),
        (("inspect", "RUN"), "not an exported model"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    cli: Cli,
    run_dir: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[Any, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"RUN": run_dir, "ONNX": exported}
    code, _, err = cli(*(names.get(a, a) if isinstance(a, str) else a for a in arguments))
    assert code == 2
    assert err.startswith("tinylm-export: ") and err.count("\n") == 1
    assert message in err


def test_without_onnxruntime_the_error_says_what_to_install(exported: Path) -> None:
    script = (
        "import sys; sys.modules['onnxruntime'] = None\n"  # as if it were not installed
        "from tinylm_export.cli import main\n"
        f"main(['generate', {str(exported)!r}, '--prompt', 'x'])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 2
    assert "onnxruntime can't be imported" in result.stderr
    assert "Run `pip install 'tinylm[cpu]'`" in result.stderr
    assert "Traceback" not in result.stderr
