#include "bit_linear_plugin.h"

#include <stdexcept>

#include "tensors.h"

namespace tinylm::plugins {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace {

// Inputs; norm_weight and residual follow where the attributes say so.
enum Input : std::int32_t { kX, kWeight, kWeightScale, kOptional };

cuda::Activation parse_activation(const std::string& text) {
  if (text == "int8") return cuda::Activation::kInt8;
  if (text == "fp8_e4m3") return cuda::Activation::kFp8E4m3;
  throw std::invalid_argument("attribute 'activation' must be int8 or fp8_e4m3, found '" + text +
                              "'.");
}

}  // namespace

BitLinearPlugin::BitLinearPlugin(const FieldReader& fields)
    : activation_(parse_activation(fields.text("activation"))),
      eps_(fields.number("eps")),
      k_(fields.integer(
          "num_inputs", 4,
          activation_ == cuda::Activation::kInt8 ? cuda::kMaxInputs : cuda::kMaxFp8Inputs)),
      n_(fields.integer("num_outputs", 1, INT32_MAX / 4)),
      has_norm_(fields.integer("has_norm", 0, 1) == 1),
      has_residual_(fields.integer("has_residual", 0, 1) == 1),
      gated_(fields.integer("gated", 0, 1) == 1) {
  if (k_ % 4 != 0) {
    throw std::invalid_argument("attribute 'num_inputs' must be a multiple of 4, found " +
                                std::to_string(k_) + ".");
  }
}

void BitLinearPlugin::describe(std::vector<PluginField>& fields) {
  fields.emplace_back("activation", nullptr, PluginFieldType::kCHAR, 0);
  fields.emplace_back("eps", nullptr, PluginFieldType::kFLOAT32, 1);
  for (const char* name : {"num_inputs", "num_outputs", "has_norm", "has_residual", "gated"}) {
    fields.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
  }
}

void BitLinearPlugin::write(FieldWriter& fields) const {
  fields.text("activation", activation_ == cuda::Activation::kInt8 ? "int8" : "fp8_e4m3");
  fields.number("eps", eps_);
  fields.integer("num_inputs", k_);
  fields.integer("num_outputs", n_);
  fields.integer("has_norm", has_norm_);
  fields.integer("has_residual", has_residual_);
  fields.integer("gated", gated_);
}

void BitLinearPlugin::check(const PluginTensorDesc* in, std::int32_t count) const {
  if (count != num_inputs()) {
    throw std::invalid_argument(std::to_string(num_inputs()) +
                                " inputs expected by has_norm and has_residual, found " +
                                std::to_string(count) + ".");
  }
  const nvinfer1::Dims& x = in[kX].dims;
  if (x.nbDims < 1) throw std::invalid_argument("input 'x' must have a dimension, found none.");
  std::vector<std::int64_t> shape(static_cast<std::size_t>(x.nbDims), -1);
  shape.back() = gated_ ? 2 * k_ : k_;
  require_shape("x", x, shape);
  require_shape("weight", in[kWeight].dims, {cuda::packed_bytes(n_, k_)});
  require_shape("weight_scale", in[kWeightScale].dims, {n_});
  if (has_norm_) require_shape("norm_weight", in[kOptional].dims, {k_});
  if (has_residual_) {
    shape.back() = n_;
    require_shape("residual", in[kOptional + has_norm_].dims, shape);
  }
}

std::int32_t BitLinearPlugin::getOutputDataTypes(DataType* out, std::int32_t, const DataType* in,
                                                 std::int32_t) const noexcept {
  out[0] = in[kX];
  return 0;
}

std::int32_t BitLinearPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t,
                                              const nvinfer1::DimsExprs*, std::int32_t,
                                              nvinfer1::DimsExprs* out, std::int32_t,
                                              nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(node_, -1, [&] {
    if (in[kX].nbDims < 1) throw std::invalid_argument("input 'x' must have a dimension.");
    out[0] = in[kX];
    out[0].d[out[0].nbDims - 1] = builder.constant(n_);
    return 0;
  });
}

bool BitLinearPlugin::supportsFormatCombination(std::int32_t pos,
                                                const DynamicPluginTensorDesc* tensors,
                                                std::int32_t count, std::int32_t) noexcept {
  const PluginTensorDesc& desc = tensors[pos].desc;
  if (pos == kX) return is_linear_activation(desc);
  if (pos == kWeight) return is_linear(desc, DataType::kINT8);
  if (pos == kWeightScale || (has_norm_ && pos == kOptional)) {
    return is_linear(desc, DataType::kFLOAT);
  }
  return pos <= count && is_linear(desc, tensors[kX].desc.type);
}

std::size_t BitLinearPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, std::int32_t,
                                              const DynamicPluginTensorDesc*,
                                              std::int32_t) const noexcept {
  return static_cast<std::size_t>(
      cuda::bit_linear_workspace(num_rows(in[kX].max), k_, activation_));
}

std::int32_t BitLinearPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*,
                                      const void* const* inputs, void* const* outputs,
                                      void* workspace, cudaStream_t stream) noexcept {
  return guarded(node_, -1, [&] {
    cuda::BitLinearParams params;
    params.type = element_type(in[kX].type);
    params.activation = activation_;
    params.m = num_rows(in[kX].dims);
    params.n = n_;
    params.k = k_;
    params.gated = gated_;
    params.x = inputs[kX];
    params.y = outputs[0];
    params.weight = static_cast<const std::uint8_t*>(inputs[kWeight]);
    params.weight_scale = static_cast<const float*>(inputs[kWeightScale]);
    if (has_norm_) params.norm_weight = static_cast<const float*>(inputs[kOptional]);
    if (has_residual_) params.residual = inputs[kOptional + has_norm_];
    params.eps = eps_;
    check_cuda(cuda::bit_linear(params, workspace, stream), "BitLinear");
    return 0;
  });
}

}  // namespace tinylm::plugins
