#include "flash_mla_plugin.h"

#include <stdexcept>

#include "tensors.h"
#include "ternary_gemm.h"

namespace tinylm::plugins {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace {

enum Input : std::int32_t {
  kQkv,         // T [B, S, H * (nope + P) + R + P]
  kNormWeight,  // float [R]
  kKvB,         // int8 [packed bytes]
  kKvBScale,    // float [H * (nope + Dv)]
  kPastLens,    // int32 [B]
  kSeqLens,     // int32 [B]
  kPastLatent,  // int8 [B, C, R]
  kPastScale,   // float [B, C]
  kPastRope,    // T [B, C, P]
  kNumInputs,
};
enum Output : std::int32_t { kY, kPresentLatent, kPresentScale, kPresentRope, kNumOutputs };

constexpr const char* kIntegers[] = {"num_heads", "nope_dim", "rope_dim", "value_dim",
                                     "latent_rank"};
constexpr const char* kNumbers[] = {"theta", "eps", "softmax_scale"};

}  // namespace

FlashMlaPlugin::FlashMlaPlugin(const FieldReader& fields) {
  constexpr std::int64_t kMost = 1 << 16;
  shape_.num_heads = fields.integer("num_heads", 1, kMost);
  shape_.nope_dim = fields.integer("nope_dim", 1, kMost);
  shape_.rope_dim = fields.integer("rope_dim", 1, kMost);
  shape_.value_dim = fields.integer("value_dim", 1, kMost);
  shape_.latent_rank = fields.integer("latent_rank", 1, kMost);
  shape_.theta = fields.number("theta");
  shape_.eps = fields.number("eps");
  shape_.softmax_scale = fields.number("softmax_scale");
  if (const char* reason = cuda::unsupported(shape_)) {
    throw std::invalid_argument(std::string("no kernel serves these sizes: ") + reason +
                                "; found num_heads " + std::to_string(shape_.num_heads) +
                                ", nope_dim " + std::to_string(shape_.nope_dim) + ", rope_dim " +
                                std::to_string(shape_.rope_dim) + ", value_dim " +
                                std::to_string(shape_.value_dim) + ", latent_rank " +
                                std::to_string(shape_.latent_rank) + ".");
  }
}

void FlashMlaPlugin::describe(std::vector<PluginField>& fields) {
  for (const char* name : kIntegers) fields.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
  for (const char* name : kNumbers) {
    fields.emplace_back(name, nullptr, PluginFieldType::kFLOAT32, 1);
  }
}

void FlashMlaPlugin::write(FieldWriter& fields) const {
  fields.integer("num_heads", shape_.num_heads);
  fields.integer("nope_dim", shape_.nope_dim);
  fields.integer("rope_dim", shape_.rope_dim);
  fields.integer("value_dim", shape_.value_dim);
  fields.integer("latent_rank", shape_.latent_rank);
  fields.number("theta", shape_.theta);
  fields.number("eps", shape_.eps);
  fields.number("softmax_scale", shape_.softmax_scale);
}

std::int32_t FlashMlaPlugin::getAliasedInput(std::int32_t output) noexcept {
  return output == kY ? -1 : kPastLatent + output - kPresentLatent;
}

void FlashMlaPlugin::check(const PluginTensorDesc* in, std::int32_t count) const {
  if (count != kNumInputs) {
    throw std::invalid_argument(std::to_string(kNumInputs) + " inputs expected, found " +
                                std::to_string(count) + ".");
  }
  const std::int64_t rank = shape_.latent_rank, rope = shape_.rope_dim;
  require_shape("qkv", in[kQkv].dims, {-1, -1, shape_.q_width() + rank + rope});
  const std::int64_t batch = in[kQkv].dims.d[0];
  require_shape("kv_norm_weight", in[kNormWeight].dims, {rank});
  require_shape("kv_b", in[kKvB].dims, {cuda::packed_bytes(shape_.kv_b_rows(), rank)});
  require_shape("kv_b_scale", in[kKvBScale].dims, {shape_.kv_b_rows()});
  require_shape("past_lens", in[kPastLens].dims, {batch});
  require_shape("seq_lens", in[kSeqLens].dims, {batch});
  require_shape("past_latent", in[kPastLatent].dims, {batch, -1, rank});
  const std::int64_t capacity = in[kPastLatent].dims.d[1];
  require_shape("past_scale", in[kPastScale].dims, {batch, capacity});
  require_shape("past_rope", in[kPastRope].dims, {batch, capacity, rope});
}

std::int32_t FlashMlaPlugin::getOutputDataTypes(DataType* out, std::int32_t, const DataType* in,
                                                std::int32_t) const noexcept {
  out[kY] = in[kQkv];
  out[kPresentLatent] = in[kPastLatent];
  out[kPresentScale] = in[kPastScale];
  out[kPresentRope] = in[kPastRope];
  return 0;
}

std::int32_t FlashMlaPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t,
                                             const nvinfer1::DimsExprs*, std::int32_t,
                                             nvinfer1::DimsExprs* out, std::int32_t,
                                             nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(node_, -1, [&] {
    if (in[kQkv].nbDims != 3) {
      throw std::invalid_argument("input 'qkv' must have 3 dimensions, found " +
                                  std::to_string(in[kQkv].nbDims) + ".");
    }
    out[kY] = in[kQkv];
    out[kY].d[2] = builder.constant(shape_.num_heads * shape_.value_dim);
    out[kPresentLatent] = in[kPastLatent];
    out[kPresentScale] = in[kPastScale];
    out[kPresentRope] = in[kPastRope];
    return 0;
  });
}

