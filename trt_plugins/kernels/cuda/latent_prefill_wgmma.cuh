// latent_prefill() for Hopper: FlashAttention-3's (2407.08608) division of labour. One warpgroup
// copies queries, keys and values; each of the others has 64 queries, and its scores, weights and
// output in registers. While one warpgroup takes exponentials, the tensor cores work for the
// others.
//
// Persistent: each thread block takes tiles of queries, the longest first, in an order like a
// snake's, so that all end together; the next tile's operands are copied during the last one.
#pragma once

#include "async_copy.cuh"
#include "cluster.cuh"
#include "half_wgmma.cuh"
#include "latent_expand.cuh"
#include "latent_prefill.cuh"

namespace tinylm::cuda {

/// Sizes of latent_prefill_wgmma(). Panels are 64 columns of a tile, 128 bytes a row.
template <int kKeyDim, int kValueDim>
struct WgmmaPrefill {
  static constexpr int kGroups = kKeyDim <= 96 && kValueDim <= 64 ? 3 : 2;  // of 64 queries
  static constexpr int kQueries = 64 * kGroups, kKeys = 128;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kRegisters = kGroups == 3 ? 160 : 232;
  static constexpr int kCopyRegisters = kGroups == 3 ? 32 : 40;
  // What the warpgroups take must be there: a thread block gets as many registers a thread as
  // divide 65536 among its threads, rounded down to 8, and would wait for more for ever.
  static_assert(kGroups * kRegisters + kCopyRegisters <= (kGroups + 1) * (65536 / kThreads / 8 * 8),
                "registers");
  static constexpr int kKeyPanels = (kKeyDim + 63) / 64, kValuePanels = kValueDim / 64;
  static constexpr int kPanelBytes = kKeys * 128;
  static constexpr int kStageBytes = (kKeyPanels + kValuePanels) * kPanelBytes;
  static constexpr int kQueryBytes = kKeyPanels * kQueries * 128;
  static constexpr int kStages = kKeyDim <= 64 ? 4 : kKeyDim <= 96 ? 3 : 2;
  static constexpr int kQueryStages = kKeyDim <= 64 ? 2 : 1;
  static constexpr int kStage0 = kQueryStages * kQueryBytes;
  // Of each stage of keys: full, empty; of each of queries: rotated, empty.
  static constexpr int kBarriers = kStage0 + kStages * kStageBytes;
  static constexpr int kBytes =  // 1024: to align the rest
      1024 + kBarriers + 16 * (kStages + kQueryStages);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace detail {

/// A tile of queries of one head and batch row.
struct PrefillTile {
  int b, row, head, first;  // b: batch row; row: the same from first_row on; first: query
  int past, fresh, num_keys;

  /// Keys that queries before `end` of this tile see, rounded up to tiles of them.
  __device__ int key_tiles(int end, int keys) const {
    if (first >= fresh) return 0;
    return (min(past + min(end, fresh), num_keys) + keys - 1) / keys;
  }
};

template <int kQueries, typename T>
__device__ inline PrefillTile prefill_tile(const LatentArgs<T>& args, int first_row, int rows,
                                           int item) {
  const int each = args.num_heads * rows;
  const int tiles = (args.length + kQueries - 1) / kQueries;
  PrefillTile tile{};
  tile.first = (tiles - 1 - item / each) * kQueries;
  tile.head = item % each % args.num_heads;
  tile.row = item % each / args.num_heads;
  tile.b = first_row + tile.row;
  tile.past = args.past_lens[tile.b];
  tile.fresh = args.seq_lens[tile.b];
  tile.num_keys = min(tile.past + tile.fresh, args.capacity);
  return tile;
}

/// This thread's warpgroup; the compiler sees that it is the same for a warp.
__device__ inline int warpgroup() {
  return __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x / 128), 0);
}

/// The item of this thread block's turn: turns go back and forth.
__device__ inline int snake(int turn) {
  const int block = turn % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  return turn * gridDim.x + block;
}

/// Offset of 8 columns of a row in a tile of panels.
__device__ inline int panel_offset(int row, int column, int panel_bytes) {
  return column / 64 * panel_bytes + row * 128 + ((column % 64 / 8) ^ (row % 8)) * 16;
}

/// Copies one tile of keys and values by a warpgroup: a thread has 8 columns of every 16th row.
template <int kKeyDim, int kValueDim, typename T>
__device__ inline void copy_keys(const LatentArgs<T>& args, const PrefillTile& tile, int key,
                                 const T* expanded, unsigned char* stage) {
  using Sizes = WgmmaPrefill<kKeyDim, kValueDim>;
  const int head_width = args.nope_dim + kValueDim;
  const int width = args.num_heads * head_width;
  const int row = threadIdx.x % 128 / 8, piece = threadIdx.x % 8;
  const int num_rows = tile.num_keys - key;
  const T* source = expanded + (static_cast<std::int64_t>(tile.row) * args.capacity + key) * width +
                    tile.head * head_width;
  const T* rope =
      args.rope + (static_cast<std::int64_t>(tile.b) * args.capacity + key) * args.rope_dim;
  std::uint32_t to = shared_address(stage) + panel_offset(row, 8 * piece, 0);
#pragma unroll
  for (int panel = 0; panel < Sizes::kKeyPanels + Sizes::kValuePanels; ++panel) {
    int column = 64 * panel + 8 * piece, stride = width;
    const T* from = source + column;
    if (panel >= Sizes::kKeyPanels) {
      from += args.nope_dim - 64 * Sizes::kKeyPanels;
    } else if (column >= kKeyDim) {
      to += Sizes::kPanelBytes;
      continue;
    } else if (column >= args.nope_dim) {
      from = rope + column - args.nope_dim;
      stride = args.rope_dim;
    }
    from += static_cast<std::int64_t>(row) * stride;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = 16 * i + row < num_rows;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + i * 2048),
                   "l"(exists ? from : expanded), "r"(exists ? 16 : 0));
      from += 16 * stride;
    }
    to += Sizes::kPanelBytes;
  }
}

