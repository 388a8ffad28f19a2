"""Build llama.cpp from a PyPI sdist, make a random model for it, and time that model.

    python benchmarks/llama_cpp.py --work-dir DIR

The sdist of ``llama-cpp-python`` holds llama.cpp's sources. Everything goes into the working folder
and is made once. Needs cmake, a C++ compiler and the ``bench`` extra (the ``gguf`` package).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_records import NotRunError, log
from cpu_timing import default_work_dir

SDIST = "llama-cpp-python==0.3.36"
PROGRAMS = ("llama-bench", "llama-quantize")
FORMATS = ("TQ2_0", "Q4_0")

# The rival is as wide and deep as tinylm-300m, with the attention of a LLaMA.
HIDDEN, LAYERS, HEADS, FEED_FORWARD, VOCAB, CONTEXT = 1024, 24, 16, 2816, 32000, 2048

_CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaModel:
    """A quantised model and how to run it.

    Attributes:
        path: GGUF file.
        program: llama-bench.
        options: What this machine needs beside the model.
        note: Why it needs them; empty if it needs none.
    """

    path: Path
    program: Path
    options: tuple[str, ...] = ()
    note: str = ""


def describe() -> dict[str, Any]:
    """Return where llama.cpp comes from and what its model is, for JSON."""
    linear = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FEED_FORWARD)
    return {
        "sdist": SDIST,
        "architecture": "llama",
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "intermediate_size": FEED_FORWARD,
        "vocab_size": VOCAB,
        "num_ternary_weights": linear,
    }


def prepare(work_dir: Path) -> dict[str, LlamaModel | NotRunError]:
    """Make the programs and the models where they are missing.

    Returns:
        Each model by format, or why it does not run.

    Raises:
        NotRunError: Something they need is missing or fails; says what.
    """
    folder = work_dir / "llama.cpp"
    programs = build(folder)
    paths = make_models(folder, programs["llama-quantize"])
    return {name: _try_model(path, programs["llama-bench"]) for name, path in paths.items()}


def _try_model(path: Path, program: Path) -> LlamaModel | NotRunError:
    """Find out how a model runs: its kernels for repacked weights crash on some machines."""
    test = ["-p", "16", "-n", "1", "-t", "1", "-r", "1", "--no-warmup"]
    model = LlamaModel(path=path, program=program)
    try:
        _llama_bench(model, test)
    except NotRunError as error:
        note = f"without repacked weights, because with them {error}"
        model = dataclasses.replace(model, options=("--repack", "0"), note=note)
        try:
            _llama_bench(model, test)
        except NotRunError as second:
            return second
    return model


def build(folder: Path) -> dict[str, Path]:
    """Return the programs, built from the sdist if need be (some minutes)."""
    programs = {name: folder / "build" / "bin" / name for name in PROGRAMS}
    if all(path.is_file() for path in programs.values()):
        return programs
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise NotRunError(f"building llama.cpp needs {tool}, which is not installed")
    source = folder / "source"
    if not (source / "CMakeLists.txt").is_file():
        _extract(_download(folder / "sdist"), source)
    log("llama.cpp: build, some minutes")
    options = [f"-D{key}={value}" for key, value in _CMAKE_OPTIONS.items()]
    built = folder / "build"
    _run(["cmake", "-S", str(source), "-B", str(built), *options], folder / "configure.log")
    jobs = str(os.cpu_count() or 1)
    targets = ["--target", *PROGRAMS]
    _run(["cmake", "--build", str(built), "--parallel", jobs, *targets], folder / "build.log")
    return programs


def _download(folder: Path) -> Path:
    log(f"llama.cpp: download {SDIST}")
    name = SDIST.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", name, "--dest", str(folder), SDIST]
    _run(command, folder.parent / "download.log")
    return next(folder.glob("*.tar.gz"))


def _extract(sdist: Path, target: Path) -> None:
    """Extract vendor/llama.cpp; a target that is there is whole."""
    temporary = target.with_name("unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        members = [m for m in archive.getmembers() if "/vendor/llama.cpp/" in m.name]
        archive.extractall(temporary, members=members, filter="data")
    next(temporary.glob("*/vendor/llama.cpp")).rename(target)
    shutil.rmtree(temporary)


def make_models(folder: Path, quantize: Path) -> dict[str, Path]:
    """Return the quantised models, made from random ternary weights if need be."""
    models = {name: folder / f"random-300m-{name}.gguf" for name in FORMATS}
    missing = {name: path for name, path in models.items() if not path.is_file()}
    if not missing:
        return models
    log("llama.cpp: make a random model")
    plain = folder / "random-300m-F16.gguf"
    _write_gguf(plain)
    try:
        for name, path in missing.items():
            temporary = path.with_suffix(".part")
            _run([str(quantize), str(plain), str(temporary), name], folder / f"{name}.log")
            temporary.rename(path)
    finally:
        plain.unlink()
    return models


def _write_gguf(path: Path) -> None:
    """Write a LLaMA with random ternary weights, which TQ2_0 holds without loss."""
    try:
        import gguf
    except ImportError as error:
        raise NotRunError(
            "the gguf package is not installed: pip install -e '.[cpu,bench]'"
        ) from error
    rng = np.random.default_rng(0)

    def ternary(rows: int, columns: int) -> np.ndarray[Any, Any]:
        codes = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
        return codes.astype(np.float16) * np.float16(columns**-0.5)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random-300m")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    # No output.weight: the head shares the embedding, as in tinylm-300m.
    embedding = rng.standard_normal((VOCAB, HIDDEN), dtype=np.float32) * HIDDEN**-0.5
    writer.add_tensor("token_embd.weight", embedding.astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN, HIDDEN),
            ("attn_v", HIDDEN, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", FEED_FORWARD, HIDDEN),
            ("ffn_up", FEED_FORWARD, HIDDEN),
            ("ffn_down", HIDDEN, FEED_FORWARD),
        ):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ternary(rows, columns))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def time_model(
    model: LlamaModel,
    *,
    prompts: Sequence[int],
    new_tokens: int,
    num_threads: int,
    repeats: int = 1,
) -> dict[str, list[float]]:
    """Run llama-bench once, with its own warm-up.

    Returns:
        Tokens per second of each repeat, by ``"prefill N"`` and ``"decode N"``.

    Raises:
        NotRunError: llama-bench fails.
    """
    what = ["-p", ",".join(map(str, prompts)), "-n", str(new_tokens)]
    output = _llama_bench(model, ["-t", str(num_threads), "-r", str(repeats), *what])
    found = {}
    for test in json.loads(output):
        prefill = test["n_gen"] == 0
        name = f"prefill {test['n_prompt']}" if prefill else f"decode {test['n_gen']}"
        found[name] = [float(speed) for speed in test["samples_ts"]]
    return found


def peak_memory(model: LlamaModel, *, new_tokens: int, num_threads: int) -> int:
    """Return the largest resident set while llama-bench decodes, mapped weights included.

    Raises:
        NotRunError: llama-bench fails, or the system does not say.
    """
    what = ["-t", str(num_threads), "-r", "1", "-p", "0", "-n", str(new_tokens)]
    peak = 0
    null = subprocess.DEVNULL
    with subprocess.Popen(_command(model, what), stdout=null, stderr=null) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, _peak_of(status))
            time.sleep(0.01)
    if process.returncode or not peak:
        raise NotRunError(f"llama-bench ended with code {process.returncode}, peak memory {peak}")
    return peak


def _peak_of(status: Path) -> int:
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM:")), 0)


def _command(model: LlamaModel, arguments: list[str]) -> list[str]:
    return [str(model.program), "-m", str(model.path), *model.options, "-o", "json", *arguments]


def _llama_bench(model: LlamaModel, arguments: list[str]) -> str:
    done = subprocess.run(_command(model, arguments), capture_output=True, text=True)
    if done.returncode < 0:
        raise NotRunError(f"llama-bench crashed with signal {-done.returncode}")
    if done.returncode:
        raise NotRunError(
            f"llama-bench ended with code {done.returncode}: {done.stderr[-300:].strip()}"
        )
    return done.stdout


def _run(command: list[str], log_file: Path) -> None:
    """Run a command at low priority; its output goes to a file, whose end a failure shows."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    nice = ["nice", "-n", "10"] if shutil.which("nice") else []
    with log_file.open("w", encoding="utf-8") as file:
        done = subprocess.run([*nice, *command], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log_file.read_text(encoding="utf-8", errors="replace")[-500:].strip()
        raise NotRunError(f"`{command[0]} ...` ended with code {done.returncode}: {tail}")


def main() -> None:
    """Prepare and time the models on their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=default_work_dir())
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name, model in prepare(arguments.work_dir).items():
        if isinstance(model, NotRunError):
            print(f"{name}: not run: {model}")
            continue
        print(f"{name} {model.note}")
        for threads in arguments.threads:
            speeds = time_model(
                model,
                prompts=(128, 512),
                new_tokens=128,
                num_threads=threads,
                repeats=arguments.repeats,
            )
            for test, samples in speeds.items():
                print(f"  {threads} threads  {test:12}{np.median(samples):8.1f} tokens/s")


if __name__ == "__main__":
    main()
