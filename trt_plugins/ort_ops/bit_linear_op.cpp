#include "bit_linear_op.h"

#include <stdexcept>
#include <string>

namespace tinylm::ort {
namespace {

enum Input : std::size_t { kX = 0, kWeight, kWeightScale, kNormWeight };

cpu::Activation parse_activation(const std::string& name) {
  if (name == "int8") return cpu::Activation::kInt8;
  if (name == "fp8_e4m3") return cpu::Activation::kFp8E4m3;
  throw std::runtime_error("activation must be int8 or fp8_e4m3, found '" + name + "'.");
}

}  // namespace

std::vector<float> read_norm_weight(const NodeInfo& node, std::size_t index, std::int64_t count) {
  if (!node.has_input(index)) return {};
  const Tensor norm = node.constant(index, "norm_weight");
  require_shape("norm_weight", norm, {count}, "[K]");
  return {norm.as<float>(), norm.as<float>() + count};
}

void compute_linear(const Context& context, const cpu::LinearWeights& weights,
                    cpu::LinearParams params) {
  const Tensor x = context.input(kX);
  const std::int64_t k = weights.inputs();
  if (x.shape.empty() || x.shape.back() != k) {
    throw std::runtime_error("x [..., K]: expected a last dimension of " + std::to_string(k) +
                             ", which the weights are packed for, found " + shape_text(x.shape) +
                             ".");
  }
  std::vector<std::int64_t> shape = x.shape;
  shape.back() = weights.outputs();
  params.x = x.data;
  params.y = context.output(0, shape);
  params.m = x.count() / k;
  cpu::linear(weights, params, context.parallel());
}

BitLinearKernel::BitLinearKernel(const NodeInfo& node, cpu::FloatType type) {
  const Tensor weight = node.constant(kWeight, "weight");
  if (weight.shape.size() != 2) {
    throw std::runtime_error("weight: expected uint8 [N, K/4], found " + shape_text(weight.shape) +
                             ".");
  }
  const std::int64_t n = weight.shape[0];
  const std::int64_t k = 4 * weight.shape[1];
  const Tensor scale = node.constant(kWeightScale, "weight_scale");
  require_shape("weight_scale", scale, {n}, "[N]");
  norm_weight_ = read_norm_weight(node, kNormWeight, k);
  params_.type = type;
  params_.norm_weight = norm_weight_.empty() ? nullptr : norm_weight_.data();
  params_.eps = node.float_attribute("eps", 1e-5F);
  params_.activation = parse_activation(node.string_attribute("activation", "int8"));
  weights_ = cpu::LinearWeights::pack_ternary(weight.as<std::uint8_t>(), scale.as<float>(), n, k);
  release_pages(weight, weight.count());
}

void BitLinearKernel::compute(const Context& context) const {
  compute_linear(context, *weights_, params_);
}

const OpSpec& bit_linear_spec() {
  static const OpSpec spec{"BitLinear",
                           {{"x", "T", "[..., K]"},
                            {"weight", "tensor(uint8)", "[N, K/4]"},
                            {"weight_scale", "tensor(float)", "[N]"},
                            {"norm_weight", "tensor(float)", "[K]", true}},
                           {{"y", "T", "[..., N]"}},
                           {{"activation", "string", "int8"}, {"eps", "float", "1e-05"}}};
  return spec;
}

}  // namespace tinylm::ort
