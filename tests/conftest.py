from __future__ import annotations

import os

# Small models gain nothing from more threads, and pytest-xdist runs a worker on each core. Set
# before torch is imported, so that subprocesses compute with the same threads too.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from typing import Any

import pytest
import torch
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU's tests where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="NOT TESTED: there is no CUDA GPU here"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Let a GPU test that is skipped fail in `make test-gpu`, which sets TINYLM_REQUIRE_GPU."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("TINYLM_REQUIRE_GPU") and item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where every GPU test must run: {report.longrepr}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly what the GPU's tests leave unproved."""
    # A module that is skipped whole has a report without keywords.
    reports = terminalreporter.stats.get("skipped", ())
    skipped = [r for r in reports if "gpu" in getattr(r, "keywords", ())]
    if skipped:
        terminalreporter.section("GPU TESTS NOT RUN", sep="!", yellow=True, bold=True)
        terminalreporter.line(
            f"{len(skipped)} tests need an NVIDIA GPU and were skipped. On a machine with one: "
            "make test-gpu PYTHON=python3",
            yellow=True,
        )
