"""The command line ``tinylm-export``.

Modules that take long to import are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylm.cli_shared import (
    EXIT_NO,
    Json,
    MaxNewTokens,
    Prompt,
    Seed,
    Temperature,
    TopK,
    TopP,
    run_app,
    stream_prompt,
    write_json,
)
from tinylm.errors import DataError
from tinylm_export.cli_native import app as native_app
from tinylm_export.cli_trt import trt

if TYPE_CHECKING:
    from tinylm_export.generation_parity import GenerationSettings

DEFAULT_PARITY_TOKENS = 4096
DEFAULT_PARITY_LENGTH = 256

app = typer.Typer(
    name="tinylm-export",
    help="Export TinyLM checkpoints, prove that runtimes agree, and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(native_app)
app.command(epilog="Example: tinylm-export trt onnx --out engine --dtype bf16")(trt)


class TaskChoice(str, enum.Enum):
    """Values of ``--task``."""

    with_past = "text-generation-with-past"
    plain = "text-generation"


class HeadChoice(str, enum.Enum):
    """Values of ``--lm-head``."""

    float32 = "float32"
    int8 = "int8"


class ActivationChoice(str, enum.Enum):
    """Values of ``--activation``."""

    int8 = "int8"
    fp8 = "fp8"


Directory = Annotated[Path, typer.Argument(metavar="DIR", help="What `tinylm-export onnx` wrote.")]
NoNative = Annotated[
    bool,
    typer.Option(
        "--no-native", help="Run the function bodies even if the native library is built."
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="The checkpoint it was exported from, if it was moved."),
]


EngineOptions = Annotated[
    list[Path] | None,
    typer.Option(
        "--engine",
        help="A TensorRT engine of DIR, as `tinylm-export trt` wrote it; may be given again.",
    ),
]


@app.command(epilog="Example: tinylm-export onnx run --out onnx --parity")
def onnx(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT", help="A checkpoint, or a training run's --out directory."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")],
    task: Annotated[
        TaskChoice, typer.Option("--task", help="With the latent cache, or the plain graph.")
    ] = TaskChoice.with_past,
    activation: Annotated[
        ActivationChoice | None,
        typer.Option("--activation", help="Number format. Default: the checkpoint's."),
    ] = None,
    all_logits: Annotated[
        bool, typer.Option("--all-logits", help="Logits at every position, not the last only.")
    ] = False,
    lm_head: Annotated[
        HeadChoice, typer.Option("--lm-head", help="Number format of the head.")
    ] = HeadChoice.float32,
    prove: Annotated[
        bool,
        typer.Option("--parity", help="Then compare with PyTorch, as `tinylm-export parity` does."),
    ] = False,
) -> None:
    """Export a checkpoint to ONNX with 2-bit weights and custom ops.

    The file runs in a stock ONNX Runtime: each custom op carries a body of standard ops.
    """
    from tinylm_export.to_onnx import DATA_FILE, ONNX_FILE, export_onnx

    formats = {None: None, ActivationChoice.int8: "int8", ActivationChoice.fp8: "fp8_e4m3"}
    path = export_onnx(
        checkpoint,
        out,
        task=task.value,
        activation=formats[activation],  # type: ignore[arg-type]
        all_logits=all_logits,
        lm_head=lm_head.value,
    )
    for name in (ONNX_FILE, DATA_FILE):
        print(f"{path / name}: {(path / name).stat().st_size:,} bytes")
    if prove:
        _prove(path)


@app.command(epilog="Example: tinylm-export parity onnx --file val.jsonl --json parity.json")
def parity(
    directory: Directory,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Held-out JSON lines. Default: the run's validation file."),
    ] = None,
    checkpoint: CheckpointOption = None,
    num_tokens: Annotated[
        int, typer.Option("--tokens", min=16, help="Tokens to compare, at least.")
    ] = DEFAULT_PARITY_TOKENS,
    length: Annotated[
        int, typer.Option("--length", min=4, help="Longest row; at most the context.")
    ] = DEFAULT_PARITY_LENGTH,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Picture to write. Default: DIR-parity.png.")
    ] = None,
    no_native: NoNative = False,
    engine: EngineOptions = None,
    num_prompts: Annotated[
        int,
        typer.Option(
            "--prompts", min=0, help="Prompts that engines continue greedily, to compare."
        ),
    ] = 0,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="New tokens of each prompt.")
    ] = 256,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect",
            help="Build each engine again with every layer's output marked, and name the first "
            "layer out of tolerance.",
        ),
    ] = False,
    program: Annotated[
        Path | None,
        typer.Option("--program", help="tinylm-run, to compare its ids too; needs --prompts."),
    ] = None,
    json: Json = None,
) -> None:
    """Prove that PyTorch and each runtime say the same; exit 1 if they don't.

    Rows of different lengths are prefilled, and decoded token by token over the cache; engines
    prefill them in chunks as well.
    """
    from tinylm_export.generation_parity import make_settings

    _prove(
        directory,
        engines=engine or (),
        bisect=bisect,
        generation=make_settings(
            num_prompts, new_tokens, program=program, num_engines=len(engine or ())
        ),
        file=file,
        checkpoint=checkpoint,
        num_tokens=num_tokens,
        length=length,
        plot=plot,
        native=False if no_native else None,
        json=json,
    )


def _prove(
    directory: Path,
    *,
    file: Path | None = None,
    checkpoint: Path | None = None,
    num_tokens: int = DEFAULT_PARITY_TOKENS,
    length: int = DEFAULT_PARITY_LENGTH,
    plot: Path | None = None,
    native: bool | None = None,
    engines: Sequence[Path] = (),
    generation: GenerationSettings | None = None,
    bisect: bool = False,
    json: Path | None = None,
) -> None:
    """Run parity, show it, and exit with 1 if it fails."""
    from rich.console import Console
    from rich.progress import Progress

    from tinylm_export.parity import run_parity
    from tinylm_export.parity_render import plot as write_plot
    from tinylm_export.parity_render import render

    tokens, data = _held_out_tokens(directory, checkpoint, file)
    stderr = Console(stderr=True)
    with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(text: str, fraction: float) -> None:
            if text not in tasks:
                tasks[text] = bar.add_task(text, total=1.0)
            bar.update(tasks[text], completed=fraction)

        report = run_parity(
            directory,
            tokens,
            checkpoint=checkpoint,
            num_tokens=num_tokens,
            length=length,
            native=native,
            engines=engines,
            generation=generation,
            bisect=bisect,
            data=data,
            progress=progress,
        )
    Console().print(render(report))
    picture = plot or directory.parent / f"{directory.resolve().name}-parity.png"
    write_plot(report, picture)
    print(f"{picture}: difference of every node's output")
    write_json(json, report.to_dict())
    print("parity holds" if report.passed else "parity FAILED")
    if not report.passed:
        raise typer.Exit(EXIT_NO)


def _held_out_tokens(
    directory: Path, checkpoint: Path | None, file: Path | None
) -> tuple[Any, dict[str, Any]]:
    """Tokenise the held-out file: int64 [N], and where it came from."""
    import torch

    from tinylm.data import load_corpus
    from tinylm.shards import open_prepared
    from tinylm.tokenizer import load_tokenizer
    from tinylm_export.ort_session import import_onnxruntime
    from tinylm_export.to_onnx import ExportInfo

    import_onnxruntime()
    info = ExportInfo.load(directory)
    if file is None:
        file = _validation_source(checkpoint or directory / info.checkpoint)
    tokenizer = load_tokenizer(directory)
    corpus = open_prepared(file, tokenizer).val if file.is_dir() else load_corpus(file, tokenizer)
    tokens = torch.from_numpy(corpus.tokens[:].astype("int64"))
    return tokens, {"file": str(file), "num_tokens_in_file": corpus.num_tokens}


def _validation_source(checkpoint: Path) -> Path:
    """Return the validation file, or the prepared folder, of the run that wrote a checkpoint.

    Raises:
        DataError: It is not known, or not there any more.
    """
    from tinylm.checkpoint import read_json, resolve_checkpoint
    from tinylm.training_state import CONFIG_FILE

    path = resolve_checkpoint(checkpoint) / CONFIG_FILE
    if not path.is_file():
        raise DataError(
            f"{checkpoint} doesn't say what it was validated on ({CONFIG_FILE} is missing). Give "
            "held-out JSON lines with --file."
        )
    data = read_json(path)["data"]
    source = Path(data.get("directory") or data["val_file"])
    if not source.exists():
        raise DataError(
            f"{source}, the validation text of the run, is not there. Give held-out JSON lines or "
            "a folder of tinylm data prepare with --file."
        )
    return source


@app.command(epilog='Example: tinylm-export generate onnx --prompt "The function returns"')
def generate(
    directory: Directory,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads. Default: the runtime's.")
    ] = None,
    no_native: NoNative = False,
    json: Json = None,
) -> None:
    """Continue a prompt on ONNX Runtime, streaming the text as it is made."""
    from tinylm.generate import SamplingConfig
    from tinylm.tokenizer import load_tokenizer
    from tinylm_export.ort_session import OrtSession

    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    session = OrtSession(directory, num_threads=threads, native=False if no_native else None)
    values = stream_prompt(
        session,
        load_tokenizer(directory, vocab_size=session.config.vocab_size),
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
    )
    print(f"[kernels: {session.kernels}]", file=sys.stderr)
    write_json(json, {"directory": str(directory), "kernels": session.kernels, **values})


@app.command(epilog="Example: tinylm-export bench onnx --prompt-len 128 --json bench.json")
def bench(
    directory: Directory,
    checkpoint: CheckpointOption = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help="pytorch, pytorch-packed, onnxruntime (native if built) or onnxruntime-bodies; "
            "may be given again. Default: all.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows.")] = 1,
    prompt_len: Annotated[
        int, typer.Option("--prompt-len", min=1, help="Tokens of each prompt.")
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Decode steps after the prompt.")
    ] = 32,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Timed runs of each runtime.")
    ] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads. Default: the runtime's.")
    ] = None,
    no_native: NoNative = False,
    engine: EngineOptions = None,
    json: Json = None,
) -> None:
    """Measure prefill and decode speed and memory of each runtime that is there.

    The runtimes must give the same tokens first, engines excepted; they are then timed in turns.
    """
    from rich.console import Console

    from tinylm_export.bench import BenchSettings, render, run_bench

    settings = BenchSettings(
        batch_size=batch_size,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        repeats=repeats,
        num_threads=threads,
    )
    report = run_bench(
        directory,
        settings,
        checkpoint=checkpoint,
        runtimes=runtime,
        native=False if no_native else None,
        engines=engine or (),
        show_progress=True,
    )
    Console().print(render(report))
    write_json(json, report.to_dict())


@app.command(epilog="Example: tinylm-export inspect onnx --json inspect.json")
def inspect(directory: Directory, json: Json = None) -> None:
    """Show ops, sizes, bits per weight and the share of zeros in each layer."""
    from rich.console import Console

    from tinylm_export.inspect import inspect_onnx, render

    report = inspect_onnx(directory)
    Console().print(render(report))
    write_json(json, report.to_dict())


@app.command(epilog="Example: tinylm-export doctor")
def doctor(json: Json = None) -> None:
    """Show what is installed, what is missing, and the command that mends it.

    Exits with 1 if something that is needed is missing or does not work.
    """
    from rich.console import Console

    from tinylm_export.doctor import render, run_doctor

    report = run_doctor()
    Console().print(render(report))
    write_json(json, report.to_dict())
    if not report.healthy:
        raise typer.Exit(EXIT_NO)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0 (done), 1 (the answer is no) or 2 (usage or input)."""
    run_app(app, "tinylm-export", argv)


if __name__ == "__main__":
    main()
