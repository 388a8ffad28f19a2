// Very many rows on Hopper: as ternary_wgmma.cuh, but each multiplying warpgroup has 128 outputs x
// 128 rows, half the registers' worth of outputs for each row that is copied.
//
// Tiling::kWide: both warpgroups multiply the same rows, 256 outputs: least traffic.
// Tiling::kTurns: each has tiles of its own. Stages come in the order of tiles, so that one
// warpgroup multiplies while the other scales and stores.
#pragma once

#include "ternary_wgmma.cuh"

namespace tinylm::cuda {

/// Sizes of one tiling's kernel.
template <Tiling kTiling_>
struct SquareShape {
  static constexpr Tiling kTiling = kTiling_;
  static constexpr bool kTurns = kTiling == Tiling::kTurns;
  static constexpr int kRows = 128;
  static constexpr int kOutputs = kTurns ? 128 : 256;            // of a tile
  static constexpr int kActivationBytes = kRows * kBlockInputs;  // of a stage
  static constexpr int kWeightRows = kOutputs / 16;              // blocks of weights of a stage
  static constexpr int kStages = kTurns ? 7 : 6;
  static constexpr int kCopiers = 64;  // threads that copy weights
};

template <typename Shape>
struct SquareMemory {
  std::uint8_t stages[Shape::kStages][Shape::kActivationBytes];
  uint4 outputs[2][Shape::kRows][16];  // a warpgroup's, two bytes each; chunk c of row r at c ^ r
  uint4 weights[Shape::kStages][Shape::kWeightRows][32];
  RowFactors rows[2][Shape::kRows];
  CopyBarrier full[Shape::kStages], empty[Shape::kStages];
  CopyBarrier turn[2];  // of a warpgroup has come
};

#ifdef TINYLM_HOPPER

namespace detail {

/// Calls f(row tile, output tile, turn) for each tile of this thread block. Groups of rows that fit
/// into L2 come one after the other.
template <typename Shape, typename F>
__device__ inline void for_each_square(const WgmmaArgs& args, F f) {
  constexpr int kGroup = 16;  // tiles of rows
  const int num_tiles = args.num_row_tiles * args.num_output_tiles;
  int turn = 0;
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int first = tile / (kGroup * args.num_output_tiles) * kGroup;
    const int in_group = min(kGroup, args.num_row_tiles - first);
    const int at = tile - first * args.num_output_tiles;
    const int row_tile = first + at % in_group;
    if (!tile_matters<Shape>(args, row_tile)) continue;
    f(row_tile, at / in_group, turn++);
  }
}

/// Calls f(block of inputs, stage) for each block of a tile, once the stage is free.
template <typename Shape, typename F>
__device__ inline void fill_stages(const WgmmaArgs& args, SquareMemory<Shape>& memory, int& stage,
                                   int& parity, F f) {
#pragma unroll 1
  for (int block = 0; block < args.num_blocks; ++block) {
    memory.empty[stage].wait(parity ^ 1);
    f(block, stage);
    if (++stage == Shape::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

/// One thread copies activations.
template <typename Shape>
__device__ inline void copy_square_rows(const WgmmaArgs& args, SquareMemory<Shape>& memory) {
  const int row_blocks = args.rows.row_blocks;
  const std::int64_t block_bytes = static_cast<std::int64_t>(row_blocks) * kActivationBlockBytes;
  int stage = 0, parity = 0;
  for_each_square<Shape>(args, [&](int row_tile, int, int) {
    const int first_row_block = row_tile * (Shape::kRows / 8);
    const int bytes = min(Shape::kRows / 8, row_blocks - first_row_block) * kActivationBlockBytes;
    const std::uint8_t* from =
        args.rows.activations + static_cast<std::int64_t>(first_row_block) * kActivationBlockBytes;
    fill_stages<Shape>(args, memory, stage, parity, [&](int, int to) {
      memory.full[to].expect(bytes);
      copy_bulk(memory.stages[to], from, bytes, memory.full[to]);
      from += block_bytes;
    });
  });
}

/// kCopiers threads copy weights, 16 bytes at a time: many small copies in bulk would be slower.
template <typename Shape>
__device__ inline void copy_square_weights(const WgmmaArgs& args, int num_weight_rows, int thread,
                                           SquareMemory<Shape>& memory) {
  constexpr int kEach = Shape::kWeightRows * 32 / Shape::kCopiers;
  const std::int64_t row_bytes = static_cast<std::int64_t>(args.num_blocks) * kWeightBlockBytes;
  int stage = 0, parity = 0;
  for_each_square<Shape>(args, [&](int, int output_tile, int) {
    const std::uint8_t* from[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      // What lies beyond the last output is not stored.
      const int row =
          min(output_tile * Shape::kWeightRows + i * (Shape::kCopiers / 32) + thread / 32,
              num_weight_rows - 1);
      from[i] = args.packed + row * row_bytes + thread % 32 * 16;
    }
    fill_stages<Shape>(args, memory, stage, parity, [&](int, int to) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        copy_async(&memory.weights[to][i * (Shape::kCopiers / 32) + thread / 32][thread % 32],
                   from[i], true);
        from[i] += kWeightBlockBytes;
      }
      memory.full[to].arrive_after_copies();
    });
  });
}

/// Stores a warpgroup's 128 outputs x 128 rows of two bytes each from shared memory.
template <typename Y>
__device__ inline void store_staged(const uint4 (*outputs)[16], std::int64_t first_row,
                                    int first_column, std::int64_t m, const Output<Y>& out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, chunk = lane % 16;
  const int first = 2 * warp + lane / 16;  // of every eighth row
  const uint4* from = &outputs[first][chunk ^ first];
  if (out.n % 8 != 0 || first_row + 128 > m || first_column + 128 > out.n) {
#pragma unroll 1
    for (int row = 0; row < 128; row += 8) {
      store_eight(from[16 * row], first_row + first + row, first_column + 8 * chunk, m, out);
    }
    return;
  }
  // Without branches, so that many loads are on their way.
  constexpr int kAtOnce = 8;
  const std::int64_t at = (first_row + first) * out.n + first_column + 8 * chunk;
  const std::int64_t step = 8 * out.n;
  Y* to = out.y + at;
  const Y* residual = out.residual + at;
#pragma unroll 1
  for (int row = 0; row < 128; row += 8 * kAtOnce) {
    uint4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = from[16 * (row + 8 * i)];
    if (out.residual != nullptr) {
      uint4 added[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        added[i] = *reinterpret_cast<const uint4*>(residual + i * step);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Y a[8], b[8];
        memcpy(a, &values[i], 16);
        memcpy(b, &added[i], 16);
#pragma unroll
        for (int j = 0; j < 8; ++j) a[j] = from_float<Y>(to_float(b[j]) + to_float(a[j]));
        memcpy(&values[i], a, 16);
      }
      residual += kAtOnce * step;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) *reinterpret_cast<uint4*>(to + i * step) = values[i];
    to += kAtOnce * step;
  }
}

/// Stores a warpgroup's 128 outputs x 128 rows. Its threads have met since the factors were
/// written and the last tile was stored.
/// @param sync Lets the warpgroup meet.
template <Activation kActivation, typename Y, typename Sync>
__device__ inline void store_square(const WgmmaSum<kActivation> (&acc)[2][64],
                                    const RowFactors* factors, const float (&weight_scale)[2][2],
                                    std::int64_t first_row, int first_column, std::int64_t m,
                                    const Output<Y>& out, uint4 (*outputs)[16], Sync sync) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
  if constexpr (sizeof(Y) == 2) {
    // Matrix 2 j + half goes to rows 8 j ... and outputs 8 half ... of the warp's 16.
    const int in_rows = lane % 8, matrix = lane / 8;
    const std::uint32_t to =
        shared_address(&outputs[8 * (matrix / 2) + in_rows][(2 * warp + matrix % 2) ^ in_rows]);
    RowFactors next[4];
    const auto fetch = [&](int rows) {
#pragma unroll
      for (int i = 0; i < 4; ++i) next[i] = factors[rows + 8 * (i / 2) + 2 * t + i % 2];
    };
    fetch(0);
#pragma unroll
    for (int rows = 0; rows < 128; rows += 16) {
      const RowFactors row[4] = {next[0], next[1], next[2], next[3]};
      if (rows + 16 < 128) fetch(rows + 16);
#pragma unroll
      for (int fragment = 0; fragment < 2; ++fragment) {
        std::uint32_t packed[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          Y values[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            values[i] = from_float<Y>(
                wgmma_value<kActivation, Y>(acc[fragment][rows / 2 + 2 * x + i], row[x / 2 * 2 + i],
                                            weight_scale[fragment][x % 2]));
          }
          memcpy(&packed[x], values, 4);
        }
        store_matrices(to + rows * 256 + fragment * 128, packed);
      }
    }
    sync();
    store_staged(outputs, first_row, first_column, m, out);
  } else {
#pragma unroll
    for (int fragment = 0; fragment < 2; ++fragment) {
      store_rows<8, kActivation, Y>(acc[fragment], factors, weight_scale[fragment], first_row,
                                    first_column + 64 * fragment + 16 * warp, m, out, nullptr);
    }
  }
}

/// The multiplying warpgroups.
template <typename Shape, Activation kActivation, typename Y>
__device__ inline void multiply_squares(const WgmmaArgs& args, const Output<Y>& out,
                                        SquareMemory<Shape>& memory) {
  using Sum = WgmmaSum<kActivation>;
  const int group = __shfl_sync(0xffffffffU, threadIdx.x / 128 - 1, 0);  // uniform, 0 or 1
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
  const auto sync = [&] { named_sync<128>(group + 1); };
  const int num_blocks = args.num_blocks;
  int stage = 0, parity = 0;
  const auto advance = [&](int blocks) {
    stage += blocks;
    while (stage >= Shape::kStages) {
      stage -= Shape::kStages;
      parity ^= 1;
    }
  };
  // Each lane for itself: one for all, behind a barrier of the warp, is as safe, but racecheck sees
  // an order only between those who arrive and those who wait.
  const auto release = [&](int old) { memory.empty[old].arrive(); };
  wait_for_previous_kernel();
  for_each_square<Shape>(args, [&](int row_tile, int output_tile, int turn) {
    if (Shape::kTurns && turn % 2 != group) {
      advance(num_blocks);
      return;
    }
    const std::int64_t first_row = static_cast<std::int64_t>(row_tile) * Shape::kRows;
    const int first_column = output_tile * Shape::kOutputs + (Shape::kTurns ? 0 : 128 * group);
    // What the end needs is on its way meanwhile.
    float s = 1.0F;
    int row_sum = 0;
    if (first_row + thread < args.m) {
      s = args.rows.s[first_row + thread];
      row_sum = args.rows.sums[first_row + thread];
    }
    float weight_scale[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = first_column + 64 * (i / 2) + 16 * warp + lane / 4 + 8 * (i % 2);
      weight_scale[i / 2][i % 2] = column < out.n ? column_scale(out, column) : 0.0F;
    }
    Sum acc[2][64];
    std::uint32_t codes[2][2][2][4];  // half a block is unpacked while the other is multiplied
    uint4 words[2];
    const auto take = [&] {
      memory.full[stage].wait(parity);
#pragma unroll
      for (int fragment = 0; fragment < 2; ++fragment) {
        words[fragment] =
            memory.weights[stage][(Shape::kTurns ? 0 : 8 * group) + 4 * fragment + warp][lane];
      }
    };
    // A stage's phase is told from its neighbours only, so that no one may wait for a later one.
    if (Shape::kTurns && turn > 0) memory.turn[group].wait((turn - 1) / 2 & 1);
    take();
    const auto pass_turn = [&] {
      if (Shape::kTurns && lane == 0) memory.turn[1 - group].arrive();
    };
    if (num_blocks == 1) pass_turn();
#pragma unroll 1
    for (int i = 0; i < num_blocks; ++i) {
      const int now = stage;
      const std::uint64_t rows = swizzled_rows(memory.stages[now]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int fragment = 0; fragment < 2; ++fragment) {
          const uint4& w = words[fragment];
          unpack_wgmma<kActivation>(half == 0 ? w.x : w.z, codes[half][fragment][0]);
          unpack_wgmma<kActivation>(half == 0 ? w.y : w.w, codes[half][fragment][1]);
        }
#pragma unroll
        for (int x = 0; x < 4; ++x) settle(codes[half][x / 2][x % 2]);
        wgmma_fence();
#pragma unroll
        for (int word = 0; word < 2; ++word) {
#pragma unroll
          for (int fragment = 0; fragment < 2; ++fragment) {
            wgmma(acc[fragment], codes[half][fragment][word], rows + 2 * (2 * half + word),
                  i > 0 || half > 0 || word > 0);
          }
        }
        wgmma_commit();
        if (half == 1) {
          advance(1);
          if (i + 1 < num_blocks) take();
          if (i + 2 == num_blocks) pass_turn();
        }
        wgmma_wait<1>();
        if (half == 0 && i > 0) release(now == 0 ? Shape::kStages - 1 : now - 1);
      }
    }
    wgmma_wait<0>();
    release(stage == 0 ? Shape::kStages - 1 : stage - 1);
    memory.rows[group][thread] = row_factors(s, row_sum);
    sync();
    store_square<kActivation, Y>(acc, memory.rows[group], weight_scale, first_row, first_column,
                                 args.m, out, memory.outputs[group], sync);
    if constexpr (sizeof(Y) != 2) sync();
  });
}

}  // namespace detail

