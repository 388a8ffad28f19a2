// Many rows on Hopper: out^T = W x^T by wgmma. Codes come from shared memory as they are packed,
// are unpacked in registers and multiplied from there; activations lie in shared memory as wgmma
// reads them, and in memory too (fragments.cuh), so that plain bulk copies bring them.
//
// Warpgroup 0 copies, 1 and 2 multiply. The grid walks over the tiles; the thread blocks of a
// cluster have parts of K of one tile, added through each other's shared memory in a fixed order,
// or neighbouring tiles of outputs, which receive the activations together.
#pragma once

#include "async_copy.cuh"
#include "epilogue.cuh"
#include "product.cuh"
#include "product_plan.h"
#include "wgmma.cuh"

namespace tinylm::cuda {

inline constexpr int kWgmmaThreads = 384;
inline constexpr int kWgmmaConsumers = 256;
inline constexpr int kWgmmaProducers = kWgmmaThreads - kWgmmaConsumers;

/// Sizes of one tile's kernel.
template <int kFragments_, int kRows_>
struct WgmmaShape {
  static constexpr int kFragments = kFragments_, kRows = kRows_;
  static constexpr int kOutputs = 128 * kFragments;
  static constexpr int kActivationBytes = kRows * kBlockInputs;
  static constexpr int kWeightBytes = kOutputs / 16 * kWeightBlockBytes;
  static constexpr int kStageBytes = kActivationBytes + kWeightBytes;
  static constexpr int kStages = std::min(12, 192 * 1024 / kStageBytes);
};

/// A row's factors, read by every warp.
struct RowFactors {
  float s, inverse;
  int sum;
};

template <typename Shape>
struct WgmmaMemory {
  std::uint8_t stages[Shape::kStages][Shape::kStageBytes];  // activations, then weights
  uint4 transpose[kWgmmaConsumers / 32][32];
  RowFactors rows[2][Shape::kRows];
  CopyBarrier full[Shape::kStages], empty[Shape::kStages];
};

struct WgmmaArgs {
  QuantizedRows rows;
  const std::uint8_t* packed;
  std::int64_t m;
  int num_blocks;        // of 128 inputs
  int num_row_tiles;     // tiles of rows
  int num_output_tiles;  // tiles of outputs
  int k_parts, sharers;
  RowLimits limits;
};

#ifdef TINYLM_HOPPER

namespace detail {

template <Activation kActivation>
using WgmmaSum = std::conditional_t<kActivation == Activation::kInt8, int, float>;

/// A fragment of codes: 0, 1, 2 as integers; as e4m3 0, 2^-6 and 2^-5, whose bits are 0, 8 and 16.
template <Activation kActivation>
__device__ inline void unpack_wgmma(std::uint32_t word, std::uint32_t (&a)[4]) {
  if constexpr (kActivation == Activation::kInt8) {
    unpack(word, a);
  } else {
    constexpr std::uint32_t kMask = 0x18181818U;
    a[0] = word << 3 & kMask;
    a[1] = word << 1 & kMask;
    a[2] = word >> 1 & kMask;
    a[3] = word >> 3 & kMask;
  }
}

template <Activation kActivation, typename T>
__device__ inline float wgmma_value(WgmmaSum<kActivation> acc, RowFactors row, float weight_scale) {
  if constexpr (kActivation == Activation::kInt8) {
    return scaled_sum<kActivation, T>(acc, row.sum, row.s, row.inverse, weight_scale);
  } else {
    constexpr float kCodeUnits = 64.0F;
    const float sum = fmaf(acc, kCodeUnits, static_cast<float>(row.sum) * (-1.0F / kFp8Units));
    return quotient<T>(sum * weight_scale, row.s, row.inverse);
  }
}

/// What a thread block works on.
struct WgmmaPart {
  int rank, k_part, sharer;
  int first_block, end_block;
  __device__ WgmmaPart(const WgmmaArgs& args)
      : rank(args.k_parts * args.sharers > 1 ? cluster_rank() : 0),
        k_part(rank % args.k_parts),
        sharer(rank / args.k_parts),
        first_block(args.num_blocks * k_part / args.k_parts),
        end_block(args.num_blocks * (k_part + 1) / args.k_parts) {}
};

/// Calls f(row tile, output tile, turn) for each tile of this thread block.
template <typename Shape, typename F>
__device__ inline void for_each_tile(const WgmmaArgs& args, const WgmmaPart& part, F f) {
  const int cluster = args.k_parts * args.sharers;
  const int groups =
      args.num_row_tiles * ((args.num_output_tiles + args.sharers - 1) / args.sharers);
  int turn = 0;
  for (int group = blockIdx.x / cluster; group < groups; group += gridDim.x / cluster) {
    const int row_tile = group % args.num_row_tiles;
    const std::int64_t first = static_cast<std::int64_t>(row_tile) * Shape::kRows;
    if (!any_row(args.limits, first, min(first + Shape::kRows, args.m))) continue;
    f(row_tile, group / args.num_row_tiles * args.sharers + part.sharer, turn++);
  }
}

/// The copying warpgroup.
template <typename Shape>
__device__ inline void copy_tiles(const WgmmaArgs& args, const WgmmaPart& part, int num_weight_rows,
                                  WgmmaMemory<Shape>& memory) {
  const int thread = threadIdx.x;
  const int row_blocks = args.rows.row_blocks;
  std::uint16_t ranks = 0;  // that share the activations
  for (int i = 0; i < args.sharers; ++i) ranks |= 1U << (part.k_part + i * args.k_parts);
  int at = 0;
  // 16 bytes a thread: copies in bulk of 512 bytes take 60 ns each, one after the other.
  const auto copy_weights = [&](int stage, int block, int first_weight_row, int count) {
    constexpr int kPieces = kWeightBlockBytes / 16;
    for (int i = thread; i < count * kPieces; i += kWgmmaProducers) {
      const std::int64_t from =
          static_cast<std::int64_t>(first_weight_row + i / kPieces) * args.num_blocks + block;
      copy_async(memory.stages[stage] + Shape::kActivationBytes + i * 16,
                 args.packed + from * kWeightBlockBytes + i % kPieces * 16, true);
    }
    memory.full[stage].arrive_after_copies();
  };
  // Weights don't depend on the kernel before.
  bool waited = args.limits.past_lens != nullptr;
  if (waited) wait_for_previous_kernel();
  for_each_tile<Shape>(args, part, [&](int row_tile, int output_tile, int) {
    const int first_row_block = row_tile * (Shape::kRows / 8);
    const int tile_blocks = min(Shape::kRows / 8, row_blocks - first_row_block);
    const int first_weight_row = output_tile * (Shape::kOutputs / 16);
    const int weight_rows = max(0, min(Shape::kOutputs / 16, num_weight_rows - first_weight_row));
    const int bytes = tile_blocks * kActivationBlockBytes;
    // This thread block's share of the activations.
    const int begin = tile_blocks * part.sharer / args.sharers;
    const int count = tile_blocks * (part.sharer + 1) / args.sharers - begin;
    const auto copy_activations = [&](int stage, int block) {
      if (thread != 0) return;
      memory.full[stage].expect(bytes);
      if (count == 0) return;
      const std::uint8_t* from =
          args.rows.activations +
          (static_cast<std::int64_t>(block) * row_blocks + first_row_block + begin) *
              kActivationBlockBytes;
      std::uint8_t* to = memory.stages[stage] + begin * kActivationBlockBytes;
      if (args.sharers == 1) {
        copy_bulk(to, from, count * kActivationBlockBytes, memory.full[stage]);
      } else {
        copy_bulk_to(to, from, count * kActivationBlockBytes, memory.full[stage], ranks);
      }
    };
    int first = part.first_block;
    if (!waited) {
      const int ahead = min(Shape::kStages, part.end_block - first);
      for (int i = 0; i < ahead; ++i) copy_weights(i, first + i, first_weight_row, weight_rows);
      wait_for_previous_kernel();
      waited = true;
      for (int i = 0; i < ahead; ++i) copy_activations(i, first + i);
      first += ahead;
      at += ahead;
    }
    for (int block = first; block < part.end_block; ++block, ++at) {
      const int stage = at % Shape::kStages;
      if (at >= Shape::kStages) memory.empty[stage].wait_cluster((at / Shape::kStages - 1) & 1);
      copy_activations(stage, block);
      copy_weights(stage, block, first_weight_row, weight_rows);
    }
  });
}

/// Stores 16 rows of a warp's 16 outputs. acc[4 j + i]: register i of rows 8 j ... of the fragment.
template <Activation kActivation, typename Y>
__device__ inline void store_rows(const WgmmaSum<kActivation> (&acc)[8], const RowFactors* factors,
                                  const float (&weight_scale)[2], std::int64_t row, int column,
                                  std::int64_t m, const Output<Y>& out, uint4* transpose) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(Y) == 2) {
    std::uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Y values[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          values[i] = from_float<Y>(wgmma_value<kActivation, Y>(
              acc[4 * j + 2 * half + i], factors[8 * j + 2 * t + i], weight_scale[half]));
        }
        memcpy(&packed[2 * j + half], values, 4);
      }
    }
    // Matrix 2 j + half goes to rows 8 j ... and outputs 8 half ... of [16 rows][16 outputs].
    const int matrix = lane / 8, in_matrix = lane % 8;
    __syncwarp();
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                     shared_address(transpose + (8 * (matrix / 2) + in_matrix) * 2 + matrix % 2)),
                 "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                 : "memory");
    __syncwarp();
    const std::int64_t my_row = row + lane / 2;
    const int my_column = column + 8 * (lane % 2);
    if (my_row >= m || my_column >= out.n) return;
    Y values[8];
    *reinterpret_cast<uint4*>(values) = transpose[lane];
    const std::int64_t to = my_row * out.n + my_column;
    const bool whole = out.n % 8 == 0;
    if (out.residual != nullptr) {
      Y residual[8];
      if (whole) {
        *reinterpret_cast<uint4*>(residual) = *reinterpret_cast<const uint4*>(out.residual + to);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!whole) residual[i] = my_column + i < out.n ? out.residual[to + i] : values[i];
        values[i] = from_float<Y>(to_float(residual[i]) + to_float(values[i]));
      }
    }
    if (whole) {
      *reinterpret_cast<uint4*>(out.y + to) = *reinterpret_cast<uint4*>(values);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (my_column + i < out.n) out.y[to + i] = values[i];
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int in_rows = 8 * j + 2 * t + i % 2, my_column = column + g + i / 2 * 8;
        if (row + in_rows >= m || my_column >= out.n) continue;
        const std::int64_t to = (row + in_rows) * out.n + my_column;
        if constexpr (std::is_same_v<Y, std::int32_t>) {
          out.y[to] = acc[4 * j + i] - factors[in_rows].sum;
        } else {
          const float value =
              wgmma_value<kActivation, Y>(acc[4 * j + i], factors[in_rows], weight_scale[i / 2]);
          out.y[to] = out.residual == nullptr ? value : out.residual[to] + value;
        }
      }
    }
  }
}

