from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence

import pytest
import tolerances
import torch
from tolerances import assert_equal
from torch import Tensor

from tinylm.attention_backends import (
    DEFAULT_CHAIN,
    BackendChain,
    FlashBackend,
    PlainBackend,
    SdpaBackend,
    visible_keys,
)
from tinylm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_backends")


def draw(
    dtype: torch.dtype = torch.float64, *, s: int = 9, t: int = 9, value_dim: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, s, 2, 8, generator=g, dtype=torch.float64) * 2
    k = torch.randn(3, t, 2, 8, generator=g, dtype=torch.float64)
    v = torch.randn(3, t, 2, value_dim, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float, past_lens: Sequence[int]) -> Tensor:
    """Softmax attention one query at a time, over exactly the keys it may see."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            seen = past_lens[b] + i + 1
            for h in range(q.shape[2]):
                scores = [float(q[b, i, h] @ k[b, j, h]) * scale for j in range(seen)]
                weights = [math.exp(score - max(scores)) for score in scores]
                for j, weight in enumerate(weights):
                    out[b, i, h] += v[b, j, h] * (weight / math.fsum(weights))
    return out


class FailingBackend(PlainBackend):
    """Accepts everything, then fails."""

    name = "failing"

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    def attend(self, *args: object, **kwargs: object) -> Tensor:
        self.calls += 1
        raise self.error


class ForcedFlashBackend(FlashBackend):
    """flash-attn that takes any input to be suitable."""

    def unsuitable(self, q: Tensor, v: Tensor, past_lens: Tensor | None) -> str | None:
        return None


def test_visible_keys() -> None:
    visible = visible_keys(2, 4, torch.tensor([0, 2]))
    assert visible.int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ]


@pytest.mark.parametrize("backend", [SdpaBackend(), PlainBackend()], ids=lambda b: b.name)
@pytest.mark.parametrize("value_dim", [6, 8])
def test_causal_attention_without_past(backend: SdpaBackend | PlainBackend, value_dim: int) -> None:
    q, k, v = draw(value_dim=value_dim)
    y = backend.attend(q, k, v, scale=0.3, past_lens=None)
    tolerances.ATTENTION_FLOAT64.assert_close(y, by_hand(q, k, v, 0.3, [0, 0, 0]))


@pytest.mark.parametrize("backend", [SdpaBackend(), PlainBackend()], ids=lambda b: b.name)
@pytest.mark.parametrize("s", [1, 3])
def test_causal_attention_with_ragged_past(backend: SdpaBackend | PlainBackend, s: int) -> None:
    q, k, v = draw(s=s, t=9)
    past_lens = [0, 4, 9 - s]
    k[1, 4 + s :] = 1e3  # slots no query may see
    v[1, 4 + s :] = 1e6
    y = backend.attend(q, k, v, scale=0.3, past_lens=torch.tensor(past_lens))
    tolerances.ATTENTION_FLOAT64.assert_close(y, by_hand(q, k, v, 0.3, past_lens))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, tolerances.ATTENTION_FLOAT32),
        (torch.bfloat16, tolerances.ATTENTION_BFLOAT16),
    ],
)
@pytest.mark.parametrize("past", [None, [0, 2, 1]])
def test_sdpa_equals_plain(
    dtype: torch.dtype, tolerance: tolerances.Tolerance, past: list[int] | None
) -> None:
    q, k, v = draw(dtype, s=7, t=9 if past else 7)
    past_lens = torch.tensor(past) if past else None
    sdpa = SdpaBackend().attend(q, k, v, scale=0.3, past_lens=past_lens)
    plain = PlainBackend().attend(q, k, v, scale=0.3, past_lens=past_lens)
    assert sdpa.dtype == plain.dtype == dtype
    tolerance.assert_close(sdpa, plain)


def test_failing_backend_is_replaced_with_one_warning() -> None:
    failing = FailingBackend(RuntimeError("no kernel image is available"))
    chain = BackendChain([failing, PlainBackend()])
    q, k, v = draw()
    expected = PlainBackend().attend(q, k, v, scale=0.3, past_lens=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_equal(chain.attend(q, k, v, scale=0.3), expected)
    assert [w.category for w in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert "'failing'" in message
    assert "RuntimeError: no kernel image is available" in message
    assert failing.calls == 1, "a back end that failed is not tried again"
    assert chain.failed == {"failing": "RuntimeError: no kernel image is available"}


@pytest.mark.parametrize(
    "error", [ImportError("x"), NotImplementedError("x"), TypeError("x"), RuntimeError("x")]
)
def test_kinds_of_failure_that_fall_to_the_next(error: Exception) -> None:
    chain = BackendChain([FailingBackend(error), PlainBackend()])
    with pytest.warns(RuntimeWarning, match=f"{type(error).__name__}: x"):
        chain.attend(*draw(), scale=0.3)


def test_missing_flash_attn_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails, installed or not
    chain = BackendChain([ForcedFlashBackend(), SdpaBackend(), PlainBackend()])
    q, k, v = draw()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = (chain.attend(q, k, v, scale=0.3) for _ in range(2))
    assert len(caught) == 1
    assert "'flash'" in str(caught[0].message)
    assert "flash_attn" in str(caught[0].message)
    assert_equal(first, SdpaBackend().attend(q, k, v, scale=0.3, past_lens=None))
    assert_equal(second, first)


def test_inputs_that_do_not_suit_flash_attn_fall_through_silently() -> None:
    q, k, v = draw(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DEFAULT_CHAIN.attend(q, k, v, scale=0.3)
    assert DEFAULT_CHAIN.failed == {}


def test_asking_for_a_backend_that_does_not_suit_warns_once() -> None:
    q, k, v = draw(torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            DEFAULT_CHAIN.attend(q, k, v, scale=0.3, first="flash")
    assert [str(w.message).rpartition(": ")[2] for w in caught] == ["needs a CUDA device"]
    assert DEFAULT_CHAIN.failed == {}


def test_what_suits_flash_attn() -> None:
    def why(dtype: torch.dtype, dims: tuple[int, int], past: bool = False) -> str | None:
        q = torch.empty(1, 4, 2, dims[0], dtype=dtype, device="meta")
        v = torch.empty(1, 4, 2, dims[1], dtype=dtype, device="meta")
        q_cuda, v_cuda = FakeCuda(q), FakeCuda(v)
        past_lens = torch.zeros(1, dtype=torch.int64) if past else None
        return FlashBackend().unsuitable(q_cuda, v_cuda, past_lens)  # type: ignore[arg-type]

    class FakeCuda:
        """A tensor's shape and dtype on a device this machine may lack."""

        device = torch.device("cuda")

        def __init__(self, like: Tensor) -> None:
            self.shape, self.dtype = like.shape, like.dtype

    assert why(torch.bfloat16, (64, 64)) is None
    assert why(torch.float16, (256, 256)) is None
    assert "float32" in str(why(torch.float32, (64, 64)))
    assert "96 and 64" in str(why(torch.bfloat16, (96, 64)))
    assert "320 and 320" in str(why(torch.bfloat16, (320, 320)))
    assert "cache" in str(why(torch.bfloat16, (64, 64), past=True))


