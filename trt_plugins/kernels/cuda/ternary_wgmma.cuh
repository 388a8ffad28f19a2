// Many rows on Hopper: out^T = W x^T by wgmma. Codes come from shared memory as they are packed,
// are unpacked in registers and multiplied from there; activations lie in shared memory as wgmma
// reads them, and in memory too (fragments.cuh), so that plain bulk copies bring them.
//
// Warpgroup 0 copies, 1 and 2 multiply. The grid walks over the tiles; the thread blocks of a
// cluster have parts of K of one tile, added through each other's shared memory in a fixed order,
// or neighbouring tiles of outputs, which receive the activations together.
#pragma once

#include "async_copy.cuh"
#include "product.cuh"
#include "product_plan.h"
#include "wgmma.cuh"
#include "wgmma_epilogue.cuh"

namespace tinylm::cuda {

inline constexpr int kWgmmaThreads = 384;
inline constexpr int kWgmmaConsumers = 256;
inline constexpr int kWgmmaProducers = kWgmmaThreads - kWgmmaConsumers;

/// Sizes of one tile's kernel.
template <int kRows_>
struct WgmmaShape {
  static constexpr int kRows = kRows_;
  static constexpr int kActivationBytes = kRows * kBlockInputs;
  static constexpr int kStages = std::min(12, 160 * 1024 / kActivationBytes);
  static constexpr int kSlots = 8;  // blocks of weights on their way to a warp
};

template <typename Shape>
struct WgmmaMemory {
  union {
    std::uint8_t stages[Shape::kStages][Shape::kActivationBytes];
    uint4 parts[Shape::kRows / 8][kWgmmaConsumers];  // of K, in the end
  };
  uint4 weights[kWgmmaConsumers / 32][Shape::kSlots][32];
  uint4 transpose[kWgmmaConsumers / 32][2][32];
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
  int k_parts;
  RowLimits limits;
};

/// Cuts a product with n outputs into tiles of rows x outputs.
inline WgmmaArgs wgmma_args(const Product& p, std::int64_t n, int rows, int outputs,
                            int k_parts = 1) {
  return {p.rows,
          p.weight,
          p.m,
          num_blocks(p.k),
          static_cast<int>(detail::ceil_div(p.m, rows)),
          static_cast<int>(detail::ceil_div(n, outputs)),
          k_parts,
          p.limits};
}

#ifdef TINYLM_HOPPER

namespace detail {

/// A fragment of codes: 0, 1, 2 as integers; as e4m3 -2, -0, 2, whose upper two bits are 3 less the
/// code and whose others are 0.
template <Activation kActivation>
__device__ inline void unpack_wgmma(std::uint32_t word, std::uint32_t (&a)[4]) {
  if constexpr (kActivation == Activation::kInt8) {
    unpack(word, a);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = ~(word << (6 - 2 * i)) & 0xc0c0c0c0U;
  }
}

/// The part of K that a thread block works on.
struct WgmmaPart {
  int k_part, first_block, end_block;
  __device__ WgmmaPart(const WgmmaArgs& args)
      : k_part(blockIdx.x % args.k_parts),
        first_block(args.num_blocks * k_part / args.k_parts),
        end_block(args.num_blocks * (k_part + 1) / args.k_parts) {}
};

template <typename Shape>
__device__ inline bool tile_matters(const WgmmaArgs& args, int row_tile) {
  const std::int64_t first = static_cast<std::int64_t>(row_tile) * Shape::kRows;
  return any_row(args.limits, first, min(first + Shape::kRows, args.m));
}

/// Calls f(row tile, output tile, turn) for each tile of this thread block.
template <typename Shape, typename F>
__device__ inline void for_each_tile(const WgmmaArgs& args, F f) {
  const int num_tiles = args.num_row_tiles * args.num_output_tiles;
  int turn = 0;
  for (int tile = blockIdx.x / args.k_parts; tile < num_tiles; tile += gridDim.x / args.k_parts) {
    const int row_tile = tile % args.num_row_tiles;
    if (!tile_matters<Shape>(args, row_tile)) continue;
    f(row_tile, tile / args.num_row_tiles, turn++);
  }
}

/// One thread copies activations.
template <typename Shape>
__device__ inline void copy_tiles(const WgmmaArgs& args, const WgmmaPart& part,
                                  WgmmaMemory<Shape>& memory) {
  const int row_blocks = args.rows.row_blocks;
  int at = 0;
  for_each_tile<Shape>(args, [&](int row_tile, int, int) {
    const int first_row_block = row_tile * (Shape::kRows / 8);
    const int bytes = min(Shape::kRows / 8, row_blocks - first_row_block) * kActivationBlockBytes;
    for (int block = part.first_block; block < part.end_block; ++block, ++at) {
      const int stage = at % Shape::kStages;
      if (at >= Shape::kStages) memory.empty[stage].wait((at / Shape::kStages - 1) & 1);
      memory.full[stage].expect(bytes);
      const std::uint8_t* from =
          args.rows.activations +
          (static_cast<std::int64_t>(block) * row_blocks + first_row_block) * kActivationBlockBytes;
      copy_bulk(memory.stages[stage], from, bytes, memory.full[stage]);
    }
  });
}

/// The weights of a warp's outputs, which its lanes fetch for themselves, kSlots blocks ahead.
template <typename Shape>
class WeightStream {
 public:
  /// @param first_row In units of 16 outputs, this warp's first among those of a tile.
  __device__ WeightStream(const WgmmaArgs& args, const WgmmaPart& part, int first_row,
                          int num_weight_rows, uint4 (*slots)[32])
      : args_(args),
        part_(part),
        first_row_(first_row),
        last_row_(num_weight_rows - 1),
        slots_(&slots[0][threadIdx.x % 32]),
        tile_(blockIdx.x / args.k_parts) {
    begin_tile();
#pragma unroll 1
    for (int i = 0; i < Shape::kSlots; ++i) fetch();
  }