/// A tile of queries by a warpgroup: the last columns, rotated in float32, are stored, the others
/// are being copied.
template <int kKeyDim, int kQueries, typename T>
__device__ inline void copy_queries(const LatentArgs<T>& args, const PrefillTile& tile,
                                    const float2* angles, unsigned char* to) {
  const int half = args.rope_dim / 2, plain = args.nope_dim / 8, turned = half / 8;
  const int thread = threadIdx.x % 128;
  const std::int64_t token = static_cast<std::int64_t>(tile.b) * args.length + tile.first;
  const T* queries = args.qkv + token * args.width + tile.head * kKeyDim;
  const int num_rows = tile.fresh - tile.first;
  for (int i = thread; i < kQueries * plain; i += 128) {
    const int row = i / plain, column = i % plain * 8;
    const bool exists = row < num_rows;
    const T* from = queries + static_cast<std::int64_t>(exists ? row : 0) * args.width + column;
    copy_async(to + panel_offset(row, column, kQueries * 128), from, exists);
  }
#pragma unroll 1
  for (int i = thread; i < kQueries * turned; i += 128) {
    const int row = i / turned, pair = i % turned * 8, column = args.nope_dim + pair;
    uint4 first{}, second{};
    if (row < num_rows) {
      const T* from = queries + static_cast<std::int64_t>(row) * args.width + column;
      first = *reinterpret_cast<const uint4*>(from);
      second = *reinterpret_cast<const uint4*>(from + half);
      const auto* turns = reinterpret_cast<const float4*>(angles + (token + row) * half + pair);
      std::uint32_t* x[2] = {&first.x, &second.x};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 two = turns[j];  // cosine and sine, twice
        const float2 a = unpack2<T>(x[0][j]), b = unpack2<T>(x[1][j]);
        x[0][j] = pack2<T>(a.x * two.x - b.x * two.y, a.y * two.z - b.y * two.w);
        x[1][j] = pack2<T>(b.x * two.x + a.x * two.y, b.y * two.z + a.y * two.w);
      }
    }
    *reinterpret_cast<uint4*>(to + panel_offset(row, column, kQueries * 128)) = first;
    *reinterpret_cast<uint4*>(to + panel_offset(row, column + half, kQueries * 128)) = second;
  }
}

__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Largest scores so far of a lane's two rows, and what becomes of sums relative to those before.
__device__ inline void raise_most(const float (&scores)[64], float factor, float (&most)[2],
                                  float (&keep)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest[4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float pair = fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]);
      largest[i % 4] = i < 4 ? pair : fmaxf(largest[i % 4], pair);
    }
    float now = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
    now = fmaxf(now, __shfl_xor_sync(0xffffffffU, now, 1));
    now = fmaxf(now, __shfl_xor_sync(0xffffffffU, now, 2));
    // Not-a-number and the first tile raise it. Weights up to 2^8 do no harm, and rescaling is
    // rare.
    const bool stays = (now - most[r]) * factor <= 8.0F;
    keep[r] = stays ? 1.0F : power_of_2((most[r] - now) * factor);
    most[r] = stays ? most[r] : now;
  }
}

