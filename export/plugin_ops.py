"""The contract of the TensorRT plugins: names, inputs and attributes.

They are the ops of :mod:`tinylm_export.ops` after the passes of :mod:`tinylm_export.trt_graph` have
fused projections, gate and residual, and packed the weights (:mod:`tinylm_export.gpu_packing`), and
the head with what it reads.
``trt_plugins/plugins`` is held to these tables by tests/test_gpu_build.py. Letters in shapes are
those of :mod:`tinylm_export.ops`; T is the graph's type: float, half or bfloat16.
"""

from __future__ import annotations

from tinylm_export.ops import Attribute, OpSpec, Parameter

PLUGIN_NAMESPACE = "tinylm"
PLUGIN_VERSION = "1"
_INT8, _INT32, _FLOAT = "tensor(int8)", "tensor(int32)", "tensor(float)"

BIT_LINEAR_PLUGIN = OpSpec(
    name="BitLinear",
    doc=(
        "tinylm::BitLinear; with `gated`, of silu(gate) * up as tinylm::SwiGLU rounds it; with "
        "`has_residual`, y = residual + the layer's output, each rounded to T."
    ),
    inputs=(
        Parameter("x", "T", "[..., K]", "input; [..., 2K] = gate | up if gated"),
        Parameter("weight", _INT8, "[bytes]", "2-bit codes in the kernels' order"),
        Parameter("weight_scale", _FLOAT, "[N]", "scale of each row"),
        Parameter("norm_weight", _FLOAT, "[K]", "RMSNorm weight, if has_norm", optional=True),
        Parameter("residual", "T", "[..., N]", "added to y, if has_residual", optional=True),
    ),
    outputs=(Parameter("y", "T", "[..., N]", "output"),),
    attributes=(
        Attribute("activation", "string", "int8 or fp8_e4m3"),
        Attribute("eps", "float", "added to the mean square in RMSNorm"),
        Attribute("num_inputs", "int", "K, a multiple of 4"),
        Attribute("num_outputs", "int", "N"),
        Attribute("has_norm", "int", "whether norm_weight is there, 0 or 1"),
        Attribute("has_residual", "int", "whether residual is there, 0 or 1"),
        Attribute("gated", "int", "whether x is gate | up, 0 or 1"),
    ),
)

FLASH_MLA_PLUGIN = OpSpec(
    name="FlashMLA",
    doc="tinylm::FlashMLA; the present cache aliases the past one: it is updated in place.",
    inputs=(
        Parameter("qkv", "T", "[B, S, H*D + R+P]", "q and kv side by side"),
        Parameter("kv_norm_weight", _FLOAT, "[R]", "RMSNorm weight of the latent"),
        Parameter("kv_b", _INT8, "[bytes]", "2-bit codes of kv_b in the kernels' order"),
        Parameter("kv_b_scale", _FLOAT, "[H*(nope+Dv)]", "scale of each row of kv_b"),
        Parameter("past_lens", _INT32, "[B]", "tokens already cached"),
        Parameter("seq_lens", _INT32, "[B]", "valid new tokens, right-padded"),
        Parameter("past_latent", _INT8, "[B, C, R]", "quantised latents"),
        Parameter("past_scale", _FLOAT, "[B, C]", "multiplier s: latent / s"),
        Parameter("past_rope", "T", "[B, C, P]", "rotated shared keys"),
    ),
    outputs=(
        Parameter("y", "T", "[B, S, H*Dv]", "attention output"),
        Parameter("present_latent", _INT8, "[B, C, R]", "past_latent's memory"),
        Parameter("present_scale", _FLOAT, "[B, C]", "past_scale's memory"),
        Parameter("present_rope", "T", "[B, C, P]", "past_rope's memory"),
    ),
    attributes=(
        *(
            Attribute(name, "int", "see FLASH_MLA")
            for name in ("num_heads", "nope_dim", "rope_dim", "value_dim")
        ),
        Attribute("latent_rank", "int", "R, a multiple of 4"),
        *(Attribute(name, "float", "see FLASH_MLA") for name in ("theta", "eps", "softmax_scale")),
    ),
)

LM_HEAD_PLUGIN = OpSpec(
    name="LmHead",
    doc=(
        "RMSNorm, rounded to T, of each row's last token, and its product with the table, summed "
        "in float32. A table that is the embedding too is kept once in an engine."
    ),
    inputs=(
        Parameter("x", "T", "[B, S, K]", "hidden states before the final norm"),
        Parameter("table", "T", "[N, K]", "weight of the head; K a multiple of 4, at most 6144"),
        Parameter("norm_weight", _FLOAT, "[K]", "RMSNorm weight"),
        Parameter("seq_lens", _INT32, "[B]", "valid new tokens, right-padded; 0 reads the first"),
    ),
    outputs=(Parameter("logits", _FLOAT, "[B, N]", "logits of the last tokens"),),
    attributes=(Attribute("eps", "float", "added to the mean square in RMSNorm"),),
)

PLUGINS: dict[str, OpSpec] = {
    spec.name: spec for spec in (BIT_LINEAR_PLUGIN, FLASH_MLA_PLUGIN, LM_HEAD_PLUGIN)
}
