/// @file int8_linear_op.h
/// Kernel of tinylm::Int8Linear.
#pragma once

#include <memory>
#include <vector>

#include "bit_linear.h"
#include "custom_op.h"

namespace tinylm::ort {

class Int8LinearKernel {
 public:
  /// Re-packs the weights, which must be constant.
  /// @throws std::exception Bad shapes or weights.
  Int8LinearKernel(const NodeInfo& node, cpu::FloatType type);
  void compute(const Context& context) const;
  static const OpSpec& spec() { return int8_linear_spec(); }

 private:
  std::unique_ptr<cpu::LinearWeights> weights_;
  std::vector<float> norm_weight_;
  cpu::LinearParams params_;
};

}  // namespace tinylm::ort
