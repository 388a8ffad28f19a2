"""What the command lines ``tinylm`` and ``tinylm-export`` have in common."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylm.errors import ConfigError, TinyLMError

if TYPE_CHECKING:
    import torch

    from tinylm.generate import SamplingConfig, Session

EXIT_NO = 1
EXIT_USAGE = 2

Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Prompt = Annotated[str, typer.Option("--prompt", help="Start of the text.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to add.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 takes the most probable token.")
]
TopK = Annotated[
    int, typer.Option("--top-k", help="Sample from the k most probable tokens; 0: all.")
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Sample from the fewest tokens with this probability.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed, the same text.")]


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write what a program would read, if a file was named.

    Raises:
        ConfigError: The file can't be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: the result can't be written ({error.strerror}); it stands above. Name "
            "another --json file."
        ) from error


def run_app(app: typer.Typer, name: str, argv: Sequence[str] | None) -> None:
    """Run a command line; exits with 0 (done), 1 (the answer is no) or 2 (usage or input).

    Args:
        app: The commands.
        name: The program's name, in front of an error.
        argv: Arguments without the program's name; default: those of the process.
    """
    try:
        app(args=None if argv is None else list(argv))
    except (TinyLMError, OSError) as error:
        rank = os.environ.get("RANK", "0")  # one of several processes that torchrun started
        print(f"{name}{'' if rank == '0' else f' [process {rank}]'}: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def stream_prompt(
    session: Session,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Continue a prompt on any runtime, writing the text as it is made.

    Prompt and text go to the standard output, the speed to the standard error.

    Returns:
        The JSON object that ``--json`` writes: prompt, text, ids and speed.

    Raises:
        TinyLMError: The prompt fills the context.
    """
    import torch

    from tinylm.generate import stream
    from tinylm.text_stream import TextStream
    from tinylm.training_data import encode_prompt

    config = session.config
    ids = encode_prompt(tokenizer, prompt, max_seq_len=config.max_seq_len, flag="--prompt")
    text, new_ids, pieces = TextStream(tokenizer, ids), [], []
    sys.stdout.write(prompt)
    started = time.perf_counter()
    for tokens in stream(
        session,
        torch.tensor([ids], device=device),  # [1, S]
        torch.tensor([len(ids)], device=device),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_id=config.eos_token_id,
        generator=torch.Generator(device).manual_seed(seed),
    ):
        new_ids.append(int(tokens[0]))
        pieces.append(text.add(new_ids[-1]))
        sys.stdout.write(pieces[-1])
        sys.stdout.flush()
    pieces.append(text.finish())
    sys.stdout.write(pieces[-1] + "\n")
    sys.stdout.flush()
    speed = len(new_ids) / (time.perf_counter() - started)
    print(f"[{len(new_ids)} tokens, {speed:.1f} tokens/s]", file=sys.stderr)
    return {
        "prompt": prompt,
        "prompt_ids": ids,
        "text": "".join(pieces),
        "ids": new_ids,
        "tokens_per_second": speed,
    }
