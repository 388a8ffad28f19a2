// Few rows: one thread block for 16 outputs, its warps share K. Sums are integers, so
// the order in which the warps' parts are added does not matter.
#pragma once

#include "async_copy.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"

namespace tinylm::cuda {

inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvThreads = 32 * kGemvWarps;
// Blocks of 128 inputs whose weights a warp loads before it waits for the activations.
inline constexpr int kGemvPrefetch = 4;
// Words between the sums of neighbouring rows: 16, and 4 so that a warp's stores meet no bank
// twice.
inline constexpr int kGemvPitch = 20;

struct GemvWeights {
  const std::uint8_t* packed;
  int num_blocks;  // K / 128, rounded up
};

namespace detail {

/// Adds one block of 128 inputs of kTiles times 8 rows. b(tile, half) gives four words.
template <int kTiles, typename Load>
__device__ inline void add_block(int (&acc)[kTiles][2][4], uint4 weights, Load b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t first[4], second[4];
    mask_codes(half == 0 ? weights.x : weights.z, half == 0 ? weights.y : weights.w, first, second);
    uint4 rows[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) rows[tile] = b(tile, half);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) mma_masked(acc[tile], first, second, rows[tile]);
  }
}

/// Sums the blocks of one warp, digit by digit: sums = sums * 256 + digit's sum (Horner).
/// load_b(digit, block, tile, half) gives the activations.
template <int kTiles, int kDigits, typename Load>
__device__ inline void sum_blocks(int (&sums)[kTiles][4], const std::uint8_t* weights,
                                  int num_blocks, const uint4 (&prefetched)[kGemvPrefetch],
                                  Load load_b) {
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    int acc[kTiles][2][4] = {};
#pragma unroll
    for (int i = 0; i < kGemvPrefetch; ++i) {
      const int block = warp + i * kGemvWarps;
      if (block < num_blocks) {
        add_block<kTiles>(acc, prefetched[i],
                          [&](int tile, int half) { return load_b(digit, block, tile, half); });
      }
    }
    for (int block = warp + kGemvPrefetch * kGemvWarps; block < num_blocks; block += kGemvWarps) {
      const uint4 words = load_weights(weights + block * kWeightBlockBytes);
      add_block<kTiles>(acc, words,
                        [&](int tile, int half) { return load_b(digit, block, tile, half); });
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] = sums[tile][i] * 256 + joined_sum(acc[tile], i);
    }
  }
}

__device__ inline void prefetch_weights(uint4 (&words)[kGemvPrefetch], const std::uint8_t* weights,
                                        int num_blocks) {
#pragma unroll
  for (int i = 0; i < kGemvPrefetch; ++i) {
    const int block = threadIdx.x / 32 + i * kGemvWarps;
    if (block < num_blocks) words[i] = load_weights(weights + block * kWeightBlockBytes);
  }
}

/// The weights of this thread block's 16 outputs, at this lane's words.
__device__ inline const std::uint8_t* lane_weights(const GemvWeights& weights) {
  return weights.packed +
         static_cast<std::int64_t>(blockIdx.x) * weights.num_blocks * kWeightBlockBytes +
         threadIdx.x % 32 * 16;
}

/// Leaves every warp's part in parts[warp][row][output].
template <int kTiles>
__device__ inline void keep_parts(const int (&acc)[kTiles][4],
                                  int (*parts)[8 * kTiles][kGemvPitch]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int i = 0; i < 4; ++i) parts[warp][8 * tile + 2 * t + i % 2][g + i / 2 * 8] = acc[tile][i];
  }
}

}  // namespace detail

/// Rows that are quantised already, 8 * kTiles a thread block. Grid: outputs / 16 x groups of rows.
/// @param activations In the order of fragments.cuh; digit_bytes apart.
template <Activation kActivation, int kTiles, typename Y>
__global__ void __launch_bounds__(kGemvThreads)
    ternary_gemv(const std::uint8_t* activations, std::int64_t digit_bytes, RowScales scales,
                 GemvWeights weights, Output<Y> out, int m) {
  __shared__ int parts[kGemvWarps][8 * kTiles][kGemvPitch];
  uint4 words[kGemvPrefetch];
  const std::uint8_t* packed = detail::lane_weights(weights);
  launch_next_kernel();
  detail::prefetch_weights(words, packed, weights.num_blocks);
  wait_for_previous_kernel();
  int acc[kTiles][4] = {};
  const int first_row = blockIdx.y * 8 * kTiles;
  const int num_rows = min(8 * kTiles, m - first_row);
  const int num_tiles = (num_rows + 7) / 8;
  detail::sum_blocks<kTiles, num_digits(kActivation)>(
      acc, packed, weights.num_blocks, words, [&](int digit, int block, int tile, int half) {
        if (tile >= num_tiles) return make_uint4(0, 0, 0, 0);
        const std::int64_t at =
            static_cast<std::int64_t>(first_row / 8 + tile) * weights.num_blocks + block;
        return *reinterpret_cast<const uint4*>(activations + digit * digit_bytes +
                                               at * kActivationBlockBytes + half * 512 +
                                               threadIdx.x % 32 * 16);
      });
  detail::keep_parts<kTiles>(acc, parts);
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * num_rows; i += kGemvThreads) {
    const int row = first_row + i / 16, column = blockIdx.x * 16 + i % 16;
    if (column >= out.n) continue;
    int sum = 0;
    for (int warp = 0; warp < kGemvWarps; ++warp) sum += parts[warp][i / 16][i % 16];
    RowOutput<Y>(out, row, {scales.s[row], scales.sums[row]})
        .template store<kActivation>(column, sum, column_scale(out, column));
  }
}

}  // namespace tinylm::cuda
