// One row: norm, quantiser and product in one launch. Every thread block quantises the row for
// itself, while the weights of its outputs are already on their way into shared memory; each lane
// fetches what it will multiply, so that nobody waits for another's copies.
#pragma once

#include <algorithm>

#include "async_copy.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"
#include "quantize_registers.cuh"

namespace tinylm::cuda {

/// Sizes of one variant: a row of up to 4 * kThreads * kVectors inputs. Small thread blocks, two or
/// more on a multiprocessor: one quantises while another multiplies, and the next layer's fetch
/// their weights meanwhile.
template <int kThreads_, int kVectors_>
struct RowShape {
  static constexpr int kThreads = kThreads_, kVectors = kVectors_;
  static constexpr int kSlots = 8;  // blocks of weights on their way to a warp
  static constexpr int kTogether = kThreads < 512 ? 2 : 1;  // on a multiprocessor, at least
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMostTiles = kWarps < 8 ? kWarps : 8;  // 16 outputs each, of a thread block
};

struct RowWeights {
  const std::uint8_t* packed;
  int num_blocks;       // K / 128, rounded up
  int num_tiles;        // N / 16, rounded up
  int tiles_per_block;  // of a thread block
  int parts;            // warps that share a tile's blocks equally
  int blocks_per_warp;  // num_blocks / parts
};

/// How many warps can share each tile's blocks equally if there are so many for all tiles.
inline int warps_of_tile(int num_blocks, int tiles, int warps) {
  int parts = std::min(warps / tiles, num_blocks);
  while (num_blocks % parts != 0) --parts;
  return parts;
}

/// Shared memory: the slots, then the warps' sums int [kWarps][16], then the quantised row
/// [digits][K padded].
template <typename Shape, Activation kActivation>
std::int64_t row_shared_bytes(const RowWeights& weights) {
  return Shape::kWarps * (Shape::kSlots * kWeightBlockBytes + 16 * 4) +
         num_digits(kActivation) * weights.num_blocks * kBlockInputs;
}

namespace detail {

/// Adds a block of weights times the row. `row` is a digit of it at this lane's words: each column
/// of B holds one.
__device__ inline void add_row_block(int (&acc)[2][4], uint4 words, const std::uint8_t* row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t first[4], second[4];
    mask_codes(half == 0 ? words.x : words.z, half == 0 ? words.y : words.w, first, second);
    mma_masked(acc, first, second, *reinterpret_cast<const uint4*>(row + half * 64));
  }
}

}  // namespace detail

/// Grid: num_tiles / tiles_per_block, rounded up.
template <typename Shape, Activation kActivation, typename T>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kTogether)
    ternary_gemv_row(RowSource<T> source, RowWeights weights, Output<T> out) {
  constexpr int kDigits = num_digits(kActivation), kWarps = Shape::kWarps;
  constexpr int kSlotsBytes = Shape::kSlots * kWeightBlockBytes;
  constexpr int kPair = 2;  // blocks that a warp waits for at once
  extern __shared__ __align__(16) std::uint8_t gemv_memory[];
  __shared__ typename RowReduction<Shape::kThreads>::Memory reduction;
  RowReduction<Shape::kThreads> reduce{&reduction};
  launch_next_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  auto* parts = reinterpret_cast<int*>(gemv_memory + kWarps * kSlotsBytes);
  const int k_padded = weights.num_blocks * kBlockInputs;
  auto* q = reinterpret_cast<std::uint8_t*>(parts + kWarps * 16);

  // The blocks of this thread block's tiles are neighbours in memory; a warp has some of one tile.
  const int first_tile = blockIdx.x * weights.tiles_per_block;
  const int num_tiles = min(weights.tiles_per_block, weights.num_tiles - first_tile);
  const int first_block = warp * weights.blocks_per_warp;
  const int my_blocks = first_block < num_tiles * weights.num_blocks ? weights.blocks_per_warp : 0;
  int part = warp;
  while (part >= weights.parts) part -= weights.parts;  // a division would take longer
  std::uint8_t* slots = gemv_memory + warp * kSlotsBytes + lane * 16;
  const std::uint8_t* packed =
      weights.packed + lane * 16 +
      (static_cast<std::int64_t>(first_tile) * weights.num_blocks + first_block) *
          kWeightBlockBytes;
#pragma unroll
  for (int i = 0; i < Shape::kSlots; ++i) {
    if (i < my_blocks) {
      detail::copy_async(slots + i * kWeightBlockBytes, packed + i * kWeightBlockBytes);
    }
    if (i % kPair == kPair - 1) detail::commit_copies();
  }

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
  // In the order of the B fragments: [digit][block][half][t][4 words]. A thread's vectors are whole
  // blocks apart.
  const int i = Row::column(threadIdx.x, 0);
  std::uint8_t* to = q + i / 64 * 64 + i % 16 / 4 * 16 + (i % 64 / 32 * 2 + i % 32 / 16) * 4;
  const int sum = row.template quantize<kActivation, false>(
      s, threadIdx.x, k_padded, [&](int digit, int vector, std::uint32_t word) {
        *reinterpret_cast<std::uint32_t*>(to + digit * k_padded + vector * 4 * Shape::kThreads) =
            word;
      });
  reduce.leave_sum(sum);
  __syncthreads();

  // Column g of B is digit g.
  const std::uint8_t* at =
      q + (g < kDigits ? g : 0) * k_padded + t * 16 + part * weights.blocks_per_warp * kBlockInputs;
  int acc[2][4] = {};
  for (int first = 0; first < my_blocks; first += Shape::kSlots) {
    packed += kSlotsBytes;
#pragma unroll
    for (int slot = 0; slot < Shape::kSlots; slot += kPair) {
      if (first + slot >= my_blocks) break;
      detail::wait_for_copies<Shape::kSlots / kPair - 1>();
      uint4 words[kPair];
#pragma unroll
      for (int i = 0; i < kPair; ++i) {
        words[i] = first + slot + i < my_blocks
                       ? *reinterpret_cast<uint4*>(slots + (slot + i) * kWeightBlockBytes)
                       : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kPair; ++i) {
        const int row = first + slot + i < my_blocks ? slot + i : slot;
        detail::add_row_block(acc, words[i], at + row * kBlockInputs);
      }
#pragma unroll
      for (int i = 0; i < kPair; ++i) {
        if (first + slot + i + Shape::kSlots < my_blocks) {
          detail::copy_async(slots + (slot + i) * kWeightBlockBytes,
                             packed + (slot + i) * kWeightBlockBytes);
        }
      }
      detail::commit_copies();
    }
    at += Shape::kSlots * kBlockInputs;
  }
  // Lane 4g has the sums of digits 0 and 1, the lane after it those of digit 2.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int value = joined_sum(acc, 2 * half);
    if constexpr (kDigits > 1) {
      static_assert(kDigits == 3);
      const int last = __shfl_down_sync(0xffffffffU, value, 1);
      value += 256 * (joined_sum(acc, 2 * half + 1) + 256 * last);
    }
    if (t == 0 && my_blocks > 0) parts[warp * 16 + 8 * half + g] = value;
  }
  __syncthreads();
  if (!has_output) return;
  const int* tile_parts = parts + threadIdx.x / 16 * weights.parts * 16 + threadIdx.x % 16;
  int value = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < weights.parts) value += tile_parts[i * 16];
  }
  RowOutput<T>(out, 0, {s, reduce.row_sum()})
      .template store<kActivation>(column, value, weight_scale);
}

}  // namespace tinylm::cuda
