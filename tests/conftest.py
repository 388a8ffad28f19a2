from __future__ import annotations

import os

# Small models gain nothing from more threads, and pytest-xdist runs a worker on each core. Set
# before torch is imported, so that subprocesses compute with the same threads too.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator

import pytest
from model_helpers import RaggedBatch, make_model, ragged_batch

from tinylm import TinyLM, attention_backends


@pytest.fixture
def model() -> TinyLM:
    """A fresh tinylm-test model with non-trivial norm weights, in evaluation mode."""
    return make_model(seed=1)


@pytest.fixture
def batch() -> RaggedBatch:
    """Four rows of 1 to 24 tokens."""
    return ragged_batch(seed=1)


@pytest.fixture
def fresh_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget which back ends failed and which warnings were given, before and after the test."""
    monkeypatch.setattr(attention_backends, "_WARNED", set())
    monkeypatch.setattr(attention_backends.DEFAULT_CHAIN, "failed", {})
    yield
