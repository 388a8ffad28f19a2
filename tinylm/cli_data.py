"""``tinylm data prepare``: text files into shards of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinylm.cli_shared import Json, write_json
from tinylm.training_config import DEFAULT_TOKENIZER

_EXAMPLE = (
    "Example: tinylm data prepare --file train.jsonl --tokenizer DIR --out tokens; "
    "tinylm train --data tokens --out run"
)


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command("prepare", epilog=_EXAMPLE)(prepare_command)


def prepare_command(
    file: Annotated[
        list[Path],
        typer.Option(
            "--file", help="JSON lines or Parquet with text, or .txt; may be given again."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="Directory, file or Hugging Face hub id.")
    ] = DEFAULT_TOKENIZER,
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=1, help="The model's, which the ids must fit.")
    ] = 32000,
    val_file: Annotated[
        list[Path] | None,
        typer.Option("--val-file", help="Held-out text; may be given again."),
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option("--val-fraction", help="Part of the documents held out without --val-file."),
    ] = 0.01,
    shard_mb: Annotated[
        float, typer.Option("--shard-mb", help="Largest file of tokens, in 10^6 bytes.")
    ] = 60.0,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Count malformed lines instead of stopping.")
    ] = False,
    num_proc: Annotated[
        int | None,
        typer.Option("--num-proc", min=1, help="Processes. Default: as the size asks for."),
    ] = None,
    json: Json = None,
) -> None:
    """Tokenise text once, into a folder that holds all that a training run reads.

    Whole documents are held out. The folder can be copied to a machine without a network.
    """
    from tinylm.prepare import prepare
    from tinylm.tokenizer import load_tokenizer

    report = prepare(
        file,
        load_tokenizer(tokenizer, vocab_size=vocab_size),
        out,
        val_files=val_file or (),
        val_fraction=val_fraction,
        shard_mb=shard_mb,
        skip_bad_lines=skip_bad_lines,
        num_proc=num_proc,
    )
    print(
        f"{out}: {report.num_train_docs:,} documents with {report.num_train_tokens:,} tokens to "
        f"train on, {report.num_val_docs:,} with {report.num_val_tokens:,} held out, in "
        f"{report.num_shards} files of tokens"
    )
    if report.num_dropped:
        print(f"{report.num_dropped:,} documents left out, because their text is held out")
    if report.num_skipped:
        print(f"{report.num_skipped:,} bad lines skipped; the first: {report.first_problem}")
    write_json(json, report.to_dict())