  /// The next block's words.
  __device__ uint4 next() {
    wait_for_copies<Shape::kSlots - 1>();
    return slots_[at_ * 32];
  }

  /// Fetches one more, into the slot of what next() gave last.
  __device__ void fetch() {
    if (left_ > 0) {
      copy_async(slots_ + at_ * 32, from_);
      from_ += kWeightBlockBytes;
      if (--left_ == 0) {
        tile_ += gridDim.x / args_.k_parts;
        begin_tile();
      }
    }
    at_ = (at_ + 1) % Shape::kSlots;
    commit_copies();
  }

 private:
  /// Looks for the next tile that matters.
  __device__ void begin_tile() {
    const int num_tiles = args_.num_row_tiles * args_.num_output_tiles;
    while (tile_ < num_tiles && !tile_matters<Shape>(args_, tile_ % args_.num_row_tiles)) {
      tile_ += gridDim.x / args_.k_parts;
    }
    if (tile_ >= num_tiles) return;
    left_ = part_.end_block - part_.first_block;
    // What lies beyond the last output is not stored.
    const int row = min(tile_ / args_.num_row_tiles * (kPlanOutputs / 16) + first_row_, last_row_);
    from_ =
        args_.packed + threadIdx.x % 32 * 16 +
        (static_cast<std::int64_t>(row) * args_.num_blocks + part_.first_block) * kWeightBlockBytes;
  }

