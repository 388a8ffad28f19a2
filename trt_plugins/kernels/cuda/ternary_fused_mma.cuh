// 2 to 16 rows: norm, quantiser and product in one launch, by mma.sync. A thread block multiplies up
// to 16 tiles of 16 outputs; its warps share the tiles and K.
#pragma once

#include "epilogue.cuh"
#include "fused_rows.cuh"

namespace tinylm::cuda {

/// How outputs and K are shared.
struct FusedWeights {
  const std::uint8_t* packed;
  int num_blocks;       // K / 128, rounded up
  int num_tiles;        // of outputs
  int tiles_per_block;  // of a thread block
  int k_parts;          // warps, or warpgroups, that share a tile; times tiles_per_block: all
};

/// Blocks of 128 inputs whose weights a warp has on their way.
inline constexpr int kFusedAhead = 4;

#ifdef TINYLM_HOPPER

namespace detail {

/// The B fragments of 8 rows for inputs 64 half ... 64 half + 63 of a block.
__device__ inline void load_rows(std::uint32_t (&b)[4], const std::uint8_t* block, int half) {
  const int lane = threadIdx.x % 32, row = lane % 8, chunk = 4 * half + lane / 8;
  const std::uint32_t address =
      tinylm::cuda::shared_address(block) + row * kBlockInputs + (chunk ^ row) * 16;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address));
}

/// Adds one block of 128 inputs; two sums each, which don't wait for one another.
template <int kRowBlocks>
__device__ inline void add_fused_block(int (&acc)[kRowBlocks][2][4], uint4 weights,
                                       const std::uint8_t* block, int block_bytes) {
  const std::uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t first[4], second[4];
    unpack(words[2 * half], first);
    unpack(words[2 * half + 1], second);
#pragma unroll
    for (int rows = 0; rows < kRowBlocks; ++rows) {
      std::uint32_t b[4];
      load_rows(b, block + rows * block_bytes, half);
      mma(acc[rows][0], first, b[0], b[1]);
      mma(acc[rows][1], second, b[2], b[3]);
    }
  }
}

}  // namespace detail

#endif  // TINYLM_HOPPER

template <int kRowBlocks>
struct FusedMmaMemory {
  FusedMemory<kRowBlocks> rows;
  float column_scales[kFusedWarps * 16];
  int parts[kFusedWarps][8 * kRowBlocks][16];
};

/// Clusters of kRowBlocks thread blocks. Dynamic shared memory: the rows, kRowBlocks times
/// row_block_bytes().
template <int kRowBlocks, int kVectors, Activation kActivation, typename T>
__global__ void __launch_bounds__(kFusedThreads, kVectors <= 4 ? 2 : 1)
    ternary_fused_mma(const __grid_constant__ RowSource<T> source, int m, FusedWeights weights,
                      Output<T> out) {
#ifdef TINYLM_HOPPER
  extern __shared__ __align__(1024) std::uint8_t fused_memory[];
  __shared__ FusedMmaMemory<kRowBlocks> memory;
  constexpr int kDigits = num_digits(kActivation);
  launch_next_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  FusedRows<kRowBlocks, kVectors, kActivation, false, T> rows(source, 0, m, weights.num_blocks,
                                                              memory.rows, fused_memory);
  rows.begin();
  const int first_tile = blockIdx.x * weights.tiles_per_block;
  const int num_tiles = max(0, min(weights.tiles_per_block, weights.num_tiles - first_tile));
  const int my_tile = warp / weights.k_parts, part = warp % weights.k_parts;
  const int first_block = weights.num_blocks * part / weights.k_parts;
  const int my_blocks =
      my_tile < num_tiles ? weights.num_blocks * (part + 1) / weights.k_parts - first_block : 0;
  const std::uint8_t* packed =
      weights.packed + lane * 16 +
      (static_cast<std::int64_t>(first_tile + my_tile) * weights.num_blocks + first_block) *
          kWeightBlockBytes;
  uint4 ahead[kFusedAhead];
#pragma unroll
  for (int i = 0; i < kFusedAhead; ++i) {
    if (i < my_blocks) ahead[i] = load_weights(packed + i * kWeightBlockBytes);
  }
  if (static_cast<int>(threadIdx.x) < 16 * num_tiles) {
    const int column = first_tile * 16 + static_cast<int>(threadIdx.x);
    memory.column_scales[threadIdx.x] = column < out.n ? column_scale(out, column) : 0.0F;
  }
  wait_for_previous_kernel();
  rows.quantize();

  const int block_bytes = rows.block_bytes();
  const std::uint8_t* at = fused_memory + first_block * kActivationBlockBytes;
  int acc[kRowBlocks][2][4] = {};
#pragma unroll
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    const std::uint8_t* q = at + digit * weights.num_blocks * kActivationBlockBytes;
#pragma unroll
    for (int i = 0; i < kFusedAhead; ++i) {
      if (i < my_blocks) {
        detail::add_fused_block(acc, ahead[i], q + i * kActivationBlockBytes, block_bytes);
      }
    }
    for (int i = kFusedAhead; i < my_blocks; ++i) {
      detail::add_fused_block(acc, load_weights(packed + i * kWeightBlockBytes),
                              q + i * kActivationBlockBytes, block_bytes);
    }
    if (digit > 0) {
#pragma unroll
      for (int i = 0; i < kRowBlocks * 8; ++i) acc[i / 8][i / 4 % 2][i % 4] *= 256;
    }
  }
#pragma unroll
  for (int i = 0; i < kRowBlocks * 4; ++i) {
    const int row = 8 * (i / 4) + 2 * t + i % 2, output = g + i / 2 % 2 * 8;
    memory.parts[warp][row][output] = acc[i / 4][0][i % 4] + acc[i / 4][1][i % 4];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * num_tiles * rows.num_rows(); i += kFusedThreads) {
    const int in_block = i % (16 * num_tiles), row = i / (16 * num_tiles);
    const int column = first_tile * 16 + in_block;
    if (column >= out.n) continue;
    int sum = 0;
    for (int j = 0; j < weights.k_parts; ++j) {
      sum += memory.parts[in_block / 16 * weights.k_parts + j][row][in_block % 16];
    }
    const FusedScale scale = rows.scale(row);
    RowOutput<T>(out, row, {scale.s, scale.sum})
        .template store<kActivation>(column, sum, memory.column_scales[in_block]);
  }
  rows.end();
#endif
}

}  // namespace tinylm::cuda