/// The multiplying warpgroups.
template <typename Shape, Activation kActivation, typename Y>
__device__ inline void multiply_tiles(const WgmmaArgs& args, const WgmmaPart& part,
                                      const Output<Y>& out, WgmmaMemory<Shape>& memory) {
  using Sum = WgmmaSum<kActivation>;
  constexpr int kFragments = Shape::kFragments, kRows = Shape::kRows;
  const int thread = threadIdx.x - kWgmmaProducers;
  const int lane = thread % 32, warp = thread / 32, warpgroup = thread / 128;
  const auto column_of = [&](int output_tile, int fragment) {
    return output_tile * Shape::kOutputs + (warpgroup * kFragments + fragment) * 64 + warp % 4 * 16;
  };
  const auto release = [&](int stage) {
    if (args.sharers == 1) {
      if (lane == 0) memory.empty[stage].arrive();
    } else if (lane < args.sharers) {
      memory.empty[stage].arrive_at(part.k_part + lane * args.k_parts);
    }
  };
  wait_for_previous_kernel();
  int at = 0;
  for_each_tile<Shape>(args, part, [&](int row_tile, int output_tile, int turn) {
    const std::int64_t first_row = static_cast<std::int64_t>(row_tile) * kRows;
    RowFactors* factors = memory.rows[turn % 2];
    if (thread < kRows && first_row + thread < args.m) {
      const float s = args.rows.s[first_row + thread];
      factors[thread] = {s, 1.0F / s, args.rows.sums[first_row + thread]};
    }
    Sum acc[kFragments][kRows / 2];
    // Half a block is unpacked while the half before it is multiplied.
    std::uint32_t codes[2][kFragments][2][4];
    const int num_blocks = part.end_block - part.first_block;
    for (int i = 0; i < num_blocks; ++i, ++at) {
      const int stage = at % Shape::kStages;
      memory.full[stage].wait(at / Shape::kStages & 1);
      const std::uint8_t* activations = memory.stages[stage];
      const std::uint64_t rows = swizzled_rows(activations);
      const std::uint8_t* words = activations + Shape::kActivationBytes + lane * 16 +
                                  (warpgroup * kFragments * 4 + warp % 4) * kWeightBlockBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          const uint2 packed =
              *reinterpret_cast<const uint2*>(words + f * 4 * kWeightBlockBytes + half * 8);
          unpack_wgmma<kActivation>(packed.x, codes[half][f][0]);
          unpack_wgmma<kActivation>(packed.y, codes[half][f][1]);
        }
        wgmma_fence();
#pragma unroll
        for (int word = 0; word < 2; ++word) {
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            wgmma(acc[f], codes[half][f][word], rows + 2 * (2 * half + word),
                  i > 0 || half > 0 || word > 0);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (half == 0 && i > 0) release((at + Shape::kStages - 1) % Shape::kStages);
      }
    }
    wgmma_wait<0>();
    release((at + Shape::kStages - 1) % Shape::kStages);

    asm volatile("bar.sync 1, %0;" ::"n"(kWgmmaConsumers) : "memory");  // factors are there
    float weight_scale[kFragments][2];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = column_of(output_tile, f) + lane / 4 + 8 * half;
        weight_scale[f][half] = column < out.n ? column_scale(out, column) : 0.0F;
      }
    }
    const auto store = [&](const Sum(&sums)[8], int f, int chunk) {
      store_rows<kActivation, Y>(sums, factors + 16 * chunk, weight_scale[f],
                                 first_row + 16 * chunk, column_of(output_tile, f), args.m, out,
                                 memory.transpose[warp]);
    };
    if (args.k_parts == 1) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int chunk = 0; chunk < kRows / 16; ++chunk) {
          Sum sums[8];
#pragma unroll
          for (int x = 0; x < 8; ++x) sums[x] = acc[f][8 * chunk + x];
          store(sums, f, chunk);
        }
      }
      return;
    }
    // Parts of K lie in the stages, which nobody uses any more; chunks of 16 rows take turns.
    uint4* mine = reinterpret_cast<uint4*>(memory.stages) + thread;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int x = 0; x < kRows / 8; ++x) {
        memcpy(mine + (f * (kRows / 8) + x) * kWgmmaConsumers, &acc[f][4 * x], 16);
      }
    }
    cluster_sync();
    const std::uint32_t address = shared_address(mine);
    for (int chunk = part.k_part; chunk < kRows / 16; chunk += args.k_parts) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        Sum sums[8] = {};
        for (int k_part = 0; k_part < args.k_parts; ++k_part) {
          const std::uint32_t there =
              cluster_address(address, part.sharer * args.k_parts + k_part) +
              (f * (kRows / 8) + 2 * chunk) * kWgmmaConsumers * 16;
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            Sum values[4];
            const uint4 loaded = load_cluster(there + x * kWgmmaConsumers * 16);
            memcpy(values, &loaded, 16);
            for (int y = 0; y < 4; ++y) sums[4 * x + y] += values[y];
          }
        }
        store(sums, f, chunk);
      }
    }
  });
}

}  // namespace detail

