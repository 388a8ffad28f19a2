// What the kernels of a product share: quantised rows in memory, and which rows matter.
#pragma once

#include <algorithm>
#include <iterator>

#include "fragments.cuh"
#include "launch.cuh"
#include "product_plan.h"
#include "quantize_row.cuh"

namespace tinylm::cuda {

/// The order of quantised rows in memory, see fragments.cuh.
enum class RowLayout { kFragments, kSwizzled };

/// Whether the current GPU runs the kernels that are built for sm_90a.
inline bool is_hopper() {
#ifdef __CUDA_ARCH_LIST__
  constexpr int kBuilt[] = {__CUDA_ARCH_LIST__};
  constexpr int kHopper = 900;
  int major = 0;
  return std::find(std::begin(kBuilt), std::end(kBuilt), kHopper) != std::end(kBuilt) &&
         get_attribute(cudaDevAttrComputeCapabilityMajor, major) == cudaSuccess && major == 9;
#else
  return false;
#endif
}

/// Up to so many rows no product goes by wgmma.
inline constexpr std::int64_t kFewRows = 32;

/// The order that the product of m rows wants.
inline RowLayout row_layout(std::int64_t m) {
  return m > kFewRows && is_hopper() ? RowLayout::kSwizzled : RowLayout::kFragments;
}

/// Quantised rows in a workspace.
struct QuantizedRows {
  std::uint8_t* activations;  // digits, digit_bytes apart
  std::int64_t digit_bytes;
  float* s;   // [m]
  int* sums;  // [m]
  RowLayout layout;
  int row_blocks;  // of 8 rows
};

/// Cuts a workspace for m rows.
inline QuantizedRows cut_workspace(void* workspace, std::int64_t m, std::int64_t k,
                                   Activation activation, RowLayout layout) {
  const std::int64_t rows = round_up(m, 8);
  auto* memory = static_cast<std::uint8_t*>(workspace);
  QuantizedRows out{};
  out.activations = memory;
  out.digit_bytes = rows * round_up(k, kBlockInputs);
  memory += round_up(num_digits(activation) * out.digit_bytes, kAlignment);
  out.s = reinterpret_cast<float*>(memory);
  memory += round_up(rows * static_cast<std::int64_t>(sizeof(float)), kAlignment);
  out.sums = reinterpret_cast<int*>(memory);
  out.layout = layout;
  out.row_blocks = static_cast<int>(rows / 8);
  return out;
}
inline QuantizedRows cut_workspace(void* workspace, std::int64_t m, std::int64_t k,
                                   Activation activation) {
  return cut_workspace(workspace, m, k, activation, row_layout(m));
}

/// Rows that matter, where the rows are batches of `capacity` of which only the first lens[b] do.
struct RowLimits {
  const std::int32_t* past_lens = nullptr;  // [batches] or nullptr: every row
  const std::int32_t* seq_lens = nullptr;   // [batches]
  std::int64_t capacity = 1;
};

/// One product: m quantised rows with n packed outputs.
struct Product {
  QuantizedRows rows;
  const std::uint8_t* weight;
  std::int64_t m;
  std::int64_t k;
  RowLimits limits;
  const ProductPlan* plan = nullptr;  // or the best one
};

namespace detail {

/// Whether any row of [first, last) is among the first past + seq of its batch.
__device__ inline bool any_row(const RowLimits& limits, std::int64_t first, std::int64_t last) {
  if (limits.past_lens == nullptr) return true;
  for (std::int64_t b = first / limits.capacity; b * limits.capacity < last; ++b) {
    const std::int64_t begin = max(first, b * limits.capacity);
    if (begin < b * limits.capacity + limits.past_lens[b] + limits.seq_lens[b]) return true;
  }
  return false;
}

}  // namespace detail

}  // namespace tinylm::cuda
