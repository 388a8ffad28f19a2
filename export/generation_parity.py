"""Greedy texts of an engine against those of ONNX Runtime and of the C++ program."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinylm.errors import ConfigError, ExportError
from tinylm.generate import Session, last_logits
from tinylm_export.ort_session import OrtSession
from tinylm_export.parity_batch import ParityBatch
from tinylm_export.parity_report import FirstDifference, GenerationAgreement
from tinylm_export.parity_trt import HALF_DTYPES, TrtRuntime
from tinylm_export.tolerances import limit

Progress = Callable[[str, float], None]
PROGRAM = "tinylm-run"
_PROGRAM_SECONDS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Which greedy texts to compare.

    Attributes:
        num_prompts: Texts, at most.
        max_new_tokens: Tokens of each; fewer where the context ends.
        prompt_len: Tokens of each prompt.
        program: ``tinylm-run``, to compare it too.

    Raises:
        ConfigError: A value is out of range.
    """

    num_prompts: int = 20
    max_new_tokens: int = 256
    prompt_len: int = 16
    program: Path | None = None

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "prompt_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.")


def make_settings(
    num_prompts: int, max_new_tokens: int, *, program: Path | None, num_engines: int
) -> GenerationSettings | None:
    """Return the settings of a command line; None if no prompts were asked for.

    Raises:
        ConfigError: Prompts without an engine, or a program without prompts.
    """
    if num_prompts and not num_engines:
        raise ConfigError("--prompts compares engines; give one with --engine.")
    if program is not None and not num_prompts:
        raise ConfigError("--program needs prompts to continue; give --prompts 20.")
    if not num_prompts:
        return None
    return GenerationSettings(
        num_prompts=num_prompts, max_new_tokens=max_new_tokens, program=program
    )


class GreedyText(NamedTuple):
    """New tokens of one prompt, and the lead of each over the next best one."""

    tokens: list[int]
    gaps: list[float]


def make_prompts(batch: ParityBatch, num_prompts: int, prompt_len: int) -> Tensor:
    """Cut prompts [N, S] from the rows, first from the beginnings of all, then from what follows.

    There are fewer than ``num_prompts`` where the rows hold no more.
    """
    prompt_len = min(prompt_len, int(batch.seq_lens.min()))
    prompts = [
        batch.input_ids[row, start : start + prompt_len]
        for start in range(0, int(batch.seq_lens.max()), prompt_len)
        for row in range(len(batch.seq_lens))
        if start + prompt_len <= int(batch.seq_lens[row])
    ]
    return torch.stack(prompts[:num_prompts])


def greedy_texts(session: Session, prompts: Tensor, max_new_tokens: int) -> list[GreedyText]:
    """Continue equally long prompts [B, S] by the most probable tokens; no token ends a text."""
    batch, length = prompts.shape
    session.start(batch, length + max_new_tokens)
    tokens, texts = prompts, [GreedyText([], []) for _ in range(batch)]
    for _ in range(max_new_tokens):
        lens = torch.full((batch,), tokens.shape[1])
        logits = last_logits(session.step(tokens, lens), lens)
        best = logits.topk(2, dim=-1)
        tokens = logits.argmax(dim=-1, keepdim=True)
        for row, text in enumerate(texts):
            text.tokens.append(int(tokens[row]))
            text.gaps.append(float(best.values[row, 0] - best.values[row, 1]))
    return texts


def program_tokens(
    program: Path, engine: Path, prompt: list[int], max_new_tokens: int, plugins: Path | None
) -> list[int]:
    """Return the ids that ``tinylm-run`` prints.

    Raises:
        ExportError: The program failed; holds its message.
    """
    command = [
        str(program),
        *("--engine", str(engine)),
        *("--prompt-ids", ",".join(map(str, prompt))),
        *("--max-new-tokens", str(max_new_tokens)),
        "--ignore-eos",
    ]
    if plugins is not None:
        command += ["--plugins", str(plugins)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(f"{program}: can't be run ({error}). Give its path.") from error
    if done.returncode:
        raise ExportError(f"{program}: exit code {done.returncode}: {done.stderr.strip()}")
    return [int(line) for line in done.stdout.split()]


def compare_tokens(
    expected: list[GreedyText],
    found: list[list[int]],
    *,
    other: str,
    largest_gap: float | None,
) -> GenerationAgreement:
    """Compare texts up to the first difference of each.

    Args:
        expected: The other runtime's texts.
        found: The engine's.
        other: The other runtime's name.
        largest_gap: Largest gap of the other runtime's best logits that excuses a difference; 0
            excuses none, None every one.
    """
    differences = []
    for index, (text, tokens) in enumerate(zip(expected, found, strict=True)):
        if text.tokens == tokens:
            continue
        pairs = zip(text.tokens, tokens, strict=False)
        shorter = min(len(text.tokens), len(tokens))
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        ended = position == shorter  # one text is the beginning of the other
        differences.append(
            FirstDifference(
                prompt=index,
                position=position,
                expected=text.tokens[position] if position < len(text.tokens) else None,
                found=tokens[position] if position < len(tokens) else None,
                gap=None if ended else text.gaps[position],
            )
        )
    return GenerationAgreement(
        other=other,
        num_prompts=len(found),
        num_tokens=max(len(tokens) for tokens in found),
        differences=differences,
        largest_gap=largest_gap,
    )


def compare_texts(
    runtime: TrtRuntime,
    directory: Path,
    batch: ParityBatch,
    settings: GenerationSettings,
    native: bool | None,
    progress: Progress,
) -> list[GenerationAgreement]:
    """Compare an engine's greedy texts with ONNX Runtime's and with the C++ program's.

    The program must give the same ids always. ONNX Runtime may give others where its two best
    logits nearly tie, and for an engine in half precision at any place.

    Args:
        runtime: The engine.
        directory: What ``tinylm-export onnx`` wrote.
        batch: The rows that prompts are cut from.
        settings: What to generate.
        native: What runs ONNX Runtime's custom ops, see :class:`OrtSession`.
        progress: Told the phase and how much of it is done.
    """
    prompts = make_prompts(batch, settings.num_prompts, settings.prompt_len)
    context = runtime.session.config.max_seq_len
    count = min(settings.max_new_tokens, context - prompts.shape[1])
    own, programs = [], []
    for index, prompt in enumerate(prompts):
        # One row at a time, as the program has it: other batch sizes may sum in another order.
        own += greedy_texts(runtime.session, prompt[None], count)
        if settings.program is not None:
            programs.append(
                program_tokens(
                    settings.program,
                    runtime.session.directory,
                    prompt.tolist(),
                    count,
                    runtime.session.plugins,
                )
            )
        progress(f"{runtime.name}: generation", (index + 1) / len(prompts))
    found = [text.tokens for text in own]
    agreements = []
    if runtime.activation == runtime.session.info.activation:
        onnx = greedy_texts(OrtSession(directory, native=native), prompts, count)
        gap = None if runtime.dtype in HALF_DTYPES else limit("generation_gap")
        agreements.append(compare_tokens(onnx, found, other="ONNX Runtime", largest_gap=gap))
    if settings.program is not None:
        agreements.append(compare_tokens(own, programs, other=PROGRAM, largest_gap=0.0))
    return agreements
