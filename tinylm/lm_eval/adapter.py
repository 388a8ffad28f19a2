"""The harness's model interface over a :class:`tinylm.lm_eval.runtime.Runtime`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from tinylm.errors import ConfigError, DataError
from tinylm.generate import SamplingConfig, stream
from tinylm.lm_eval.runtime import open_runtime
from tinylm.text_stream import TextStream
from tinylm.tokenizer import load_tokenizer

DEFAULT_BATCH_SIZE = 8
HARNESS_DEVICE = "cuda:0"  # what its command line passes on where the user names none
DEFAULT_NEW_TOKENS = 256  # the harness's own default for max_gen_toks
_GENERATION_ARGUMENTS = {
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "seed",
}
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@register_model("tinylm")
class TinyLMHarness(TemplateLM):
    """TinyLM for lm-evaluation-harness.

    Results do not depend on the batch size, but for the float32 rounding of the head's product.
    A text begins with what the tokenizer puts before a document, or else with the end token, which
    is what stood before a document in training.

    Args:
        pretrained: A checkpoint, a training run, or an ONNX directory.
        batch_size: Rows at a time.
        device: ``auto``, ``cpu``, ``cuda:1`` ...; default ``auto``. ``cuda:0`` means ``auto`` too,
            because the harness passes it on where nothing was asked for.
        precision: ``fp32``, ``bf16`` or ``auto``.
        max_batch_size: Not used by TinyLM; must be None or ``batch_size``.

    Raises:
        TinyLMError: The directory can't be opened, or an option is wrong.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        device: str | None = None,
        precision: str = "fp32",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _positive(batch_size, "batch_size", DEFAULT_BATCH_SIZE)
        if max_batch_size not in (None, self.batch_size):
            raise ConfigError(
                f"max_batch_size is for automatic batch sizes, found {max_batch_size}. Give "
                "batch_size a number and leave it out."
            )
        device = "auto" if device in (None, HARNESS_DEVICE) else device
        self.runtime = open_runtime(pretrained, device=device, precision=precision)
        _log.info("%s: computes on %s", pretrained, self.runtime.device)
        self.config = self.runtime.config
        self.tokenizer = load_tokenizer(self.runtime.directory, vocab_size=self.config.vocab_size)
        self._warned_of_cut = False

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text begins with."""
        own = self.tokenizer("")["input_ids"]
        return int(own[0]) if own else self.eot_token_id

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests."""
        return str(self.runtime.directory.resolve()).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Turn text into ids; by default with the tokenizer's own special tokens."""
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special)["input_ids"])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, in windows that do not overlap: a float in nats for each."""
        owners: list[int] = []
        windows: list[tuple[Any, list[int], list[int]]] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                owners.append(owner)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations: the log likelihood in nats, and whether greedy would take it."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        with tqdm(total=len(rows), desc="log likelihoods", disable=disable_tqdm) as bar:
            for batch in _batches(longest_first, self.batch_size):
                scores, greedy = self._score([rows[i] for i in batch])
                for row, index in enumerate(batch):
                    key, _, continuation = requests[index]
                    end = len(rows[index]) - 1
                    part = slice(end - len(continuation), end)
                    results[index] = (float(scores[row, part].sum()), bool(greedy[row, part].all()))
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, results[index])
                bar.update(len(batch))
        return results

    def _row(self, context: list[int], continuation: list[int]) -> list[int]:
        """Join context and continuation; the context loses its beginning if both are too long."""
        if not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"a continuation must have 1 to {self.max_length} tokens, the model's context; "
                f"found {len(continuation)}."
            )
        row = (context or [self.prefix_token_id]) + continuation
        if len(row) > self.max_length + 1:
            self._warn_of_cut()
        return row[-(self.max_length + 1) :]

    def _score(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return each next token's log probability, float64 [B, S], and whether it is the top."""
        tokens, lens = _right_padded(rows)
        targets = tokens[:, 1:].to(self.runtime.device)
        scores, greedy, start = [], [], 0
        for logits in self.runtime.logits(tokens[:, :-1], lens - 1):
            wanted = targets[:, start : start + logits.shape[1]]  # [B, s]
            start += logits.shape[1]
            chosen = logits.float().log_softmax(dim=-1).gather(-1, wanted[..., None])
            scores.append(chosen.squeeze(-1).double().cpu())
            greedy.append((logits.argmax(dim=-1) == wanted).cpu())
        return torch.cat(scores, dim=1), torch.cat(greedy, dim=1)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until one of ``until``, the end token, or ``max_gen_toks`` tokens.

        Greedy unless ``do_sample`` is true, or absent and ``temperature`` above 0. Sampled
        requests run one by one, each from ``seed`` (default 0), so that none depends on another.
        """
        jobs = [_Job(self, *request.args) for request in requests]
        order = sorted(range(len(jobs)), key=lambda i: (jobs[i].kind, -len(jobs[i].prompt)))
        texts = [""] * len(jobs)
        with tqdm(total=len(jobs), desc="generating", disable=disable_tqdm) as bar:
            while order:
                first = jobs[order[0]]
                size = 1 if first.sampling.temperature else self.batch_size
                batch = [i for i in order[:size] if jobs[i].kind == first.kind]
                order = order[len(batch) :]
                made = self._generate([jobs[i] for i in batch])
                for index, text in zip(batch, made, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(len(batch))
        return texts

    def _generate(self, jobs: list[_Job]) -> list[str]:
        """Continue prompts that have the same settings."""
        first = jobs[0]
        streams = [TextStream(self.tokenizer, job.prompt) for job in jobs]
        texts = [""] * len(jobs)
        done = [False] * len(jobs)
        device = self.runtime.device
        tokens, lens = _right_padded([job.prompt for job in jobs])
        for step in stream(
            self.runtime.session(),
            tokens.to(device),
            lens.to(device),
            max_new_tokens=first.max_new_tokens,
            sampling=first.sampling,
            eos_token_id=self.eot_token_id,
            generator=torch.Generator(device).manual_seed(first.seed),
        ):
            for row, token in enumerate(step.tolist()):
                if not done[row]:
                    texts[row] += streams[row].add(token)
                    done[row] = token == self.eot_token_id or _cut(texts[row], first.until)[1]
            if all(done):
                break
        return [
            _cut(text + pieces.finish(), first.until)[0]
            for text, pieces in zip(texts, streams, strict=True)
        ]

    def _warn_of_cut(self) -> None:
        if not self._warned_of_cut:
            self._warned_of_cut = True
            warnings.warn(
                f"a text is longer than the model's context of {self.max_length} tokens; what "
                "comes first is left out of such contexts.",
                RuntimeWarning,
                stacklevel=3,
            )


class _Job:
    """One request of ``generate_until``, checked.

    Raises:
        DataError: An argument that is unknown or out of range.
    """

    def __init__(self, lm: TinyLMHarness, context: str, arguments: dict[str, Any]) -> None:
        unknown = sorted(set(arguments) - _GENERATION_ARGUMENTS)
        if unknown:
            raise DataError(
                f"generation arguments: unknown {', '.join(unknown)}. Known: "
                f"{', '.join(sorted(_GENERATION_ARGUMENTS))}."
            )
        until = arguments.get("until") or []
        self.until = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
        temperature = float(arguments.get("temperature") or 0.0)
        if not arguments.get("do_sample", temperature > 0.0):
            temperature = 0.0
        elif temperature == 0.0 and "temperature" not in arguments:
            temperature = 1.0  # do_sample alone
        self.sampling = SamplingConfig(
            temperature=temperature,
            top_k=int(arguments.get("top_k") or 0),
            top_p=float(arguments.get("top_p") or 1.0),
        )
        self.seed = int(arguments.get("seed") or 0)
        self.max_new_tokens = _positive(
            arguments.get("max_gen_toks"),
            "max_gen_toks",
            min(DEFAULT_NEW_TOKENS, lm.max_length // 2),
        )
        room = lm.max_length - self.max_new_tokens
        if room < 1:
            raise DataError(
                f"max_gen_toks must leave room for a prompt in the model's context of "
                f"{lm.max_length} tokens, found {self.max_new_tokens}."
            )
        prompt = lm.tok_encode(context) or [lm.prefix_token_id]
        if len(prompt) > room:
            lm._warn_of_cut()
        self.prompt = prompt[-room:]
        # Requests of one kind may share a batch.
        self.kind = (self.until, self.max_new_tokens, self.seed, repr(self.sampling))


def _cut(text: str, until: tuple[str, ...]) -> tuple[str, bool]:
    """Return the text before the first stop string, and whether there is one."""
    found = [at for at in (text.find(stop) for stop in until) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _right_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [B, S], filled with 0, and lengths int64 [B]."""
    lens = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lens.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return tokens, lens


def _batches(items: list[_T], size: int) -> Iterator[list[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _positive(value: Any, name: str, default: int) -> int:
    """Read a positive integer, which the harness may give as a text."""
    if value is None:
        return default
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != float(value):
        raise ConfigError(f"{name} must be a positive integer, found {value!r}.")
    return number