#endif  // TINYLM_HOPPER

/// Thread blocks of kWgmmaThreads, any number of them: they walk over the tiles.
template <typename Shape, Activation kActivation, typename Y>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    ternary_square(const __grid_constant__ WgmmaArgs args, const __grid_constant__ Output<Y> out) {
#ifdef TINYLM_HOPPER
  extern __shared__ __align__(1024) std::uint8_t square_memory[];
  auto& memory = *reinterpret_cast<SquareMemory<Shape>*>(square_memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      memory.full[i].init(1 + Shape::kCopiers);
      memory.empty[i].init(Shape::kTurns ? 128 : 256);  // threads that read a stage
    }
    for (CopyBarrier& turn : memory.turn) turn.init(4);
    fence_shared_memory();
  }
  __syncthreads();
  launch_next_kernel();
  if (threadIdx.x < kWgmmaProducers) {
    give_registers<40>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      wait_for_previous_kernel();
      if (threadIdx.x == 0) detail::copy_square_rows<Shape>(args, memory);
    } else if (warp <= Shape::kCopiers / 32) {
      // Weights don't depend on the kernel before.
      if (args.limits.past_lens != nullptr) wait_for_previous_kernel();
      detail::copy_square_weights<Shape>(args, static_cast<int>((out.n + 15) / 16),
                                         threadIdx.x - 32, memory);
    }
  } else {
    take_registers<232>();
    detail::multiply_squares<Shape, kActivation, Y>(args, out, memory);
  }
#endif
}

}  // namespace tinylm::cuda