/// Weights of 128 keys, as operands of 16 keys each, and their sums.
template <typename T>
__device__ inline void exponentials(const float (&scores)[64], float factor, const float (&most)[2],
                                    const float (&keep)[2], float (&total)[2],
                                    std::uint32_t (&weights)[8][4]) {
  const float offset[2] = {most[0] * factor, most[1] * factor};
  float sums[2][2] = {};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    // Words 0 .. 3 of 16 keys: rows g and g + 8 of the first 8, then of the others.
    const int r = i % 2;
    const float low = power_of_2(fmaf(scores[2 * i], factor, -offset[r]));
    const float high = power_of_2(fmaf(scores[2 * i + 1], factor, -offset[r]));
    sums[r][0] += low;
    sums[r][1] += high;
    weights[i / 4][i % 4] = pack2<T>(low, high);
  }
  for (int r = 0; r < 2; ++r) total[r] = fmaf(total[r], keep[r], sums[r][0] + sums[r][1]);
}

/// Scores of a warpgroup's queries with one tile of keys, issued.
template <int kKeyDim, int kValueDim, typename T>
__device__ inline void issue_scores(float (&scores)[64], std::uint32_t queries,
                                    std::uint32_t keys) {
  using Sizes = WgmmaPrefill<kKeyDim, kValueDim>;
  const std::uint64_t a = wgmma_operand(queries), b = wgmma_operand(keys);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kKeyDim / 16; ++k) {
    const int panel = k / 4, step = k % 4 * 2;  // in 16 bytes
    wgmma_keys(scores, a + panel * Sizes::kQueries * 8 + step,
               b + panel * Sizes::kPanelBytes / 16 + step, k > 0, T{});
  }
  wgmma_commit();
}

}  // namespace detail

/// Stores a warp's 16 rows of outputs, those before num_rows, by way of shared memory: whole rows
/// reach memory at once.
template <int kPanels, typename T>
__device__ inline void store_outputs(const float (&acc)[kPanels][32], const float (&factor)[2],
                                     const bool (&fits)[2], unsigned char* rows, int panel_bytes,
                                     T* y, std::int64_t y_stride, int num_rows) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < kPanels * 8; ++i) {
      const float* pair = acc[i / 8] + i % 8 * 4 + 2 * r;
      const std::uint32_t word = detail::pack2<T>(fits[r] ? pair[0] * factor[r] : NAN,
                                                  fits[r] ? pair[1] * factor[r] : NAN);
      *reinterpret_cast<std::uint32_t*>(rows + detail::panel_offset(g + 8 * r, 8 * i, panel_bytes) +
                                        4 * t) = word;
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPanels * 4; ++i) {
    const int piece = lane + 32 * i, row = piece / (8 * kPanels), column = piece % (8 * kPanels);
    if (row >= num_rows) break;
    *reinterpret_cast<uint4*>(y + row * y_stride + 8 * column) =
        *reinterpret_cast<const uint4*>(rows + detail::panel_offset(row, 8 * column, panel_bytes));
  }
}

