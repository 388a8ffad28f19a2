"""Back ends for causal attention behind one interface: flash-attn, cuDNN, SDPA, plain.

All take q [B, S, H, D], k [B, T, H, D], v [B, T, H, Dv] and return [B, S, H, Dv]. Query i of row b
sees keys ``0 .. past_lens[b] + i``; without ``past_lens`` the past is empty and T equals S.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinylm.errors import ConfigError


def visible_keys(num_queries: int, num_keys: int, past_lens: Tensor) -> Tensor:
    """Return which keys each query sees: bool [B, S, T] from past_lens [B]."""
    queries = torch.arange(num_queries, device=past_lens.device)
    keys = torch.arange(num_keys, device=past_lens.device)
    last = past_lens[:, None] + queries  # [B, S]
    return keys <= last[:, :, None]


class AttentionBackend(Protocol):
    """One implementation of causal attention."""

    name: str

    def unsuitable(self, q: Tensor, v: Tensor, past_lens: Tensor | None) -> str | None:
        """Return why these inputs are not for this back end, or None if they are."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, past_lens: Tensor | None
    ) -> Tensor:
        """Compute attention; may raise, which lets the next back end take over for the process."""


class FlashBackend:
    """flash-attn 2 (Dao, 2023)."""

    name = "flash"

    def unsuitable(self, q: Tensor, v: Tensor, past_lens: Tensor | None) -> str | None:
        """Accept half precision on CUDA, equal head sizes up to 256, no cached past."""
        if q.device.type != "cuda":
            return "needs a CUDA device"
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"needs float16 or bfloat16, not {q.dtype}"
        if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256:
            return f"needs equal head sizes up to 256, not {q.shape[-1]} and {v.shape[-1]}"
        if past_lens is not None:
            return "serves no latent cache"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, past_lens: Tensor | None
    ) -> Tensor:
        """Compute attention with ``flash_attn_func``."""
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, softmax_scale=scale, causal=True)


class SdpaBackend:
    """``torch.nn.functional.scaled_dot_product_attention``."""

    name = "sdpa"

    def unsuitable(self, q: Tensor, v: Tensor, past_lens: Tensor | None) -> str | None:
        """Accept everything."""
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, past_lens: Tensor | None
    ) -> Tensor:
        """Compute attention with SDPA; its ``is_causal`` serves only an empty past."""
        mask = None
        if past_lens is not None:
            mask = visible_keys(q.shape[1], k.shape[1], past_lens)[:, None]  # [B, 1, S, T]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        return y.transpose(1, 2)


class CudnnBackend(SdpaBackend):
    """cuDNN's kernels by way of SDPA: the fastest on Hopper, for training without a cache."""

    name = "cudnn"

    def unsuitable(self, q: Tensor, v: Tensor, past_lens: Tensor | None) -> str | None:
        """Accept half precision on CUDA, no cached past."""
        if q.device.type != "cuda":
            return "needs a CUDA device"
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"needs float16 or bfloat16, not {q.dtype}"
        return None if past_lens is None else "serves no latent cache"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, past_lens: Tensor | None
    ) -> Tensor:
        """Compute attention with SDPA, which raises where cuDNN can't."""
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().attend(q, k, v, scale=scale, past_lens=past_lens)


class PlainBackend:
    """Softmax attention written out; slow, and works everywhere."""

    name = "plain"

    def unsuitable(self, q: Tensor, v: Tensor, past_lens: Tensor | None) -> str | None:
        """Accept everything."""
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, past_lens: Tensor | None
    ) -> Tensor:
        """Compute attention with an S x T matrix of scores, in float32 or wider."""
        if past_lens is None:
            past_lens = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
        visible = visible_keys(q.shape[1], k.shape[1], past_lens)[:, None]  # [B, 1, S, T]
        inner = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bshd,bthd->bhst", q.to(inner), k.to(inner)) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhst,bthd->bshd", weights, v.to(inner)).to(q.dtype)


class BackendChain:
    """Tries back ends in order; one that fails where a later one works is left out from then on.

    Args:
        backends: In order of preference; the last one should accept everything.
        by_name_only: Names of those that are tried only where they are asked for.
    """

    def __init__(
        self, backends: Sequence[AttentionBackend], *, by_name_only: Sequence[str] = ()
    ) -> None:
        self.backends = list(backends)
        self.by_name_only = tuple(by_name_only)
        self.failed: dict[str, str] = {}

    def names(self) -> list[str]:
        """Return the back ends' names, in order of preference."""
        return [backend.name for backend in self.backends]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        past_lens: Tensor | None = None,
        first: str = "auto",
    ) -> Tensor:
        """Compute causal attention with the first back end that can.

        Args:
            q: [B, S, H, D].
            k: [B, T, H, D].
            v: [B, T, H, Dv].
            scale: Factor on the scores.
            past_lens: Integer [B], tokens before the first query; None for none.
            first: Name of the back end to start from, or ``"auto"``.

        Returns:
            [B, S, H, Dv].

        Raises:
            ConfigError: ``first`` names no back end.
            RuntimeError: Every back end failed; holds each one's reason.
        """
        names = self.names()
        if first != "auto" and first not in names:
            raise ConfigError(
                f"attention backend must be auto or one of {', '.join(names)}, found {first!r}."
            )
        start = 0 if first == "auto" else names.index(first)
        failed: dict[str, str] = {}
        for backend in self.backends[start:]:
            if backend.name in self.failed:
                continue
            if backend.name in self.by_name_only and backend.name != first:
                continue
            reason = backend.unsuitable(q, v, past_lens)
            if reason is not None:
                if backend.name == first:
                    self._warn_once(backend.name, reason)
                continue
            try:
                y = backend.attend(q, k, v, scale=scale, past_lens=past_lens)
            except torch.OutOfMemoryError:
                raise  # another back end would need no less memory
            except (ImportError, RuntimeError, NotImplementedError, TypeError) as error:
                failed[backend.name] = f"{type(error).__name__}: {error}"
                continue
            for name, reason in failed.items():
                self.failed[name] = reason
                self._warn_once(name, reason)
            return y
        # Nothing is marked here: where every back end fails, the input is the likelier cause.
        raise RuntimeError(f"no attention backend works; {self.failed | failed}")

    def _warn_once(self, name: str, reason: str) -> None:
        if (name, reason) not in _WARNED:
            _WARNED.add((name, reason))
            warnings.warn(
                f"attention backend {name!r} is not used, the next one takes its place: {reason}",
                RuntimeWarning,
                stacklevel=4,
            )


_WARNED: set[tuple[str, str]] = set()
DEFAULT_CHAIN = BackendChain(
    [FlashBackend(), CudnnBackend(), SdpaBackend(), PlainBackend()], by_name_only=["cudnn"]
)