@pytest.mark.parametrize("first", ["sdpa", "plain"])
def test_first_skips_the_backends_before_it(first: str) -> None:
    failing = FailingBackend(RuntimeError("never asked"))
    chain = BackendChain([failing, SdpaBackend(), PlainBackend()])
    chain.attend(*draw(), scale=0.3, first=first)
    assert failing.calls == 0


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"auto or one of flash, cudnn, sdpa, plain, found 'fast'"
    ):
        DEFAULT_CHAIN.attend(*draw(), scale=0.3, first="fast")


def test_out_of_memory_is_not_swallowed() -> None:
    failing = FailingBackend(torch.OutOfMemoryError("tried to allocate 80 GiB"))
    chain = BackendChain([failing, PlainBackend()])
    with pytest.raises(torch.OutOfMemoryError, match="80 GiB"):
        chain.attend(*draw(), scale=0.3)
    assert chain.failed == {}


def test_errors_of_another_kind_are_not_swallowed() -> None:
    chain = BackendChain([FailingBackend(KeyError("a bug")), PlainBackend()])
    with pytest.raises(KeyError):
        chain.attend(*draw(), scale=0.3)


def test_when_all_fail_every_reason_is_given_and_none_is_disabled() -> None:
    chain = BackendChain([SdpaBackend(), PlainBackend()])
    q, k, v = draw()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError) as error:
            chain.attend(q, k[..., :5], v, scale=0.3)  # head sizes that do not fit
        assert "no attention backend works" in str(error.value)
        assert "sdpa" in str(error.value)
        assert "plain" in str(error.value)
        chain.attend(q, k, v, scale=0.3)  # one bad input does not end the process's attention
    assert chain.failed == {}
