"""The command line ``tinylm``.

Modules that take long to import are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylm import cli_data, cli_train
from tinylm.cli_convert import convert
from tinylm.cli_shared import (
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
from tinylm.tokenizer import DEFAULT_VOCAB_SIZE
from tinylm.training_config import PRECISIONS

if TYPE_CHECKING:
    import torch

    from tinylm.model import TinyLM

app = typer.Typer(
    name="tinylm",
    help="Train, measure and try 1.58-bit language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tokenizer_app = typer.Typer(help="Make tokenizers.", no_args_is_help=True)
data_app = typer.Typer(help="Make training text and tokens.", no_args_is_help=True)
cli_train.register(app)
app.command(epilog="Example: tinylm convert run --to huggingface --out tinylm-hf")(convert)
cli_data.register(data_app)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a training run's --out directory.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
Precision = Annotated[str, typer.Option("--precision", help=f"{', '.join(PRECISIONS)}.")]
SkipBadLines = Annotated[
    bool, typer.Option("--skip-bad-lines", help="Count malformed lines instead of stopping.")
]


def _load(checkpoint: Path, device: str) -> tuple[Path, TinyLM, Any, torch.device]:
    """Load a checkpoint's model and tokenizer."""
    from tinylm.checkpoint import load_model, resolve_checkpoint
    from tinylm.device import choose_device
    from tinylm.tokenizer import load_tokenizer

    chosen = choose_device(device)
    directory = resolve_checkpoint(checkpoint)
    model = load_model(directory).to(chosen)
    tokenizer = load_tokenizer(directory, vocab_size=model.config.vocab_size)
    return directory, model, tokenizer, chosen


