// One row: norm, quantiser and product in one launch. Every thread block quantises the row for
// itself, while the weights of its outputs are already on their way into shared memory; each lane
// fetches what it will multiply, so that nobody waits for another's copies.
#pragma once

#include "async_copy.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"
#include "quantize_registers.cuh"

namespace tinylm::cuda {

/// Sizes of one variant: a row of up to 4 * kThreads * kVectors inputs.
template <int kThreads_, int kVectors_, int kSlots_>
struct RowShape {
  static constexpr int kThreads = kThreads_, kVectors = kVectors_;
  static constexpr int kSlots = kSlots_;  // blocks of weights on their way to a warp
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMostInputs = 4 * kThreads * kVectors;
  /// 16 outputs each, of one thread block; each output has a thread in the end. Few slots are for
  /// GPUs with little shared memory.
  static constexpr int kMostTiles = kSlots < 16 ? 8 : kThreads / 16;
};

struct RowWeights {
  const std::uint8_t* packed;
  int num_blocks;       // K / 128, rounded up
  int num_tiles;        // N / 16, rounded up
  int tiles_per_block;  // of a thread block
};

/// Shared memory: the slots, then the warps' parts int [tiles_per_block][kWarps][16], then the
/// quantised row [digits][K padded].
template <typename Shape, Activation kActivation>
std::int64_t row_shared_bytes(const RowWeights& weights) {
  return Shape::kWarps * Shape::kSlots * kWeightBlockBytes +
         weights.tiles_per_block * Shape::kWarps * 16 * 4 +
         num_digits(kActivation) * weights.num_blocks * kBlockInputs;
}

/// Grid: num_tiles / tiles_per_block, rounded up.
template <typename Shape, Activation kActivation, typename T>
__global__ void __launch_bounds__(Shape::kThreads)
    ternary_gemv_row(RowSource<T> source, RowWeights weights, Output<T> out) {
  constexpr int kDigits = num_digits(kActivation), kWarps = Shape::kWarps;
  extern __shared__ __align__(16) std::uint8_t gemv_memory[];
  __shared__ typename RowReduction<Shape::kThreads>::Memory reduction;
  RowReduction<Shape::kThreads> reduce{&reduction};
  launch_next_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  auto* parts = reinterpret_cast<int*>(gemv_memory + kWarps * Shape::kSlots * kWeightBlockBytes);
  const int k_padded = weights.num_blocks * kBlockInputs;
  auto* q = reinterpret_cast<std::uint8_t*>(parts + weights.tiles_per_block * kWarps * 16);

  // Warps share K; where it has fewer blocks than there are warps, teams of them share the tiles.
  int k_warps = kWarps;
  while (k_warps > weights.num_blocks) k_warps /= 2;
  const int k_warp = warp % k_warps, team = warp / k_warps, num_teams = kWarps / k_warps;
  const int first_block = weights.num_blocks * k_warp / k_warps;
  const int my_blocks = weights.num_blocks * (k_warp + 1) / k_warps - first_block;
  const int first_tile = blockIdx.x * weights.tiles_per_block;
  const int num_tiles = min(weights.tiles_per_block, weights.num_tiles - first_tile);
  const int num_steps =
      num_tiles > team ? (num_tiles - team + num_teams - 1) / num_teams * my_blocks : 0;

  // Step i works on block i % my_blocks of this team's tile i / my_blocks.
  std::uint8_t* slots = gemv_memory + warp * Shape::kSlots * kWeightBlockBytes + lane * 16;
  const std::uint8_t* packed =
      weights.packed + lane * 16 +
      (static_cast<std::int64_t>(first_tile + team) * weights.num_blocks + first_block) *
          kWeightBlockBytes;
  const std::int64_t next_tile =
      (static_cast<std::int64_t>(num_teams) * weights.num_blocks - my_blocks) * kWeightBlockBytes;
  int copied = 0, in_tile = 0;
  const auto copy_next = [&] {
    if (copied < num_steps) {
      detail::copy_async(slots + copied % Shape::kSlots * kWeightBlockBytes, packed, true);
      packed += kWeightBlockBytes;
      if (++in_tile == my_blocks) {
        in_tile = 0;
        packed += next_tile;
      }
    }
    ++copied;
    detail::commit_copies();
  };
#pragma unroll
  for (int i = 0; i < Shape::kSlots; ++i) copy_next();

  // The output that this thread will store.
  const int column = first_tile * 16 + static_cast<int>(threadIdx.x);
  const bool has_output = static_cast<int>(threadIdx.x) < num_tiles * 16 && column < out.n;
  const float weight_scale = has_output ? column_scale(out, column) : 0.0F;
  using Row = RegisterRow<Shape::kThreads, Shape::kVectors, T>;
  Row row;
  row.load_weights(source, threadIdx.x);
  wait_for_previous_kernel();
  typename Row::RawRow raw;
  Row::load(raw, source, 0, threadIdx.x);
  row.take(raw, source);
  const float s = row.template scale<kActivation>(source, reduce, threadIdx.x);
  // In the order of the B fragments: [digit][block][half][t][4 words].
  const int sum = row.template quantize<kActivation, false>(
      s, threadIdx.x, k_padded, [&](int digit, int vector, std::uint32_t word) {
        const int i = Row::column(threadIdx.x, vector);
        const int at = i / 64 * 64 + i % 16 / 4 * 16 + (i % 64 / 32 * 2 + i % 32 / 16) * 4;
        *reinterpret_cast<std::uint32_t*>(q + digit * k_padded + at) = word;
      });
  reduce.leave_sum(sum);
  __syncthreads();

  int acc[kDigits][2][4] = {};  // two each, which don't wait for one another
  int block = 0, tile = team;
#pragma unroll 2
  for (int i = 0; i < num_steps; ++i) {
    detail::wait_for_copies<Shape::kSlots - 1>();
    const uint4 words =
        *reinterpret_cast<const uint4*>(slots + i % Shape::kSlots * kWeightBlockBytes);
    const std::uint8_t* at = q + (first_block + block) * kBlockInputs + t * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t first[4], second[4];
      unpack(half == 0 ? words.x : words.z, first);
      unpack(half == 0 ? words.y : words.w, second);
      // Every column of B holds the row; the first one's sums are used.
#pragma unroll
      for (int digit = 0; digit < kDigits; ++digit) {
        const uint4 b = *reinterpret_cast<const uint4*>(at + digit * k_padded + half * 64);
        mma(acc[digit][0], first, b.x, b.y);
        mma(acc[digit][1], second, b.z, b.w);
      }
    }
    copy_next();
    if (++block < my_blocks) continue;
    if (t == 0) {
      int* to = parts + (tile * kWarps + k_warp) * 16 + g;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int value = 0;
#pragma unroll
        for (int digit = kDigits - 1; digit >= 0; --digit)
          value = value * 256 + acc[digit][0][2 * half] + acc[digit][1][2 * half];
        to[8 * half] = value;
      }
    }
#pragma unroll
    for (int i = 0; i < kDigits * 8; ++i) acc[i / 8][i / 4 % 2][i % 4] = 0;
    block = 0;
    tile += num_teams;
  }
  __syncthreads();
  if (!has_output) return;
  int value = 0;
  for (int i = 0; i < k_warps; ++i) {
    value += parts[(threadIdx.x / 16 * kWarps + i) * 16 + threadIdx.x % 16];
  }
  RowOutput<T>(out, 0, {s, reduce.row_sum()})
      .template store<kActivation>(column, value, weight_scale);
}

}  // namespace tinylm::cuda