/// A warpgroup's part of latent_prefill_wgmma(): 64 queries of each tile.
template <int kKeyDim, int kValueDim, typename T>
__device__ inline void prefill_queries(const LatentArgs<T>& args, int first_row, int rows,
                                       int num_items, unsigned char* memory) {
  using Sizes = WgmmaPrefill<kKeyDim, kValueDim>;
  constexpr int kPanels = Sizes::kValuePanels;
  const int group = detail::warpgroup() - 1, warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const std::uint32_t base = shared_address(memory), stages = base + Sizes::kStage0;
  const std::uint32_t full = base + Sizes::kBarriers, empty = full + 8 * Sizes::kStages;
  const std::uint32_t rotated = empty + 8 * Sizes::kStages;
  const float factor = args.softmax_scale * 1.4426950408889634F;
  int used = 0, used_queries = 0;  // stages so far
  const auto wait_full = [&](int i) {
    detail::barrier_wait(full + 8 * (i % Sizes::kStages), i / Sizes::kStages % 2);
    fence_shared_memory();  // cp.async is not of wgmma's proxy
  };
  const auto release = [&](int i) {
    if (lane == 0) detail::barrier_arrive(empty + 8 * (i % Sizes::kStages));
  };
  const auto stage = [&](int i) { return stages + i % Sizes::kStages * Sizes::kStageBytes; };

  for (int turn = 0; turn * gridDim.x < num_items; ++turn) {
    const int item = detail::snake(turn);
    if (item >= num_items) continue;
    const auto tile = detail::prefill_tile<Sizes::kQueries>(args, first_row, rows, item);
    const int all_tiles = tile.key_tiles(tile.first + Sizes::kQueries, Sizes::kKeys);
    const int first = tile.first + 64 * group;
    const int num_tiles = first < tile.fresh ? tile.key_tiles(first + 64, Sizes::kKeys) : 0;
    float acc[kPanels][32] = {}, total[2] = {}, most[2] = {-INFINITY, -INFINITY};
    const int query_offset = used_queries % Sizes::kQueryStages * Sizes::kQueryBytes + group * 8192;
    const std::uint32_t queries = base + query_offset;
    if (num_tiles > 0) {
      float scores[64];
      std::uint32_t weights[8][4];
      detail::barrier_wait(rotated + 8 * (used_queries % Sizes::kQueryStages),
                           used_queries / Sizes::kQueryStages % 2);
      wait_full(used);
      // The zeros come before the first product, or else ptxas lets no two products overlap.
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) detail::hold_registers(acc[panel]);
      detail::issue_scores<kKeyDim, kValueDim, T>(scores, queries, stage(used));
      wgmma_wait<0>();
      detail::hold_registers(scores);
      const int query = first + warp * 16 + g;  // and + 8
      const auto weigh = [&](int j) {
        const int key = j * Sizes::kKeys;
        if (key + Sizes::kKeys > tile.past + first + 1 || key + Sizes::kKeys > tile.num_keys) {
#pragma unroll
          for (int i = 0; i < 64; ++i) {
            const int at = key + i / 4 * 8 + 2 * t + i % 2;
            if (at > tile.past + query + i % 4 / 2 * 8 || at >= tile.num_keys) {
              scores[i] = -INFINITY;
            }
          }
        }
        float keep[2];
        detail::raise_most(scores, factor, most, keep);
        wgmma_wait<0>();  // the weighted values before
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) detail::hold_registers(acc[panel]);
        if (j > 0) release(used + j - 1);
        if (__any_sync(0xffffffffU, keep[0] != 1.0F || keep[1] != 1.0F)) {
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
            for (int i = 0; i < 32; ++i) acc[panel][i] *= keep[i % 4 / 2];
          }
        }
        detail::exponentials<T>(scores, factor, most, keep, total, weights);
      };
      const auto issue_values = [&](int j) {
        const std::uint64_t values =
            detail::wgmma_operand(stage(used + j) + Sizes::kKeyPanels * Sizes::kPanelBytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            const int offset = (panel * Sizes::kPanelBytes + k * 2048) / 16;
            detail::wgmma_values(acc[panel], weights[k], values + offset, T{});
          }
        }
        wgmma_commit();
      };
      for (int j = 0; j + 1 < num_tiles; ++j) {
        weigh(j);
        wait_full(used + j + 1);
        detail::issue_scores<kKeyDim, kValueDim, T>(scores, queries, stage(used + j + 1));
        issue_values(j);
        wgmma_wait<1>();  // the next scores
        detail::hold_registers(scores);
      }
      weigh(num_tiles - 1);
      issue_values(num_tiles - 1);
      wgmma_wait<0>();
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) detail::hold_registers(acc[panel]);
      release(used + num_tiles - 1);
    }
    for (int j = num_tiles; j < all_tiles; ++j) {  // others' queries see more
      wait_full(used + j);
      release(used + j);
    }
    used += all_tiles;

    const std::int64_t y_stride = static_cast<std::int64_t>(args.num_heads) * kValueDim;
    const int row = first + warp * 16, num_rows = min(16, args.length - row);
    T* y = args.y + (static_cast<std::int64_t>(tile.b) * args.length + row) * y_stride +
           tile.head * kValueDim;
    if (num_tiles > 0) {
      float inverse[2];
      bool fits[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(0xffffffffU, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffU, total[r], 2);
        const bool valid = row + g + 8 * r < tile.fresh;
        inverse[r] = valid ? 1.0F / total[r] : 0.0F;
        fits[r] = !valid || tile.past + row + g + 8 * r < args.capacity;
      }
      named_sync<128>(1 + group);  // the warpgroup has multiplied its queries
      store_outputs<kPanels>(acc, inverse, fits, memory + query_offset + warp * 2048,
                             Sizes::kQueries * 128, y, y_stride, num_rows);
    } else {
      for (int i = lane; i < num_rows * kValueDim / 8; i += 32) {
        *reinterpret_cast<uint4*>(y + i / (kValueDim / 8) * y_stride + i % (kValueDim / 8) * 8) =
            uint4{};
      }
    }
    if (all_tiles > 0) {
      __syncwarp();
      if (lane == 0) {
        const int i = used_queries % Sizes::kQueryStages;
        detail::barrier_arrive(rotated + 8 * (Sizes::kQueryStages + i));
      }
      ++used_queries;
    }
  }
}

