// Few rows that are quantised already. A thread block has one or two tiles of 16 outputs, for which
// it reads its rows from L2 once; its warps share K. Weights are on their way into shared memory
// before the rows are quantised; each lane fetches what it will multiply, so that nobody waits for
// another's copies. Sums are integers, so the order in which the warps' parts are added does not
// matter. gemv_plan.h chooses the sizes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "async_copy.cuh"
#include "epilogue.cuh"
#include "fragments.cuh"

namespace tinylm::cuda {

/// Sizes of one variant.
/// @tparam kRowTiles_ Tiles of 8 rows that a thread block multiplies.
/// @tparam kOutputTiles_ Tiles of 16 outputs.
/// @tparam kWarps_ Warps of a thread block.
template <Activation kActivation_, int kRowTiles_, int kOutputTiles_, int kWarps_>
struct GemvShape {
  static constexpr Activation kActivation = kActivation_;
  static constexpr int kDigits = num_digits(kActivation);
  static constexpr int kRowTiles = kRowTiles_, kRows = 8 * kRowTiles;
  static constexpr int kOutputTiles = kOutputTiles_, kOutputs = 16 * kOutputTiles;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kSlots = 8;  // blocks of 128 inputs on their way to a warp
  static constexpr int kSlotBytes = kOutputTiles * kWeightBlockBytes;
  // Words between the sums of neighbouring outputs, so that few of a warp's lanes meet at a bank.
  static constexpr int kPitch = kRows + (kRowTiles == 4 ? 10 : 2);
  // Whether a block's rows are asked for before the block before is multiplied: digits leave no
  // registers for it.
  static constexpr bool kAhead = kDigits == 1;

  /// Blocks that a warp has on their way at once.
  __host__ __device__ static int slots(int num_blocks) {
    const int most = (num_blocks + kWarps - 1) / kWarps;
    return most < kSlots ? most : kSlots;
  }
  /// Bytes of shared memory: the slots, and in their place the warps' sums afterwards.
  static std::int64_t shared_bytes(int num_blocks) {
    constexpr std::int64_t kPartsBytes = std::int64_t{kWarps} * kOutputs * kPitch * 4;
    return std::max(kPartsBytes, std::int64_t{kWarps} * slots(num_blocks) * kSlotBytes);
  }
};

struct GemvWeights {
  const std::uint8_t* packed;
  int num_blocks;  // K / 128, rounded up
  int num_tiles;   // N / 16, rounded up
};

namespace detail {

/// acc += 16 outputs x 128 inputs times the tiles of rows. Sums of outputs 8 ... 15 are four times
/// what they should be.
template <int kRowTiles>
__device__ inline void add_tile(int (&acc)[kRowTiles][4], uint4 words,
                                const uint4 (&rows)[kRowTiles][2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t first[4], second[4];
    mask_low_codes(half == 0 ? words.x : words.z, half == 0 ? words.y : words.w, first, second);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      mma(acc[tile], first, rows[tile][half].x, rows[tile][half].z);
    }
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      mma(acc[tile], second, rows[tile][half].y, rows[tile][half].w);
    }
  }
}

/// The same of rows that are digits, but sums is exact: the digits' sums by Horner's rule.
template <int kDigits, int kRowTiles>
__device__ inline void add_digits(int (&sums)[kRowTiles][4], uint4 words,
                                  const uint4 (&rows)[kDigits][kRowTiles][2]) {
  int acc[kRowTiles][4] = {};
#pragma unroll
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    add_tile(acc, words, rows[digit]);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (digit > 0) {
          acc[tile][i] *= 256;
        } else {
          sums[tile][i] += acc[tile][i] >> (i / 2 * 2);
        }
      }
    }
  }
}

}  // namespace detail

