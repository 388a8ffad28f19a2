// 2 to 4 rows of few inputs: norm, quantiser and product in one launch. Every thread block
// quantises all rows for itself, 128 threads a row; its warps share tiles of 16 outputs, and K.
#pragma once

#include "async_copy.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"
#include "quantize_registers.cuh"

namespace tinylm::cuda {

inline constexpr int kRowsThreads = 512;
inline constexpr int kRowsWarps = kRowsThreads / 32;
inline constexpr int kMostGemvRows = 4;
inline constexpr int kThreadsPerRow = kRowsThreads / kMostGemvRows;
inline constexpr int kRowsVectors = 2;  // of four values, of a thread
inline constexpr int kMostRowsInputs = 4 * kThreadsPerRow * kRowsVectors;

/// How outputs and K are shared.
struct RowsWeights {
  const std::uint8_t* packed;
  int num_blocks;       // K / 128, rounded up
  int num_tiles;        // N / 16, rounded up
  int tiles_per_block;  // of a thread block, at most kRowsWarps
  int k_parts;          // warps that share a tile
};

namespace detail {

/// Adds one block of 128 inputs; `rows` is in the order of the B fragments (fragments.cuh).
__device__ inline void add_rows_block(int (&acc)[2][4], uint4 words, const std::uint8_t* rows) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t first[4], second[4];
    mask_codes(half == 0 ? words.x : words.z, half == 0 ? words.y : words.w, first, second);
    mma_masked(acc, first, second, *reinterpret_cast<const uint4*>(rows + half * 512));
  }
}

}  // namespace detail

/// Bytes of dynamic shared memory: the quantised rows.
template <Activation kActivation>
std::int64_t rows_shared_bytes(int num_blocks) {
  return std::int64_t{num_digits(kActivation)} * num_blocks * kActivationBlockBytes;
}

/// Grid: num_tiles / tiles_per_block, rounded up.
template <Activation kActivation, typename T>
__global__ void __launch_bounds__(kRowsThreads, 2)
    ternary_gemv_rows(RowSource<T> source, int m, RowsWeights weights, Output<T> out) {
  constexpr int kDigits = num_digits(kActivation), kAhead = 4;
  using Row = RegisterRow<kThreadsPerRow, kRowsVectors, T>;
  using Reduction = RowReduction<kThreadsPerRow, true>;
  extern __shared__ __align__(16) std::uint8_t q[];  // [digit][K/128] blocks of 1024 bytes
  __shared__ typename Reduction::Memory reductions[kMostGemvRows];
  __shared__ RowScale scales[kMostGemvRows];
  __shared__ float column_scales[kRowsWarps * 16];
  __shared__ int parts[kRowsWarps][8][16];  // half of the rows are nobody's
  launch_next_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_tile = blockIdx.x * weights.tiles_per_block;
  const int num_tiles = min(weights.tiles_per_block, weights.num_tiles - first_tile);
  const int my_tile = warp / weights.k_parts, part = warp % weights.k_parts;
  const int first_block = weights.num_blocks * part / weights.k_parts;
  const int my_blocks =
      my_tile < num_tiles ? weights.num_blocks * (part + 1) / weights.k_parts - first_block : 0;
  const std::uint8_t* packed =
      weights.packed + lane * 16 +
      (static_cast<std::int64_t>(first_tile + my_tile) * weights.num_blocks + first_block) *
          kWeightBlockBytes;
  uint4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < my_blocks) ahead[i] = load_weights(packed + i * kWeightBlockBytes);
  }
  if (static_cast<int>(threadIdx.x) < 16 * num_tiles) {
    const int column = first_tile * 16 + static_cast<int>(threadIdx.x);
    column_scales[threadIdx.x] = column < out.n ? column_scale(out, column) : 0.0F;
  }

  const int my_row = threadIdx.x / kThreadsPerRow, thread = threadIdx.x % kThreadsPerRow;
  Row row;
  row.load_weights(source, thread);
  wait_for_previous_kernel();
  if (my_row < m) {
    Reduction reduce{&reductions[my_row]};
    typename Row::RawRow raw;
    Row::load(raw, source, my_row, thread);
    row.take(raw, source);
    const float s = row.template scale<kActivation>(source, reduce, thread);
    // A thread's vectors are 512 columns apart, four blocks.
    std::uint8_t* to = q + activation_offset(my_row, 4 * thread, weights.num_blocks);
    const int sum = row.template quantize<kActivation, false>(
        s, thread, weights.num_blocks * kBlockInputs,
        [&](int digit, int vector, std::uint32_t word) {
          *reinterpret_cast<std::uint32_t*>(to + (digit * weights.num_blocks + 4 * vector) *
                                                     kActivationBlockBytes) = word;
        });
    reduce.leave_sum(sum);
    reduce.sync();
    if (thread == 0) scales[my_row] = {s, reduce.row_sum()};
  }
  __syncthreads();

  const std::uint8_t* rows = q + first_block * kActivationBlockBytes + lane * 16;
  int sums[4] = {};
#pragma unroll
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    const std::uint8_t* at = rows + digit * weights.num_blocks * kActivationBlockBytes;
    int acc[2][4] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < my_blocks) detail::add_rows_block(acc, ahead[i], at + i * kActivationBlockBytes);
    }
    for (int i = kAhead; i < my_blocks; ++i) {
      detail::add_rows_block(acc, load_weights(packed + i * kWeightBlockBytes),
                             at + i * kActivationBlockBytes);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = sums[i] * 256 + joined_sum(acc, i);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[warp][2 * t + i % 2][g + i / 2 * 8] = sums[i];
  __syncthreads();
  if (my_row >= m) return;
  for (int in_block = thread; in_block < 16 * num_tiles; in_block += kThreadsPerRow) {
    const int column = first_tile * 16 + in_block;
    if (column >= out.n) continue;
    int sum = 0;
    for (int j = 0; j < weights.k_parts; ++j) {
      sum += parts[in_block / 16 * weights.k_parts + j][my_row][in_block % 16];
    }
    RowOutput<T>(out, my_row, scales[my_row])
        .template store<kActivation>(column, sum, column_scales[in_block]);
  }
}

}  // namespace tinylm::cuda