/// The copying warpgroup's part of latent_prefill_wgmma(). A tile of queries comes with the first
/// of its keys.
template <int kKeyDim, int kValueDim, typename T>
__device__ inline void prefill_copies(const LatentArgs<T>& args, int first_row, int rows,
                                      int num_items, const T* expanded, const float2* angles,
                                      unsigned char* memory) {
  using Sizes = WgmmaPrefill<kKeyDim, kValueDim>;
  const std::uint32_t full = shared_address(memory) + Sizes::kBarriers;
  const std::uint32_t empty = full + 8 * Sizes::kStages, queries = empty + 8 * Sizes::kStages;
  int used = 0, used_queries = 0;
  for (int turn = 0; turn * gridDim.x < num_items; ++turn) {
    const int item = detail::snake(turn);
    if (item >= num_items) continue;
    const auto tile = detail::prefill_tile<Sizes::kQueries>(args, first_row, rows, item);
    const int num_tiles = tile.key_tiles(tile.first + Sizes::kQueries, Sizes::kKeys);
    if (num_tiles > 0) {
      const int i = used_queries % Sizes::kQueryStages, before = used_queries / Sizes::kQueryStages;
      if (before > 0)
        detail::barrier_wait(queries + 8 * (Sizes::kQueryStages + i), (before - 1) % 2);
      detail::copy_queries<kKeyDim, Sizes::kQueries>(args, tile, angles,
                                                     memory + i * Sizes::kQueryBytes);
      fence_shared_memory();
      detail::barrier_arrive(queries + 8 * i);
      ++used_queries;
    }
    if (turn == 0) wait_for_previous_kernel();  // for what is expanded
    for (int j = 0; j < num_tiles; ++j, ++used) {
      const int i = used % Sizes::kStages;
      if (used >= Sizes::kStages) {
        detail::barrier_wait(empty + 8 * i, (used / Sizes::kStages - 1) % 2);
      }
      detail::copy_keys<kKeyDim, kValueDim>(args, tile, j * Sizes::kKeys, expanded,
                                            memory + Sizes::kStage0 + i * Sizes::kStageBytes);
      // Arrives when this thread's copies so far have come.
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full + 8 * i)
                   : "memory");
    }
  }
  detail::wait_for_copies<0>();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// As latent_prefill(), on sm_90a only. Grid: at most one thread block a multiprocessor.
template <int kKeyDim, int kValueDim, typename T>
__global__ void __launch_bounds__(WgmmaPrefill<kKeyDim, kValueDim>::kThreads, 1)
    latent_prefill_wgmma(const __grid_constant__ LatentArgs<T> args, int first_row, int rows,
                         const T* expanded, const float2* angles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Sizes = WgmmaPrefill<kKeyDim, kValueDim>;
  extern __shared__ __align__(1024) unsigned char prefill_memory[];
  const std::uint32_t misaligned = shared_address(prefill_memory) % 1024;
  unsigned char* memory = prefill_memory + (1024 - misaligned) % 1024;
  const std::uint32_t full = shared_address(memory) + Sizes::kBarriers;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Sizes::kStages; ++i) {
      detail::barrier_init(full + 8 * i, 128);
      detail::barrier_init(full + 8 * (Sizes::kStages + i), 4 * Sizes::kGroups);
    }
    for (int i = 0; i < Sizes::kQueryStages; ++i) {
      const std::uint32_t rotated = full + 8 * (2 * Sizes::kStages + i);
      detail::barrier_init(rotated, 128);
      detail::barrier_init(rotated + 8 * Sizes::kQueryStages, 4 * Sizes::kGroups);
    }
  }
  // latent_expand() lets this begin when latent_append() has ended: angles need no wait. The
  // kernels that expand other ranks do not.
  if (args.rank % kExpandMultiple != 0) wait_for_previous_kernel();
  launch_next_kernel();
  __syncthreads();
  const int tiles = (args.length + Sizes::kQueries - 1) / Sizes::kQueries;
  const int num_items = tiles * args.num_heads * rows;
  if (detail::warpgroup() == 0) {
    give_registers<Sizes::kCopyRegisters>();
    prefill_copies<kKeyDim, kValueDim>(args, first_row, rows, num_items, expanded, angles, memory);
  } else {
    take_registers<Sizes::kRegisters>();
    wait_for_previous_kernel();
    prefill_queries<kKeyDim, kValueDim>(args, first_row, rows, num_items, memory);
  }
  __syncthreads();  // all end together, for racecheck: others still use barriers of some warps
#endif
}

}  // namespace tinylm::cuda
