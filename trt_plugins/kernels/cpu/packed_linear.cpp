#include "packed_linear.h"

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "workspace.h"

namespace tinylm::cpu {
namespace {

void check_sizes(std::int64_t n, std::int64_t k) {
  if (n < 1) {
    throw std::invalid_argument("a linear layer needs at least 1 output, found " +
                                std::to_string(n) + ".");
  }
  if (k < 1 || k > kMaxInputs) {
    throw std::invalid_argument("a linear layer takes 1 to " + std::to_string(kMaxInputs) +
                                " inputs, found " + std::to_string(k) + ".");
  }
}

}  // namespace

PackedLinear::PackedLinear(std::int64_t n, std::int64_t k, bool ternary, const float* scale)
    : n_(n),
      k_(k),
      k_pad_(round_up(k, kInputAlign)),
      ternary_(ternary),
      scale_(scale, scale + n),
      kernels_(&kernel_table(active_isa())) {
  const std::size_t bytes = static_cast<std::size_t>(num_blocks() * block_bytes());
  data_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(64, bytes)));
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(data_.get(), 0, bytes);
}

std::int64_t PackedLinear::num_bytes() const {
  return num_blocks() * block_bytes() + n_ * static_cast<std::int64_t>(sizeof(float));
}

void PackedLinear::set_code(std::int64_t row, std::int64_t column, std::uint8_t code) {
  const std::int64_t in_group = column % 16;
  std::uint8_t* group = data_.get() + row / kBlockRows * block_bytes() + column / 16 * kGroupBytes;
  group[row % kBlockRows * 4 + in_group % 4] |=
      static_cast<std::uint8_t>(code << (2 * (in_group / 4)));
}

InvalidCode find_invalid_code(const std::uint8_t* packed, std::int64_t rows, std::int64_t columns) {
  const std::int64_t bytes = columns / 4;
  for (std::int64_t i = 0; i < rows * bytes; ++i) {
    const unsigned both = packed[i] & (packed[i] >> 1) & 0x55U;
    if (both == 0) continue;
    std::int64_t lane = 0;
    while ((both >> (2 * lane) & 1U) == 0) ++lane;
    return {true, i / bytes, i % bytes * 4 + lane};
  }
  return {};
}

std::unique_ptr<LinearWeights> LinearWeights::pack_ternary(const std::uint8_t* packed,
                                                           const float* scale, std::int64_t n,
                                                           std::int64_t k) {
  check_sizes(n, k);
  if (k % 4 != 0) {
    throw std::invalid_argument("packed weights need a multiple of 4 inputs, found " +
                                std::to_string(k) + ".");
  }
  const InvalidCode invalid = find_invalid_code(packed, n, k);
  if (invalid.found) {
    throw std::invalid_argument("code 3 at row " + std::to_string(invalid.row) + ", column " +
                                std::to_string(invalid.column) +
                                "; codes are 0, 1 or 2. The file is damaged or was packed by "
                                "something else: export the model again.");
  }
  auto weights = std::make_unique<PackedLinear>(n, k, true, scale);
  for (std::int64_t row = 0; row < n; ++row) {
    std::uint8_t* block = weights->data() + row / kBlockRows * weights->block_bytes();
    for (std::int64_t byte = 0; byte < k / 4; ++byte) {
      const std::uint8_t four = packed[row * (k / 4) + byte];
      // Inputs 4 * byte and up: group byte / 4, lane byte % 4, one of them in each of four bytes.
      std::uint8_t* out = block + byte / 4 * kGroupBytes + row % kBlockRows * 4;
      for (int j = 0; j < 4; ++j) {
        out[j] |= static_cast<std::uint8_t>((four >> (2 * j) & 3) << (2 * (byte % 4)));
      }
    }
  }
  return weights;
}

std::unique_ptr<LinearWeights> LinearWeights::pack_int8(const std::int8_t* weight,
                                                        const float* scale, std::int64_t n,
                                                        std::int64_t k) {
  check_sizes(n, k);
  auto weights = std::make_unique<PackedLinear>(n, k, false, scale);
  for (std::int64_t row = 0; row < n; ++row) {
    std::uint8_t* block = weights->data() + row / kBlockRows * weights->block_bytes();
    for (std::int64_t i = 0; i < k; ++i) {
      const int value = weight[row * k + i];
      if (value == -128) {
        throw std::invalid_argument("weight -128 at row " + std::to_string(row) + ", column " +
                                    std::to_string(i) + "; int8 weights are -127 to 127.");
      }
      block[i / 4 * kGroupBytes + row % kBlockRows * 4 + i % 4] =
          static_cast<std::uint8_t>(value + 128);
    }
  }
  return weights;
}

void PackedLinear::dot(const DotParams& where, const Sink& sink) const {
  DotParams p = where;
  p.weights = data();
  p.k_pad = k_pad_;
  p.panel = scratch_of<std::int8_t>(Scratch::kPanel, panel_bytes(k_pad_));
  (ternary_ ? kernels_->dot_ternary : kernels_->dot_int8)(p, sink);
}

}  // namespace tinylm::cpu