/// Grid: parts of the outputs, of at most kOutputTiles tiles, x tiles of rows.
/// @param activations In the order of fragments.cuh; digit_bytes apart.
template <typename Shape, typename Y>
__global__ void __launch_bounds__(Shape::kThreads)
    ternary_gemv(const std::uint8_t* activations, std::int64_t digit_bytes, RowScales scales,
                 GemvWeights weights, Output<Y> out, int m) {
  constexpr int kDigits = Shape::kDigits, kRowTiles = Shape::kRowTiles;
  constexpr int kTiles = Shape::kOutputTiles, kSlots = Shape::kSlots;
  extern __shared__ __align__(16) std::uint8_t gemv_memory[];
  __shared__ float column_scales[Shape::kOutputs];
  __shared__ RowScale row_scales[Shape::kRows];
  launch_next_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Shares that differ by a tile at most.
  const int part = blockIdx.x, share = weights.num_tiles / static_cast<int>(gridDim.x);
  const int rest = weights.num_tiles - share * static_cast<int>(gridDim.x);
  const int first_tile = part * share + min(part, rest), num_tiles = share + (part < rest ? 1 : 0);
  const int my_blocks = (weights.num_blocks - warp + Shape::kWarps - 1) / Shape::kWarps;
  const std::uint8_t* packed =
      weights.packed + lane * 16 +
      (static_cast<std::int64_t>(first_tile) * weights.num_blocks + warp) * kWeightBlockBytes;
  const std::int64_t tile_bytes = static_cast<std::int64_t>(weights.num_blocks) * kWeightBlockBytes;
  std::uint8_t* slots =
      gemv_memory + warp * Shape::slots(weights.num_blocks) * Shape::kSlotBytes + lane * 16;
  const auto fetch = [&](int slot) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile < num_tiles) {
        detail::copy_async(slots + slot * Shape::kSlotBytes + tile * kWeightBlockBytes,
                           packed + tile * tile_bytes);
      }
    }
    packed += Shape::kWarps * kWeightBlockBytes;
  };
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (i < my_blocks) fetch(i);
    detail::commit_copies();
  }
  if (static_cast<int>(threadIdx.x) < Shape::kOutputs) {
    const int column = first_tile * 16 + static_cast<int>(threadIdx.x);
    column_scales[threadIdx.x] = column < out.n ? column_scale(out, column) : 0.0F;
  }
  const int first_row = blockIdx.y * Shape::kRows;
  const int num_rows = min(Shape::kRows, m - first_row);

  wait_for_previous_kernel();
  if (static_cast<int>(threadIdx.x) < num_rows) {
    const int row = first_row + static_cast<int>(threadIdx.x);
    row_scales[threadIdx.x] = {scales.s[row], scales.sums[row]};
  }
  const std::uint8_t* mine =
      activations + lane * 16 +
      (static_cast<std::int64_t>(first_row / 8) * weights.num_blocks + warp) *
          kActivationBlockBytes;
  using Rows = uint4[kDigits][kRowTiles][2];
  const auto load_rows = [&](Rows& rows) {
#pragma unroll
    for (int digit = 0; digit < kDigits; ++digit) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          rows[digit][tile][half] = uint4{};
          if (8 * tile >= num_rows) continue;
          rows[digit][tile][half] = *reinterpret_cast<const uint4*>(
              mine + digit * digit_bytes +
              static_cast<std::int64_t>(tile) * weights.num_blocks * kActivationBlockBytes +
              half * 512);
        }
      }
    }
    mine += Shape::kWarps * kActivationBlockBytes;
  };
  int sums[kTiles][kRowTiles][4] = {};
  Rows next;
  if (Shape::kAhead && my_blocks > 0) load_rows(next);
  int slot = 0;
  for (int block = 0; block < my_blocks; ++block) {
    Rows rows;
    if constexpr (Shape::kAhead) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        rows[0][tile][0] = next[0][tile][0];
        rows[0][tile][1] = next[0][tile][1];
      }
      if (block + 1 < my_blocks) load_rows(next);
    } else {
      load_rows(rows);
    }
    detail::wait_for_copies<kSlots - 1>();
    const std::uint8_t* words = slots + slot * Shape::kSlotBytes;
    // A tile that is not there is multiplied, too, and not stored: a branch here would keep the
    // tiles' products from overlapping.
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 codes = *reinterpret_cast<const uint4*>(words + tile * kWeightBlockBytes);
      if constexpr (kDigits == 1) {
        detail::add_tile(sums[tile], codes, rows[0]);
      } else {
        detail::add_digits(sums[tile], codes, rows);
      }
    }
    if (block + kSlots < my_blocks) fetch(slot);
    detail::commit_copies();
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }

  __syncthreads();  // the slots become the sums' place
  auto* parts = reinterpret_cast<int (*)[Shape::kOutputs][Shape::kPitch]>(gemv_memory);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int row = 0; row < kRowTiles; ++row) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int shift = kDigits == 1 ? 2 * upper : 0;
        const int* pair = &sums[tile][row][2 * upper];
        *reinterpret_cast<int2*>(&parts[warp][16 * tile + 8 * upper + g][8 * row + 2 * t]) =
            make_int2(pair[0] >> shift, pair[1] >> shift);
      }
    }
  }
  __syncthreads();
  constexpr int kPair = kRowTiles == 1 ? 1 : 2;  // rows of an output that a thread sums
  for (int i = threadIdx.x; i < Shape::kOutputs * Shape::kRows / kPair; i += Shape::kThreads) {
    const int row = i / Shape::kOutputs * kPair, in_block = i % Shape::kOutputs;
    const int column = first_tile * 16 + in_block;
    if (in_block >= num_tiles * 16 || column >= out.n || row >= num_rows) continue;
    struct alignas(4 * kPair) Pair {
      int sums[kPair];
    } pair{};
#pragma unroll
    for (int part = 0; part < Shape::kWarps; ++part) {
      const Pair more = *reinterpret_cast<const Pair*>(&parts[part][in_block][row]);
#pragma unroll
      for (int j = 0; j < kPair; ++j) pair.sums[j] += more.sums[j];
    }
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      if (row + j >= num_rows) continue;
      RowOutput<Y>(out, first_row + row + j, row_scales[row + j])
          .template store<Shape::kActivation>(column, pair.sums[j], column_scales[in_block]);
    }
  }
}

}  // namespace tinylm::cuda
