#include "int8_linear_op.h"

#include <stdexcept>

#include "bit_linear_op.h"

namespace tinylm::ort {
namespace {

enum Input : std::size_t { kX = 0, kWeight, kWeightScale, kNormWeight };

}  // namespace

Int8LinearKernel::Int8LinearKernel(const NodeInfo& node, cpu::FloatType type) {
  const Tensor weight = node.constant(kWeight, "weight");
  if (weight.shape.size() != 2) {
    throw std::runtime_error("weight: expected int8 [N, K], found " + shape_text(weight.shape) +
                             ".");
  }
  const std::int64_t n = weight.shape[0];
  const std::int64_t k = weight.shape[1];
  const Tensor scale = node.constant(kWeightScale, "weight_scale");
  require_shape("weight_scale", scale, {n}, "[N]");
  norm_weight_ = read_norm_weight(node, kNormWeight, k);
  params_.type = type;
  params_.norm_weight = norm_weight_.empty() ? nullptr : norm_weight_.data();
  params_.eps = node.float_attribute("eps", 1e-5F);
  weights_ = cpu::LinearWeights::pack_int8(weight.as<std::int8_t>(), scale.as<float>(), n, k);
  release_pages(weight, weight.count());
}

void Int8LinearKernel::compute(const Context& context) const {
  compute_linear(context, *weights_, params_);
}

const OpSpec& int8_linear_spec() {
  static const OpSpec spec{"Int8Linear",
                           {{"x", "T", "[..., K]"},
                            {"weight", "tensor(int8)", "[N, K]"},
                            {"weight_scale", "tensor(float)", "[N]"},
                            {"norm_weight", "tensor(float)", "[K]", true}},
                           {{"y", "T", "[..., N]"}},
                           {{"eps", "float", "1e-05"}}};
  return spec;
}

}  // namespace tinylm::ort