#endif  // TINYLM_HOPPER

/// Thread blocks of kWgmmaThreads in clusters of k_parts * sharers; a grid of any number of
/// clusters, with parts of K one for each group of tiles.
template <typename Shape, Activation kActivation, typename Y>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    ternary_wgmma(const __grid_constant__ WgmmaArgs args, const __grid_constant__ Output<Y> out) {
#ifdef TINYLM_HOPPER
  extern __shared__ __align__(1024) std::uint8_t wgmma_memory[];
  auto& memory = *reinterpret_cast<WgmmaMemory<Shape>*>(wgmma_memory);
  const detail::WgmmaPart part(args);
  const bool in_cluster = args.k_parts * args.sharers > 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      memory.full[i].init(1 + kWgmmaProducers);
      memory.empty[i].init(kWgmmaConsumers / 32 * args.sharers);
    }
    fence_barriers();
  }
  __syncthreads();
  if (in_cluster) cluster_sync();
  if (threadIdx.x < kWgmmaProducers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    detail::copy_tiles<Shape>(args, part, static_cast<int>((out.n + 15) / 16), memory);
    __syncwarp();
    // As often as those who multiply.
    if (args.k_parts > 1) {
      detail::for_each_tile<Shape>(args, part, [](int, int, int) { cluster_sync(); });
    }
    if (in_cluster) cluster_sync();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    detail::multiply_tiles<Shape, kActivation, Y>(args, part, out, memory);
    if (in_cluster) cluster_sync();
  }
#endif
}

}  // namespace tinylm::cuda