@app.command("eval", epilog="Example: tinylm eval run --file val.jsonl --json result.json")
def evaluate_command(
    checkpoint: Checkpoint,
    file: Annotated[
        Path | None, typer.Option("--file", help='JSON lines {"text": ...} or .gz.')
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of tinylm data prepare: its held-out text, no --file."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", min=1, help="Tokens of a window. Default: the model's context."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Read about this many tokens. Default: all."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences at a time.")
    ] = 8,
    skip_bad_lines: SkipBadLines = False,
    device: Device = "auto",
    precision: Precision = "auto",
    lm_head: Annotated[
        str, typer.Option("--lm-head", help="float32, or int8 to measure what it costs.")
    ] = "float32",
    json: Json = None,
) -> None:
    """Measure token perplexity and bits per byte on held-out text.

    The text is read in windows of --length tokens, so that every token but the first is predicted
    once; a token early in a window has little before it.
    """
    from rich.console import Console
    from rich.progress import Progress

    from tinylm.data import PackedSequences, load_corpus
    from tinylm.device import precision_context
    from tinylm.errors import ConfigError
    from tinylm.evaluate import EvalResult, evaluate
    from tinylm.quantizer_passes import choose_quantizers
    from tinylm.shards import open_prepared
    from tinylm.ternary_statistics import ternary_statistics

    if (file is None) == (data is None):
        found = "neither" if data is None else "both"
        raise ConfigError(f"expected text from --file or --data, found {found}. Name one of them.")
    if lm_head not in ("float32", "int8"):
        raise ConfigError(f"--lm-head must be float32 or int8, found {lm_head!r}.")
    directory, model, tokenizer, chosen = _load(checkpoint, device)
    model.set_quantizers(choose_quantizers("auto", chosen))
    context = model.config.max_seq_len
    length = context if length is None else length
    if length > context:
        raise ConfigError(
            f"--length must be at most the model's context of {context} tokens, found {length}."
        )
    if file is not None:
        corpus = load_corpus(file, tokenizer, skip_bad_lines=skip_bad_lines)
    elif data is not None:
        corpus = open_prepared(data, tokenizer).val
    stderr = Console(stderr=True)
    with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as bar:

        def measure(text: str) -> EvalResult:
            task = bar.add_task(text, total=None)
            result = evaluate(
                model,
                PackedSequences(corpus, length),
                batch_size=batch_size,
                max_tokens=max_tokens,
                precision=precision_context(precision, chosen),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
            if result is None:
                raise RuntimeError("an evaluation that nothing stops has a result")
            return result

        result = measure("evaluating")
        head: dict[str, float] = {}
        if lm_head == "int8":
            model.quantize_head()
            int8 = measure("evaluating the int8 head")
            head = {
                "int8_head_loss": int8.loss,
                "int8_head_perplexity": int8.perplexity,
                "int8_head_perplexity_difference": int8.perplexity - result.perplexity,
            }
    values = {
        "checkpoint": str(directory),
        "file": str(file or data),
        "length": length,
        **result.to_dict(),
        "unigram_entropy": corpus.unigram_entropy(),
        "num_docs": corpus.num_docs,
        "num_bytes": corpus.num_bytes,
        "num_skipped": corpus.num_skipped,
        **ternary_statistics(model),
        **head,
    }
    _print_evaluation(values)
    write_json(json, values)


def _print_evaluation(values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    basis = values["bits_per_byte_basis"]
    table = Table(title=f"{values['checkpoint']} on {values['file']}", show_header=False)
    for name, text in {
        "token perplexity": f"{values['perplexity']:.4f}",
        "bits per byte": f"{values['bits_per_byte']:.5f} ({basis})",
        "loss": f"{values['loss']:.5f} nats per token",
        "unigram entropy": f"{values['unigram_entropy']:.5f} nats per token",
        "predicted tokens": f"{values['num_tokens']:,} in windows of {values['length']:,}",
        "bytes of text": f"{values['num_bytes']:,}",
        "bad lines skipped": f"{values['num_skipped']:,}",
        "speed": f"{values['tokens_per_second']:,.0f} tokens/s",
    }.items():
        table.add_row(name, text)
    if "fraction_zero" in values:  # a dense model has no codes
        fractions = [f"{values[f'fraction_{name}']:.1%}" for name in ("minus", "zero", "plus")]
        table.add_row("ternary codes -1 / 0 / +1", " / ".join(fractions))
    if "int8_head_loss" in values:
        difference = values["int8_head_perplexity_difference"]
        table.add_row(
            "token perplexity, int8 head",
            f"{values['int8_head_perplexity']:.4f} ({difference:+.4f})",
        )
    Console().print(table)


@app.command(epilog='Example: tinylm generate run --prompt "The function returns"')
def generate(
    checkpoint: Checkpoint,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = None,
) -> None:
    """Continue a prompt, streaming the text as it is made.

    The prompt and the text go to the standard output, the speed to the standard error.
    """
    from tinylm.device import precision_context
    from tinylm.generate import SamplingConfig, TorchSession

    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    directory, model, tokenizer, chosen = _load(checkpoint, device)
    with precision_context(precision, chosen):
        values = stream_prompt(
            TorchSession(model),
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            device=chosen,
        )
    write_json(json, {"checkpoint": str(directory), **values})


@app.command("consolidate", epilog="Example: tinylm consolidate run consolidated")
def consolidate_command(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write to.")],
) -> None:
    """Make one file of a checkpoint's shards, for all other commands to take.

    Runs with --parallel fsdp or hsdp write shards; they go on from these with any number of
    processes, so training never needs this.
    """
    from tinylm.consolidate import consolidate

    print(f"{out}: one file made of {consolidate(checkpoint, out)}")


@tokenizer_app.command(
    "train",
    epilog="Example: tinylm tokenizer train --file train.jsonl --out tokenizer --vocab-size 4096",
)
def train_tokenizer_command(
    file: Annotated[
        list[Path],
        typer.Option("--file", help='JSON lines {"text": ...} or .gz; may be given again.'),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")],
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=1, help="Number of tokens, special ones included.")
    ] = DEFAULT_VOCAB_SIZE,
    skip_bad_lines: SkipBadLines = False,
) -> None:
    """Train a Llama-style SentencePiece tokenizer: BPE with byte fallback and single digits."""
    from tinylm.tokenizer import load_tokenizer, train_tokenizer

    path = train_tokenizer(file, out, vocab_size=vocab_size, skip_bad_lines=skip_bad_lines)
    print(f"{path}: tokenizer with {len(load_tokenizer(path))} tokens")


@data_app.command("sample", epilog="Example: tinylm data sample --out data --max-mb 8")
def sample_command(
    out: Annotated[Path, typer.Option("--out", help="Gets train.jsonl and val.jsonl.")],
    max_mb: Annotated[
        float, typer.Option("--max-mb", help="Most megabytes of training text.")
    ] = 8.0,
    val_fraction: Annotated[
        float, typer.Option("--val-fraction", help="Part of the modules to hold out.")
    ] = 0.02,
    json: Json = None,
) -> None:
    """Gather real text that is already here: docstrings of the installed Python packages.

    Nothing is downloaded or imported. Validation text is held out by whole modules.
    """
    import dataclasses

    from rich.console import Console
    from rich.progress import Progress

    from tinylm.sample import gather_docstrings

    train_file, val_file = out / "train.jsonl", out / "val.jsonl"
    stderr = Console(stderr=True)
    with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
        task = bar.add_task("gathering docstrings", total=None)
        report = gather_docstrings(
            train_file,
            val_file,
            max_bytes=round(max_mb * 1e6),
            val_fraction=val_fraction,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{train_file}: {report.num_train_docs:,} documents, {report.train_bytes:,} bytes")
    print(f"{val_file}: {report.num_val_docs:,} documents, {report.val_bytes:,} bytes")
    write_json(json, dataclasses.asdict(report))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0 (done), 1 (the answer is no) or 2 (usage or input)."""
    run_app(app, "tinylm", argv)


if __name__ == "__main__":
    main()
