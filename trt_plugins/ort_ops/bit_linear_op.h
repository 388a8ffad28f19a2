/// @file bit_linear_op.h
/// Kernel of tinylm::BitLinear.
#pragma once

#include <memory>
#include <vector>

#include "bit_linear.h"
#include "custom_op.h"

namespace tinylm::ort {

class BitLinearKernel {
 public:
  /// Re-packs the weights, which must be constant.
  /// @throws std::exception Bad attributes, shapes or codes.
  BitLinearKernel(const NodeInfo& node, cpu::FloatType type);
  void compute(const Context& context) const;
  static const OpSpec& spec() { return bit_linear_spec(); }

 private:
  std::unique_ptr<cpu::LinearWeights> weights_;
  std::vector<float> norm_weight_;
  cpu::LinearParams params_;
};

/// Copies the constant [count] of an optional norm, or nothing if it is not given.
std::vector<float> read_norm_weight(const NodeInfo& node, std::size_t index, std::int64_t count);

/// Runs a linear layer on input 0 into output 0.
/// @throws std::exception The input's last dimension is not the layer's.
void compute_linear(const Context& context, const cpu::LinearWeights& weights,
                    cpu::LinearParams params);

}  // namespace tinylm::ort
