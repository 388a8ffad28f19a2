#include "lm_head_plugin.h"

#include <stdexcept>

#include "lm_head.h"
#include "tensors.h"

namespace tinylm::plugins {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace {

enum Input : std::int32_t {
  kX,           // T [B, S, K]
  kTable,       // T [N, K]
  kNormWeight,  // float [K]
  kSeqLens,     // int32 [B]
  kNumInputs,
};

}  // namespace

LmHeadPlugin::LmHeadPlugin(const FieldReader& fields) : eps_(fields.number("eps")) {}

void LmHeadPlugin::describe(std::vector<PluginField>& fields) {
  fields.emplace_back("eps", nullptr, PluginFieldType::kFLOAT32, 1);
}

void LmHeadPlugin::write(FieldWriter& fields) const { fields.number("eps", eps_); }

void LmHeadPlugin::check(const PluginTensorDesc* in, std::int32_t count) const {
  if (count != kNumInputs) {
    throw std::invalid_argument(std::to_string(kNumInputs) + " inputs expected, found " +
                                std::to_string(count) + ".");
  }
  require_shape("table", in[kTable].dims, {-1, -1});
  const std::int64_t hidden = in[kTable].dims.d[1];
  if (hidden % 4 != 0 || hidden > cuda::kMaxHeadInputs) {
    throw std::invalid_argument("input 'table' must have rows of a multiple of 4 and at most " +
                                std::to_string(cuda::kMaxHeadInputs) + " elements, found " +
                                std::to_string(hidden) + ".");
  }
  require_shape("x", in[kX].dims, {-1, -1, hidden});
  require_shape("norm_weight", in[kNormWeight].dims, {hidden});
  require_shape("seq_lens", in[kSeqLens].dims, {in[kX].dims.d[0]});
}

std::int32_t LmHeadPlugin::getOutputDataTypes(DataType* out, std::int32_t, const DataType*,
                                              std::int32_t) const noexcept {
  out[0] = DataType::kFLOAT;
  return 0;
}

std::int32_t LmHeadPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t,
                                           const nvinfer1::DimsExprs*, std::int32_t,
                                           nvinfer1::DimsExprs* out, std::int32_t,
                                           nvinfer1::IExprBuilder&) noexcept {
  return guarded(node_, -1, [&] {
    if (in[kX].nbDims != 3) throw std::invalid_argument("input 'x' must have three dimensions.");
    if (in[kTable].nbDims != 2) {
      throw std::invalid_argument("input 'table' must have two dimensions.");
    }
    out[0].nbDims = 2;
    out[0].d[0] = in[kX].d[0];
    out[0].d[1] = in[kTable].d[0];
    return 0;
  });
}

bool LmHeadPlugin::supportsFormatCombination(std::int32_t pos,
                                             const DynamicPluginTensorDesc* tensors, std::int32_t,
                                             std::int32_t) noexcept {
  const PluginTensorDesc& desc = tensors[pos].desc;
  switch (pos) {
    case kX:
      return is_linear_activation(desc);
    case kTable:
      return is_linear(desc, tensors[kX].desc.type);
    case kSeqLens:
      return is_linear(desc, DataType::kINT32);
    default:  // the norm's weight and the logits
      return is_linear(desc, DataType::kFLOAT);
  }
}

std::int32_t LmHeadPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*,
                                   const void* const* inputs, void* const* outputs, void*,
                                   cudaStream_t stream) noexcept {
  return guarded(node_, -1, [&] {
    cuda::LmHeadParams params;
    params.type = element_type(in[kX].type);
    params.batch = in[kX].dims.d[0];
    params.length = in[kX].dims.d[1];
    params.hidden = in[kX].dims.d[2];
    params.vocab = in[kTable].dims.d[0];
    params.x = inputs[kX];
    params.table = inputs[kTable];
    params.norm_weight = static_cast<const float*>(inputs[kNormWeight]);
    params.seq_lens = static_cast<const std::int32_t*>(inputs[kSeqLens]);
    params.logits = static_cast<float*>(outputs[0]);
    params.eps = eps_;
    check_cuda(cuda::lm_head(params, stream), "LmHead");
    return 0;
  });
}

}  // namespace tinylm::plugins