bool FlashMlaPlugin::supportsFormatCombination(std::int32_t pos,
                                               const DynamicPluginTensorDesc* tensors, std::int32_t,
                                               std::int32_t) noexcept {
  const PluginTensorDesc& desc = tensors[pos].desc;
  switch (pos) {
    case kQkv:
      return is_linear_activation(desc);
    case kKvB:
    case kPastLatent:
    case kNumInputs + kPresentLatent:
      return is_linear(desc, DataType::kINT8);
    case kPastLens:
    case kSeqLens:
      return is_linear(desc, DataType::kINT32);
    case kNormWeight:
    case kKvBScale:
    case kPastScale:
    case kNumInputs + kPresentScale:
      return is_linear(desc, DataType::kFLOAT);
    default:
      return is_linear(desc, tensors[kQkv].desc.type);
  }
}

std::size_t FlashMlaPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, std::int32_t,
                                             const DynamicPluginTensorDesc*,
                                             std::int32_t) const noexcept {
  return guarded(node_, std::size_t{0}, [&] {
    const nvinfer1::Dims& qkv = in[kQkv].max;
    return static_cast<std::size_t>(cuda::latent_attention_workspace(
        shape_, element_type(in[kQkv].desc.type), qkv.d[0], qkv.d[1], in[kPastLatent].max.d[1]));
  });
}

std::int32_t FlashMlaPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*,
                                     const void* const* inputs, void* const* outputs,
                                     void* workspace, cudaStream_t stream) noexcept {
  return guarded(node_, -1, [&] {
    for (std::int32_t output = kPresentLatent; output < kNumOutputs; ++output) {
      if (outputs[output] != inputs[kPastLatent + output - kPresentLatent]) {
        throw std::runtime_error(
            "the present cache must be the past one. Bind present.* to the memory of past.*, and "
            "build the engine with the preview feature kALIASED_PLUGIN_IO_10_03.");
      }
    }
    cuda::LatentAttentionParams params;
    params.type = element_type(in[kQkv].type);
    params.batch = in[kQkv].dims.d[0];
    params.length = in[kQkv].dims.d[1];
    params.capacity = in[kPastLatent].dims.d[1];
    params.qkv = inputs[kQkv];
    params.norm_weight = static_cast<const float*>(inputs[kNormWeight]);
    params.kv_b = static_cast<const std::uint8_t*>(inputs[kKvB]);
    params.kv_b_scale = static_cast<const float*>(inputs[kKvBScale]);
    params.past_lens = static_cast<const std::int32_t*>(inputs[kPastLens]);
    params.seq_lens = static_cast<const std::int32_t*>(inputs[kSeqLens]);
    params.latent = static_cast<std::int8_t*>(outputs[kPresentLatent]);
    params.scale = static_cast<float*>(outputs[kPresentScale]);
    params.rope = outputs[kPresentRope];
    params.y = outputs[kY];
    check_cuda(cuda::latent_attention(shape_, params, workspace, stream), "FlashMLA");
    return 0;
  });
}

}  // namespace tinylm::plugins
