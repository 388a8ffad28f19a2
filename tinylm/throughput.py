"""How well a run uses its device: model FLOPs utilisation (MFU) and peak memory.

FLOPs of a training step count what the model needs, not what an implementation does
(PaLM, 2204.02311, appendix B), with a multiply-add as two and the backward pass as twice the
forward one. A token takes

    6 N  +  6 L H (D_qk + D_v) S

with N the weights of all matrices that it is multiplied with (linear layers and head; a tied
embedding counts once, as the head), L layers, H heads of widths D_qk and D_v, and S tokens a
sequence. The second term is the whole S x S square of attention, as PaLM, nanoGPT and torchtitan
count it; of which a causal model needs half. Quantising, norms, softmax and the optimiser count as
nothing, and neither does a forward pass that is done again to save memory.
"""

from __future__ import annotations

import dataclasses
import resource
import sys

import torch

from tinylm.device import device_name
from tinylm.model import TinyLM

# Dense bf16 peak of tensor cores without sparsity, TFLOPS, by a part of the device's name; the
# first that fits. Source: NVIDIA's data sheets.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "A10G": 70.0,
}


def flops_per_token(model: TinyLM, seq_len: int, *, causal: bool = False) -> float:
    """Return the FLOPs of forward and backward for one token, by the formula above.

    Args:
        model: Ternary or dense; both need the same.
        seq_len: S.
        causal: Count half of the attention's square.
    """
    config, shape = model.config, model.config.attention_shape
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()  # shared ones once
        if p.ndim == 2 and (config.tie_embeddings or name != "embed_tokens.weight")
    )
    square = config.num_layers * shape.num_heads * (shape.qk_dim + shape.value_dim) * seq_len
    return 6.0 * matrices + 6.0 * square * (0.5 if causal else 1.0)


def peak_flops(device: torch.device, peak_tflops: float | None = None) -> float | None:
    """Return the device's dense bf16 peak in FLOPs a second; None where it is not known.

    Args:
        device: The model's.
        peak_tflops: What the user says it is.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory so far: allocated on a GPU, else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """Turns a speed into what a log record says about it.

    Attributes:
        flops_per_token: From :func:`flops_per_token`.
        peak: FLOPs a second of all devices of the run; None: no MFU.
        device: Whose memory is reported.
    """

    flops_per_token: float
    peak: float | None
    device: torch.device

    @classmethod
    def of(
        cls,
        model: TinyLM,
        device: torch.device,
        *,
        peak_tflops: float | None = None,
        num_devices: int = 1,
    ) -> Throughput:
        """Make one for a model at its full sequence length, on devices of one kind."""
        peak = peak_flops(device, peak_tflops)
        return cls(
            flops_per_token=flops_per_token(model, model.config.max_seq_len),
            peak=None if peak is None else num_devices * peak,
            device=device,
        )

    def fields(self, tokens_per_second: float) -> dict[str, float]:
        """Return ``peak_memory_bytes``, and ``mfu`` (a part of 1) where the peak is known."""
        result: dict[str, float] = {"peak_memory_bytes": peak_memory_bytes(self.device)}
        if self.peak is not None:
            result["mfu"] = tokens_per_second * self.flops_per_token / self.peak
        return result


def describe(fields: dict[str, float]) -> str:
    """Return :meth:`Throughput.fields` as a few words for a line or a progress bar."""
    words = [f"mfu {fields['mfu']:.1%}"] if "mfu" in fields else []
    return "  ".join([*words, f"mem {fields['peak_memory_bytes'] / 2**30:.1f} GiB"])
