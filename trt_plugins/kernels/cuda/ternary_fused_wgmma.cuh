// Up to some hundred rows of few inputs: norm, quantiser and product in one launch, by wgmma. A
// cluster of eight thread blocks shares 64 rows; each multiplies up to four tiles of 64 outputs,
// whose warpgroups share the tiles and K.
#pragma once

#include "fused_rows.cuh"
#include "ternary_fused_mma.cuh"
#include "wgmma_epilogue.cuh"

namespace tinylm::cuda {

inline constexpr int kFusedRowBlocks = 8;
inline constexpr int kFusedRows = 8 * kFusedRowBlocks;

struct FusedWgmmaMemory {
  FusedMemory<kFusedRowBlocks> rows;
  uint4 transpose[kFusedWarps][1][32];
  RowFactors factors[kFusedRows];
};

/// Dynamic shared memory: the rows, later the warpgroups' parts.
template <Activation kActivation>
std::int64_t fused_wgmma_bytes(int num_blocks) {
  constexpr std::int64_t kPartsBytes = kFusedThreads * kFusedRows / 2 * 4;
  return std::max(kPartsBytes, std::int64_t{kFusedRowBlocks} *
                                   row_block_bytes<kActivation, true>(num_blocks));
}

/// Clusters of eight thread blocks. Grid: outputs x groups of 64 rows.
template <int kVectors, Activation kActivation, typename T>
__global__ void __launch_bounds__(kFusedThreads, 1)
    ternary_fused_wgmma(const __grid_constant__ RowSource<T> source, int m, FusedWeights weights,
                        const __grid_constant__ Output<T> out) {
#ifdef TINYLM_HOPPER
  using Sum = detail::WgmmaSum<kActivation>;
  extern __shared__ __align__(1024) std::uint8_t fused_memory[];
  __shared__ FusedWgmmaMemory memory;
  launch_next_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kFusedRows;
  FusedRows<kFusedRowBlocks, kVectors, kActivation, true, T> rows(
      source, first_row, m, weights.num_blocks, memory.rows, fused_memory);
  rows.begin();
  const int my_tile = warp / 4 / weights.k_parts, part = warp / 4 % weights.k_parts;
  const int tile = blockIdx.x * weights.tiles_per_block + my_tile;
  const int first_block = weights.num_blocks * part / weights.k_parts;
  const int my_blocks = tile < weights.num_tiles
                            ? weights.num_blocks * (part + 1) / weights.k_parts - first_block
                            : 0;
  // What lies beyond the last output is not stored.
  const int first_column = tile * 64 + warp % 4 * 16;
  const int weight_row = min(first_column / 16, static_cast<int>((out.n + 15) / 16) - 1);
  const std::uint8_t* packed =
      weights.packed + lane * 16 +
      (static_cast<std::int64_t>(weight_row) * weights.num_blocks + first_block) *
          kWeightBlockBytes;
  uint4 ahead[kFusedAhead];
#pragma unroll
  for (int i = 0; i < kFusedAhead; ++i) {
    if (i < my_blocks) ahead[i] = load_weights(packed + i * kWeightBlockBytes);
  }
  float weight_scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = first_column + lane / 4 + 8 * half;
    weight_scale[half] = column < out.n ? column_scale(out, column) : 0.0F;
  }
  wait_for_previous_kernel();
  rows.quantize();
  if (threadIdx.x < kFusedRows && static_cast<int>(threadIdx.x) < rows.num_rows()) {
    const FusedScale scale = rows.scale(threadIdx.x);
    memory.factors[threadIdx.x] = {scale.s, 1.0F / scale.s, kFloatBiasBits - scale.sum};
  }

  Sum acc[kFusedRows / 2] = {};
  // Half a block is unpacked while the half before it is multiplied.
  std::uint32_t codes[2][2][4];
  const std::uint64_t first =
      swizzled_rows(fused_memory + first_block * kActivationBlockBytes, rows.block_bytes());
  for (int i = 0; i < my_blocks; i += kFusedAhead) {
#pragma unroll
    for (int j = 0; j < kFusedAhead; ++j) {
      if (i + j >= my_blocks) break;
      const uint4 words = ahead[j];
      if (i + j + kFusedAhead < my_blocks) {
        ahead[j] = load_weights(packed + (i + j + kFusedAhead) * kWeightBlockBytes);
      }
      const std::uint64_t block = first + static_cast<std::uint64_t>(i + j) * (1024 / 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        detail::unpack_wgmma<kActivation>(half == 0 ? words.x : words.z, codes[half][0]);
        detail::unpack_wgmma<kActivation>(half == 0 ? words.y : words.w, codes[half][1]);
        wgmma_fence();
        wgmma(acc, codes[half][0], block + 4 * half, 1);
        wgmma(acc, codes[half][1], block + 4 * half + 2, 1);
        wgmma_commit();
        wgmma_wait<1>();
      }
    }
  }
  wgmma_wait<0>();

  auto* parts = reinterpret_cast<uint4*>(fused_memory);
  if (weights.k_parts > 1) {
    // The parts lie where the rows were, which nobody reads any more.
    __syncthreads();
    rows.end();
#pragma unroll
    for (int x = 0; x < kFusedRows / 8; ++x) {
      memcpy(parts + x * kFusedThreads + threadIdx.x, &acc[4 * x], 16);
    }
  }
  __syncthreads();
#pragma unroll
  for (int chunk = 0; chunk < kFusedRows / 16; ++chunk) {
    if (chunk % weights.k_parts != part || 16 * chunk >= rows.num_rows() || my_blocks == 0) continue;
    Sum sums[8];
    if (weights.k_parts == 1) {
#pragma unroll
      for (int x = 0; x < 8; ++x) sums[x] = acc[8 * chunk + x];
    } else {
#pragma unroll
      for (int x = 0; x < 8; ++x) sums[x] = 0;
      for (int i = 0; i < weights.k_parts; ++i) {
        const int thread = (my_tile * weights.k_parts + i) * 128 + threadIdx.x % 128;
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          Sum values[4];
          memcpy(values, parts + (2 * chunk + x) * kFusedThreads + thread, 16);
#pragma unroll
          for (int y = 0; y < 4; ++y) sums[4 * x + y] += values[y];
        }
      }
    }
    detail::store_rows<1, kActivation, T>(sums, memory.factors + 16 * chunk, weight_scale,
                                          first_row + 16 * chunk, first_column, m, out,
                                          memory.transpose[warp]);
  }
  if (weights.k_parts == 1) rows.end();
#endif
}

}  // namespace tinylm::cuda
