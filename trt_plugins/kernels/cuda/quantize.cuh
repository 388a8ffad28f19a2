// Kernels that bring rows into the order of fragments.cuh, one thread block a row.
#pragma once

#include "fragments.cuh"
#include "ternary_tile.cuh"

namespace tinylm::cuda {

inline constexpr int kQuantizeThreads = 256;

/// Quantised rows in a workspace.
struct QuantizedRows {
  std::uint8_t* activations;  // digits, digit_bytes apart
  std::int64_t digit_bytes;
  float* s;   // [m]
  int* sums;  // [m]
};

/// Cuts a workspace for m rows.
inline QuantizedRows cut_workspace(void* workspace, std::int64_t m, std::int64_t k,
                                   Activation activation) {
  const std::int64_t rows = round_up(m, 8);
  auto* memory = static_cast<std::uint8_t*>(workspace);
  QuantizedRows out{};
  out.activations = memory;
  out.digit_bytes = rows * round_up(k, kBlockInputs);
  memory += round_up(num_digits(activation) * out.digit_bytes, kAlignment);
  out.s = reinterpret_cast<float*>(memory);
  memory += round_up(rows * static_cast<std::int64_t>(sizeof(float)), kAlignment);
  out.sums = reinterpret_cast<int*>(memory);
  return out;
}

/// Gate, norm and quantise: kGroup threads a row. Shared memory: float [rows of a thread block][k].
template <int kGroup, Activation kActivation, typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows(RowSource<T> source, std::int64_t m, int num_blocks, QuantizedRows out) {
  extern __shared__ __align__(16) float row_memory[];
  const int group = threadIdx.x / kGroup;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kQuantizeThreads / kGroup) + group;
  if (row >= m) return;
  source.x += row * source.k * (source.gated ? 2 : 1);
  const RowScale scale = quantize_row<kGroup, kActivation>(
      source, row_memory + group * source.k, num_blocks * kBlockInputs,
      [&](int digit, int column, std::uint32_t word) {
        *reinterpret_cast<std::uint32_t*>(out.activations + digit * out.digit_bytes +
                                          activation_offset(row, column, num_blocks)) = word;
      });
  if (threadIdx.x % kGroup == 0) {
    out.s[row] = scale.s;
    out.sums[row] = scale.sum;
  }
}

inline constexpr int kArrangeThreads = 64;

/// Rows that are int8 already: q [m, k], and their multipliers s [m] or nullptr for 1.
/// Rows outside the limits are left out.
static __global__ void __launch_bounds__(kArrangeThreads)
    arrange_rows(const std::int8_t* q, const float* s, int k, int num_blocks, QuantizedRows out,
                 RowLimits limits) {
  const std::int64_t row = blockIdx.x;
  if (limits.past_lens != nullptr) {
    const std::int64_t b = row / limits.capacity;
    if (row % limits.capacity >= limits.past_lens[b] + limits.seq_lens[b]) return;
  }
  int sum = 0;
  for (int i = 4 * threadIdx.x; i < num_blocks * kBlockInputs; i += 4 * kArrangeThreads) {
    std::uint32_t word = 0;
    if (i < k) {
      word = *reinterpret_cast<const std::uint32_t*>(q + row * k + i);
      sum = __dp4a(static_cast<int>(word), 0x01010101, sum);
    }
    *reinterpret_cast<std::uint32_t*>(out.activations + activation_offset(row, i, num_blocks)) =
        word;
  }
  sum = detail::block_reduce<kArrangeThreads>(sum, [](int a, int b) { return a + b; });
  if (threadIdx.x == 0) {
    out.s[row] = s == nullptr ? 1.0F : s[row];
    out.sums[row] = sum;
  }
}

}  // namespace tinylm::cuda
