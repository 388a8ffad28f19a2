// Kernels that bring rows into the order of fragments.cuh, one thread block a row.
#pragma once

#include "async_copy.cuh"
#include "product.cuh"
#include "quantize_registers.cuh"

namespace tinylm::cuda {

inline constexpr int kQuantizeThreads = 256;

namespace detail {

/// Where four values of a row go.
__device__ inline std::uint8_t* quantized_word(const QuantizedRows& out, int digit,
                                               std::int64_t row, int column, int num_blocks) {
  const std::int64_t at = out.layout == RowLayout::kSwizzled
                              ? swizzled_offset(row, column, out.row_blocks)
                              : activation_offset(row, column, num_blocks);
  return out.activations + digit * out.digit_bytes + at;
}

}  // namespace detail

/// Gate, norm and quantise, a thread block a row; each walks over the rows. Threads hold
/// 4 * kVectors values each and fetch a row while they work on the one before.
/// @tparam kBlocks Thread blocks that a multiprocessor has at once.
/// @tparam kRaw Whether e4m3 values are written as they are, not as digits.
template <int kThreads, int kVectors, int kBlocks, bool kGated, Activation kActivation, bool kRaw,
          typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    quantize_rows(RowSource<T> source, std::int64_t m, int num_blocks, QuantizedRows out) {
  using Row = RegisterRow<kThreads, kVectors, T, (kVectors < 4), kGated>;
  __shared__ typename RowReduction<kThreads>::Memory memory;
  launch_next_kernel();
  const int thread = static_cast<int>(threadIdx.x);
  RowReduction<kThreads> reduce{&memory};
  std::int64_t row = blockIdx.x;
  const std::int64_t vector_bytes =
      4 * kThreads / kBlockInputs * kActivationBlockBytes *
      static_cast<std::int64_t>(out.layout == RowLayout::kSwizzled ? out.row_blocks : 1);
  Row values;
  values.load_weights(source, thread);
  wait_for_previous_kernel();
  typename Row::RawRow raw;
  if (row < m) Row::load(raw, source, row, thread);
  while (row < m) {
    values.take(raw, source);
    const std::int64_t next = row + gridDim.x;
    if (next < m) Row::load(raw, source, next, thread);
    const float s = values.template scale<kActivation>(source, reduce, thread);
    // A thread's vectors are 4 * kThreads columns apart, whole blocks.
    std::uint8_t* first = detail::quantized_word(out, 0, row, 4 * thread, num_blocks);
    const int sum = values.template quantize<kActivation, kRaw>(
        s, thread, num_blocks * kBlockInputs, [&](int digit, int vector, std::uint32_t word) {
          *reinterpret_cast<std::uint32_t*>(first + digit * out.digit_bytes +
                                            vector * vector_bytes) = word;
        });
    reduce.leave_sum(sum);
    __syncthreads();
    if (thread == 0) {
      out.s[row] = s;
      out.sums[row] = reduce.row_sum();
    }
    row = next;
  }
}

/// The same for rows of any length. Shared memory: float [k].
template <Activation kActivation, bool kRaw, typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_long_rows(RowSource<T> source, int num_blocks, QuantizedRows out) {
  extern __shared__ __align__(16) float row_memory[];
  launch_next_kernel();
  wait_for_previous_kernel();
  const std::int64_t row = blockIdx.x;
  source.x += row * source.k * (source.gated ? 2 : 1);
  const RowScale scale = quantize_row<kQuantizeThreads, kActivation, kRaw>(
      source, row_memory, num_blocks * kBlockInputs,
      [&](int digit, int column, std::uint32_t word) {
        *reinterpret_cast<std::uint32_t*>(
            detail::quantized_word(out, digit, row, column, num_blocks)) = word;
      });
  if (threadIdx.x == 0) {
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
  launch_next_kernel();
  wait_for_previous_kernel();
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
    *reinterpret_cast<std::uint32_t*>(detail::quantized_word(out, 0, row, i, num_blocks)) = word;
  }
  sum = detail::block_reduce<kArrangeThreads>(sum, [](int a, int b) { return a + b; });
  if (threadIdx.x == 0) {
    out.s[row] = s == nullptr ? 1.0F : s[row];
    out.sums[row] = sum;
  }
}

}  // namespace tinylm::cuda
