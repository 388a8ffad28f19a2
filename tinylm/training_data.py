"""The data of a training run: tokenizer, training and held-out sequences, and their identity."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

from rich.console import Console

from tinylm.config import ModelConfig
from tinylm.data import PackedSequences, PaddedSequences, TokenizedCorpus, load_corpus
from tinylm.distributed import World
from tinylm.errors import ConfigError
from tinylm.shards import open_prepared
from tinylm.tokenizer import load_tokenizer
from tinylm.training_config import DataConfig, LoopConfig, TrainConfig
from tinylm.training_state import fingerprint

Sequences: TypeAlias = PackedSequences | PaddedSequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run reads.

    Attributes:
        model: The model's config, with the tokenizer's special ids.
        tokenizer: A transformers tokenizer.
        train: Training sequences.
        val: Held-out sequences.
        unigram_entropy: Of the held-out tokens, in nats: the loss of a model without context.
        fingerprints: Of both files, or of the prepared folder, by field name.
        sample_ids: The sample prompt's tokens, at least one.
    """

    model: ModelConfig
    tokenizer: Any
    train: Sequences
    val: Sequences
    unigram_entropy: float
    fingerprints: dict[str, dict[str, Any]]
    sample_ids: list[int]

    def count_steps(self, training: LoopConfig) -> int:
        """Return the run's length in optimiser steps."""
        if training.max_steps is not None:
            return training.max_steps
        epochs = 1.0 if training.epochs is None else training.epochs
        return max(1, math.ceil(epochs * len(self.train) / training.batch_size))


def load_training_data(
    config: TrainConfig, console: Console, world: World | None = None
) -> TrainingData:
    """Load tokenizer and text, and say what was found.

    Args:
        config: The run.
        console: Where to say it.
        world: The processes; one on each machine makes what the others then find in the cache.

    Raises:
        TokenizerError: The tokenizer can't be loaded, or has more ids than the vocabulary.
        DataError: A file can't be used.
        ConfigError: The sample prompt fills the context.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, vocab_size=config.model.vocab_size)
    with (world or World()).local_main_first():
        train_corpus, val_corpus, fingerprints = _open(config.data, tokenizer, console)
    kind = PackedSequences if config.data.packing else PaddedSequences
    length = config.model.max_seq_len
    return TrainingData(
        model=_with_token_ids(config.model, tokenizer, config.data.tokenizer),
        tokenizer=tokenizer,
        train=kind(train_corpus, length),
        val=kind(val_corpus, length),
        unigram_entropy=val_corpus.unigram_entropy(),
        fingerprints=fingerprints,
        sample_ids=encode_prompt(
            tokenizer,
            config.evaluation.sample_prompt,
            max_seq_len=length,
            flag="--sample-prompt",
        ),
    )


def _with_token_ids(model: ModelConfig, tokenizer: Any, source: str) -> ModelConfig:
    """Return the config with the tokenizer's special ids; ids that it already has must agree."""
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    for name, found in ids.items():
        expected = getattr(model, name)
        if expected is not None and expected != found:
            raise ConfigError(
                f"model.{name} is {expected}, and the tokenizer {source} has {found}. Use the "
                "tokenizer that belongs to the model, or leave the id out for a new run."
            )
    return model.replace(**ids)


def _open(
    data: DataConfig, tokenizer: Any, console: Console
) -> tuple[TokenizedCorpus, TokenizedCorpus, dict[str, dict[str, Any]]]:
    """Return training text, held-out text, and their fingerprints by field name."""
    if data.directory is not None:
        prepared = open_prepared(data.directory, tokenizer, verify=data.verify)
        for split, corpus in (("training", prepared.train), ("held out", prepared.val)):
            _say(f"{data.directory}, {split}", corpus, console)
        return prepared.train, prepared.val, {"directory": prepared.fingerprint}
    corpora, fingerprints = [], {}
    for name in ("train_file", "val_file"):
        path = getattr(data, name)
        corpora.append(_load(path, data, tokenizer, console))
        fingerprints[name] = fingerprint(path, corpora[-1])
    return corpora[0], corpora[1], fingerprints


def _load(path: str, data: DataConfig, tokenizer: Any, console: Console) -> TokenizedCorpus:
    corpus = load_corpus(
        path, tokenizer, skip_bad_lines=data.skip_bad_lines, num_proc=data.num_proc
    )
    _say(path, corpus, console)
    return corpus


def _say(what: str, corpus: TokenizedCorpus, console: Console) -> None:
    skipped = f", {corpus.num_skipped:,} bad lines skipped" if corpus.num_skipped else ""
    console.print(
        f"{what}: {corpus.num_docs:,} documents, {corpus.num_tokens:,} tokens, "
        f"{corpus.num_bytes:,} bytes{skipped}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def encode_prompt(tokenizer: Any, prompt: str, *, max_seq_len: int, flag: str) -> list[int]:
    """Turn a prompt into at least one token; an empty one becomes the token that starts a text.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: The text.
        max_seq_len: The model's context.
        flag: Where the prompt came from, for the message.

    Raises:
        ConfigError: The prompt leaves no room for a new token.
    """
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        start = tokenizer.bos_token_id
        ids = [tokenizer.eos_token_id if start is None else start]
    if len(ids) >= max_seq_len:
        raise ConfigError(
            f"the prompt must leave room for a new token in the model's context of {max_seq_len} "
            f"tokens, found {len(ids)} tokens. Shorten {flag}."
        )
    return ids
