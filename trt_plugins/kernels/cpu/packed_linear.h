/// @file packed_linear.h
/// What stands behind LinearWeights, for the kernels that share it.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "bit_linear.h"
#include "kernel_table.h"

namespace tinylm::cpu {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

/// Weights in the layout of kernel_table.h.
class PackedLinear final : public LinearWeights {
 public:
  PackedLinear(std::int64_t n, std::int64_t k, bool ternary, const float* scale);

  std::int64_t outputs() const override { return n_; }
  std::int64_t inputs() const override { return k_; }
  std::int64_t num_bytes() const override;

  bool ternary() const { return ternary_; }
  std::int64_t k_pad() const { return k_pad_; }
  std::int64_t num_blocks() const { return (n_ + kBlockRows - 1) / kBlockRows; }
  /// Bytes of 16 rows.
  std::int64_t block_bytes() const { return k_pad_ * (ternary_ ? 4 : 16); }
  /// What a row's sum of activations counts for too much: weights are stored plus this.
  std::int32_t offset() const { return ternary_ ? 1 : 128; }
  std::uint8_t* data() { return data_.get(); }
  const std::uint8_t* data() const { return data_.get(); }
  const float* scale() const { return scale_.data(); }
  const KernelTable& kernels() const { return *kernels_; }

  /// Stores a code plus 1.
  void set_code(std::int64_t row, std::int64_t column, std::uint8_t code);

  /// The product alone: integer sums of the outputs [first, last) of q [m, ldq].
  void dot(const DotParams& where, const Sink& sink) const;

 private:
  std::int64_t n_;
  std::int64_t k_;
  std::int64_t k_pad_;
  bool ternary_;
  std::unique_ptr<std::uint8_t[], FreeDeleter> data_;
  std::vector<float> scale_;
  const KernelTable* kernels_;
};

}  // namespace tinylm::cpu