  const WgmmaArgs& args_;
  const WgmmaPart& part_;
  int first_row_, last_row_;
  uint4* slots_;
  int tile_;
  const std::uint8_t* from_ = nullptr;
  int left_ = 0, at_ = 0;
};

/// The multiplying warpgroups.
template <typename Shape, Activation kActivation, typename Y>
__device__ inline void multiply_tiles(const WgmmaArgs& args, const WgmmaPart& part,
                                      const Output<Y>& out, WgmmaMemory<Shape>& memory) {
  using Sum = WgmmaSum<kActivation>;
  constexpr int kRows = Shape::kRows;
  const int thread = threadIdx.x - kWgmmaProducers;
  const int lane = thread % 32, warp = thread / 32;  // 16 outputs a warp
  const auto release = [&](int stage) {
    if (lane == 0) memory.empty[stage].arrive();
  };
  // Weights don't depend on the kernel before.
  if (args.limits.past_lens != nullptr) wait_for_previous_kernel();
  WeightStream<Shape> weights(args, part, warp, static_cast<int>((out.n + 15) / 16),
                              memory.weights[warp]);
  wait_for_previous_kernel();
  int at = 0;
  for_each_tile<Shape>(args, [&](int row_tile, int output_tile, int turn) {
    const std::int64_t first_row = static_cast<std::int64_t>(row_tile) * kRows;
    // What the epilogue needs is on its way meanwhile.
    float s = 1.0F;
    int row_sum = 0;
    if (thread < kRows && first_row + thread < args.m) {
      s = args.rows.s[first_row + thread];
      row_sum = args.rows.sums[first_row + thread];
    }
    const int first_column = output_tile * kPlanOutputs + 16 * warp;
    float weight_scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = first_column + lane / 4 + 8 * half;
      weight_scale[half] = column < out.n ? column_scale(out, column) : 0.0F;
    }
    Sum acc[kRows / 2];
    // Half a block is unpacked while the half before it is multiplied.
    std::uint32_t codes[2][2][4];
    const int num_blocks = part.end_block - part.first_block;
    for (int i = 0; i < num_blocks; ++i, ++at) {
      const int stage = at % Shape::kStages;
      const uint4 words = weights.next();
      memory.full[stage].wait(at / Shape::kStages & 1);
      const std::uint64_t rows = swizzled_rows(memory.stages[stage]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unpack_wgmma<kActivation>(half == 0 ? words.x : words.z, codes[half][0]);
        unpack_wgmma<kActivation>(half == 0 ? words.y : words.w, codes[half][1]);
        wgmma_fence();
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          wgmma(acc, codes[half][word], rows + 2 * (2 * half + word),
                i > 0 || half > 0 || word > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (half == 0 && i > 0) release((at + Shape::kStages - 1) % Shape::kStages);
      }
      weights.fetch();
    }
    wgmma_wait<0>();
    release((at + Shape::kStages - 1) % Shape::kStages);

    RowFactors* factors = memory.rows[turn % 2];
    if (thread < kRows) factors[thread] = row_factors(s, row_sum);
    named_sync<kWgmmaConsumers>(1);
    const auto store = [&](const auto& sums, int first) {
      constexpr int kChunks = sizeof(sums) / sizeof(Sum) / 8;
      store_rows<kChunks, kActivation, Y>(sums, factors + first, weight_scale, first_row + first,
                                          first_column, args.m, out, memory.transpose[warp]);
    };
    if (args.k_parts == 1) {
#pragma unroll
      for (int first = 0; first < kRows; first += 32) {
        Sum sums[16];
#pragma unroll
        for (int x = 0; x < 16; ++x) sums[x] = acc[first / 2 + x];
        store(sums, first);
      }
      return;
    }
    // Parts of K lie in the stages, which nobody uses any more; chunks of 16 rows take turns.
    uint4* mine = &memory.parts[0][thread];
#pragma unroll
    for (int x = 0; x < kRows / 8; ++x) memcpy(mine + x * kWgmmaConsumers, &acc[4 * x], 16);
    cluster_sync();
    const std::uint32_t address = shared_address(mine);
    for (int chunk = part.k_part; chunk < kRows / 16; chunk += args.k_parts) {
      Sum sums[8] = {};
      for (int k_part = 0; k_part < args.k_parts; ++k_part) {
        const std::uint32_t there =
            cluster_address(address, k_part) + 2 * chunk * kWgmmaConsumers * 16;
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          Sum values[4];
          const uint4 loaded = load_cluster(there + x * kWgmmaConsumers * 16);
          memcpy(values, &loaded, 16);
#pragma unroll
          for (int y = 0; y < 4; ++y) sums[4 * x + y] += values[y];
        }
      }
      store(sums, 16 * chunk);
    }
  });
}

}  // namespace detail

#endif  // TINYLM_HOPPER

/// Thread blocks of kWgmmaThreads in clusters of k_parts; a grid of any number of
/// clusters, with parts of K one for each group of tiles.
template <typename Shape, Activation kActivation, typename Y>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    ternary_wgmma(const __grid_constant__ WgmmaArgs args, const __grid_constant__ Output<Y> out) {
#ifdef TINYLM_HOPPER
  extern __shared__ __align__(1024) std::uint8_t wgmma_memory[];
  auto& memory = *reinterpret_cast<WgmmaMemory<Shape>*>(wgmma_memory);
  const detail::WgmmaPart part(args);
  const bool in_cluster = args.k_parts > 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      memory.full[i].init(1);
      memory.empty[i].init(kWgmmaConsumers / 32);
    }
    fence_shared_memory();
  }
  __syncthreads();
  if (threadIdx.x < kWgmmaProducers) {
    give_registers<56>();
    if (threadIdx.x < 32) {
      wait_for_previous_kernel();
      if (threadIdx.x == 0) detail::copy_tiles<Shape>(args, part, memory);
      __syncwarp();
    } else if (args.limits.past_lens != nullptr) {
      wait_for_previous_kernel();
    }
    // As often as those who multiply.
    if (in_cluster) {
      detail::for_each_tile<Shape>(args, [](int, int, int) { cluster_sync(); });
      cluster_sync();
    }
  } else {
    take_registers<224>();
    detail::multiply_tiles<Shape, kActivation, Y>(args, part, out, memory);
    if (in_cluster) cluster_sync();
  }
#endif
}

}  // namespace tinylm::cuda
