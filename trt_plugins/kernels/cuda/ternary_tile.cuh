// Many rows: a thread block computes a tile of outputs x rows. Activations and packed weights come
// through shared memory in stages of 128 inputs by cp.async, in the order of the fragments.
#pragma once

#include "async_copy.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"
#include "product.cuh"

namespace tinylm::cuda {

/// Sizes of one variant: warps along outputs and rows, and each warp's fragments.
template <int kWarpsN_, int kWarpsM_, int kTilesN_, int kTilesM_, int kStages_, int kBlocks_>
struct TileShape {
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_;
  static constexpr int kTilesN = kTilesN_, kTilesM = kTilesM_;  // 16 outputs, 8 rows
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on one multiprocessor
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM;
  static constexpr int kOutputs = 16 * kWarpsN * kTilesN;
  static constexpr int kRows = 8 * kWarpsM * kTilesM;
  static constexpr int kActivationBytes = kRows / 8 * kActivationBlockBytes;
  static constexpr int kStageBytes = kActivationBytes + kOutputs / 16 * kWeightBlockBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

/// y = activations . weights for rows of blockIdx.x's tile and outputs of blockIdx.y's.
template <typename Shape, Activation kActivation, typename Y>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    ternary_tile(const std::uint8_t* activations, std::int64_t digit_bytes, RowScales scales,
                 const std::uint8_t* packed, int num_blocks, Output<Y> out, std::int64_t m,
                 RowLimits limits) {
  constexpr int kDigits = num_digits(kActivation);
  constexpr int kTilesN = Shape::kTilesN, kTilesM = Shape::kTilesM;
  extern __shared__ __align__(16) std::uint8_t stages[];
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * Shape::kRows;
  if (!detail::any_row(limits, first_row, min(first_row + Shape::kRows, m))) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % Shape::kWarpsN, warp_m = warp / Shape::kWarpsN;
  const std::int64_t first_tile_m = first_row / 8;
  const std::int64_t num_tiles_m = (m + 7) / 8;
  const std::int64_t num_tiles_n = (out.n + 15) / 16;
  const int first_tile_n = blockIdx.y * (Shape::kOutputs / 16);
  const int num_steps = kDigits * num_blocks;

  // Step i works on digit kDigits - 1 - i / num_blocks and block i % num_blocks.
  const auto copy_stage = [&](int step) {
    if (step < num_steps) {
      const int digit = kDigits - 1 - step / num_blocks, block = step % num_blocks;
      std::uint8_t* to = stages + step % Shape::kStages * Shape::kStageBytes;
      for (int i = 16 * threadIdx.x; i < Shape::kActivationBytes; i += 16 * Shape::kThreads) {
        const std::int64_t tile = first_tile_m + i / kActivationBlockBytes;
        const bool exists = tile < num_tiles_m;
        const std::uint8_t* from = activations + digit * digit_bytes +
                                   (tile * num_blocks + block) * kActivationBlockBytes +
                                   i % kActivationBlockBytes;
        detail::copy_async(to + i, exists ? from : activations, exists);
      }
      to += Shape::kActivationBytes;
      constexpr int kWeightBytes = Shape::kStageBytes - Shape::kActivationBytes;
      for (int i = 16 * threadIdx.x; i < kWeightBytes; i += 16 * Shape::kThreads) {
        const std::int64_t tile = first_tile_n + i / kWeightBlockBytes;
        const bool exists = tile < num_tiles_n;
        const std::uint8_t* from =
            packed + (tile * num_blocks + block) * kWeightBlockBytes + i % kWeightBlockBytes;
        detail::copy_async(to + i, exists ? from : packed, exists);
      }
    }
    detail::commit_copies();
  };
  for (int i = 0; i < Shape::kStages - 1; ++i) copy_stage(i);
  int acc[kTilesN][kTilesM][4] = {};
  for (int step = 0; step < num_steps; ++step) {
    if (kDigits > 1 && step > 0 && step % num_blocks == 0) {
      for (auto& row : acc) {
        for (auto& tile : row) {
          for (int& value : tile) value *= 256;
        }
      }
    }
    detail::wait_for_copies<Shape::kStages - 2>();
    __syncthreads();
    copy_stage(step + Shape::kStages - 1);
    const std::uint8_t* stage = stages + step % Shape::kStages * Shape::kStageBytes + lane * 16;
    uint4 words[kTilesN];
#pragma unroll
    for (int i = 0; i < kTilesN; ++i) {
      words[i] = *reinterpret_cast<const uint4*>(stage + Shape::kActivationBytes +
                                                 (warp_n * kTilesN + i) * kWeightBlockBytes);
    }
    stage += warp_m * kTilesM * kActivationBlockBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 rows[kTilesM];
#pragma unroll
      for (int j = 0; j < kTilesM; ++j) {
        rows[j] = *reinterpret_cast<const uint4*>(stage + j * kActivationBlockBytes + half * 512);
      }
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
        std::uint32_t first[4], second[4];
        unpack(half == 0 ? words[i].x : words[i].z, first);
        unpack(half == 0 ? words[i].y : words[i].w, second);
        // Two products of one sum side by side would wait for each other.
#pragma unroll
        for (int j = 0; j < kTilesM; ++j) mma(acc[i][j], first, rows[j].x, rows[j].y);
#pragma unroll
        for (int j = 0; j < kTilesM; ++j) mma(acc[i][j], second, rows[j].z, rows[j].w);
      }
    }
  }
  // Lanes hold eight outputs side by side of two rows.
  const int g = lane / 4, t = lane % 4;
  const int first_column = 16 * (first_tile_n + warp_n * kTilesN) + g;
  float weight_scale[2 * kTilesN];
#pragma unroll
  for (int i = 0; i < 2 * kTilesN; ++i) {
    const int column = first_column + 8 * i;
    weight_scale[i] = column < out.n ? column_scale(out, column) : 0.0F;
  }
#pragma unroll
  for (int j = 0; j < 2 * kTilesM; ++j) {
    const std::int64_t row = first_row + 8 * (warp_m * kTilesM + j / 2) + 2 * t + j % 2;
    if (row >= m) continue;
    const RowScale scale = {__ldg(scales.s + row), __ldg(scales.sums + row)};
    const RowOutput<Y> to(out, row, scale);
#pragma unroll
    for (int i = 0; i < 2 * kTilesN; ++i) {
      const int column = first_column + 8 * i;
      if (column < out.n) {
        to.template store<kActivation>(column, acc[i / 2][j / 2][2 * (i % 2) + j % 2],
                                       weight_scale[i]);
      }
    }
  }
}

}  // namespace tinylm::cuda
