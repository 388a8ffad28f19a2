// One new token a row over the int8 latents, in one launch: append, absorb, attend, combine,
// up-project. A cluster of thread blocks has a row and 16 heads and shares its tokens, tile by
// tile; partial results meet in distributed shared memory, in a fixed order.
//
// A warp scores 16 tokens of a tile (16 heads are the 16 rows of mma.m16n8k16), then sums 1/8 of
// the latent dimensions over all 128. Latents are exact in half; queries and weights are rounded to
// it, after a power of two and relative to the largest. A token's 1/s is part of its weight:
// w = 2^(score - log2 s - most) <= 1, and the sum of weights is that of w s.
#pragma once

#include "cluster_query.cuh"
#include "cluster_values.cuh"
#include "latent_prefill.cuh"
#include "latent_tensor.cuh"

namespace tinylm::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace detail {

__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], std::uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

/// Pieces of 16 bytes of a latent row are exchanged, so that neither a row's words nor its
/// transposed matrices meet in a bank.
__device__ inline int swizzle(int token) { return (token & 1) << 2 | (token >> 1 & 3); }
/// The same for pieces of 32 bytes of a key: 16, 32 or 64 dimensions.
template <int kRope>
__device__ inline int rope_swizzle(int token) {
  return (kRope == 32 ? token >> 1 : token) & (kRope / 16 - 1);
}

/// Copies `count` of 16 rows of kPieces times 16 bytes, by a warp; zeros follow.
/// @param swizzle Of a row: what its pieces' numbers are changed by, bit by bit.
template <int kPieces, int kStride, typename Swizzle>
__device__ inline void copy_rows(int lane, const void* rows, int count, unsigned char* to,
                                 Swizzle swizzle) {
  const auto* from = static_cast<const unsigned char*>(rows) + 16 * lane;
  if constexpr (32 % kPieces == 0) {
    if (count >= 16) {  // few instructions: the addresses differ by constants
      constexpr int kRows = 32 / kPieces;
      const int row = lane / kPieces, piece = lane % kPieces ^ swizzle(row);
      to += row * kStride;
#pragma unroll
      for (int i = 0; i < kPieces / 2; ++i) {
        copy_async(to + i * kRows * kStride + (piece ^ swizzle(i * kRows)) * 16, from + 512 * i);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    const int row = (lane + 32 * i) / kPieces, piece = (lane + 32 * i) % kPieces;
    const bool exists = row < count;
    copy_async(to + row * kStride + (piece ^ swizzle(row)) * 16, from + (exists ? 512 * i : 0),
               exists);
  }
}

/// Copies a warp's 16 tokens of a tile, those before `limit`.
template <int kRank, int kRope, typename T>
__device__ inline void copy_tokens(const LatentArgs<T>& args, const ClusterPlace& at, int first,
                                   int limit, unsigned char* stage) {
  using Memory = ClusterMemory<kRank, kRope>;
  first += 16 * at.warp;
  if (first >= limit) return;
  const std::int64_t slot = static_cast<std::int64_t>(at.b) * args.capacity + first;
  copy_rows<kRank / 16, Memory::kLatentStride>(at.lane, args.latent + slot * kRank, limit - first,
                                               stage + 16 * at.warp * Memory::kLatentStride,
                                               [](int row) { return swizzle(row); });
  constexpr int kKeyBytes = 2 * kRope;
  copy_rows<kRope / 8, kKeyBytes>(at.lane, args.rope + slot * kRope, limit - first,
                                  stage + Memory::kStageRope + 16 * at.warp * kKeyBytes,
                                  [](int row) { return rope_swizzle<kRope>(row) << 1; });
  if (at.lane < 16 && first + at.lane < limit) {
    const auto to = shared_address(stage + Memory::kStageScale + 4 * (16 * at.warp + at.lane));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to),
                 "l"(args.scale + slot + at.lane));
  }
}

/// Puts the new token into its warp's tile.
template <int kRank, int kRope>
__device__ inline void insert_fresh(int lane, int row, const unsigned char* memory,
                                    unsigned char* stage) {
  using Memory = ClusterMemory<kRank, kRope>;
  unsigned char* latent = stage + row * Memory::kLatentStride;
  unsigned char* rope = stage + Memory::kStageRope + row * 2 * kRope;
  if (lane < kRank / 16) {
    *reinterpret_cast<uint4*>(latent + (lane ^ swizzle(row)) * 16) =
        *reinterpret_cast<const uint4*>(memory + Memory::kFresh + 16 * lane);
  }
  if (lane < kRope / 8) {
    *reinterpret_cast<uint4*>(rope + (lane ^ rope_swizzle<kRope>(row) << 1) * 16) =
        *reinterpret_cast<const uint4*>(memory + Memory::kFreshRope + 16 * lane);
  }
  if (lane == 0) {
    *reinterpret_cast<float*>(stage + Memory::kStageScale + 4 * row) =
        *reinterpret_cast<const float*>(memory + Memory::kFreshScale);
  }
  __syncwarp();
}

}  // namespace detail

/// What a warp has of attention: heads g and g + 8.
template <int kRank>
struct ClusterSums {
  static constexpr int kChunks = (kRank / 16 + kClusterWarps - 1) / kClusterWarps;
  float acc[2 * kChunks][4] = {};  // 16 latent dimensions a chunk: even ones, odd ones
  float most[2] = {-INFINITY, -INFINITY};
  float total[2] = {}, weights[2] = {};  // of this warp's tokens: sums of w s and of w
};

/// One tile of 128 tokens, of which `count` are visible.
template <int kRank, int kRope, typename T>
__device__ inline void attend_tile(const LatentArgs<T>& args, const ClusterPlace& at, int count,
                                   const float (&factor)[2], unsigned char* memory,
                                   const unsigned char* stage, ClusterSums<kRank>& sums) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kStride = Memory::kLatentStride, kChunks = ClusterSums<kRank>::kChunks;
  const int lane = at.lane, warp = at.warp, g = lane / 4, t = lane % 4;
  const float rope_factor = args.softmax_scale * 1.4426950408889634F;

  // Scores. Word w of a lane's 16 bytes is one product's: k indices 2 t, 2 t + 1, 2 t + 8, 2 t + 9
  // of the operands are its bytes 0 .. 3.
  float score[2][2][4] = {}, rope_score[2][4] = {};
  const unsigned char* row = stage + (16 * warp + g) * kStride;
  const int offset = (t ^ detail::swizzle(g)) * 16;
  const unsigned char* query =
      memory + Memory::kQuery + lane % 16 * Memory::kQueryStride + lane / 16 * 16;
#pragma unroll
  for (int k = 0; k < kRank / 64; ++k) {
    const int column = (offset ^ (k & 1) * 64) + k / 2 * 128;
    const uint4 c0 = *reinterpret_cast<const uint4*>(row + column);
    const uint4 c1 = *reinterpret_cast<const uint4*>(row + 8 * kStride + column);
    const std::uint32_t words[2][4] = {{c0.x, c0.y, c0.z, c0.w}, {c1.x, c1.y, c1.z, c1.w}};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      std::uint32_t a[4];
      detail::load_matrices(a, query + 128 * k + 32 * w);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const std::uint32_t word = words[n][w] ^ 0x80808080U;
        detail::multiply(score[n][w % 2], a, detail::widen_pair(word, 0x4140),
                         detail::widen_pair(word, 0x4342), __half{});
      }
    }
  }
  constexpr int kKeyBytes = 2 * kRope;
  const unsigned char* rope = stage + Memory::kStageRope + (16 * warp + g) * kKeyBytes;
  const int rope_offset = detail::rope_swizzle<kRope>(g) * 32;
#pragma unroll
  for (int s = 0; s < kRope / 16; ++s) {
    std::uint32_t a[4];
    detail::load_matrices(a, query + 2 * kRank + 32 * s);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint2 key = *reinterpret_cast<const uint2*>(rope + 8 * n * kKeyBytes +
                                                        (32 * s ^ rope_offset) + 8 * t);
      detail::multiply(rope_score[n], a, key.x, key.y, T{});
    }
  }
  const auto* scale = reinterpret_cast<const float*>(stage + Memory::kStageScale);
  float s[2][2], value[2][4], most[2] = {-INFINITY, -INFINITY};
  for (int n = 0; n < 2; ++n) {
    const int token = 16 * warp + 8 * n + 2 * t;
    const float2 pair = *reinterpret_cast<const float2*>(scale + token);
    s[n][0] = pair.x, s[n][1] = pair.y;
    for (int c = 0; c < 2; ++c) {
      const float inverse = detail::reciprocal_fast(s[n][c]), shift = detail::log2_fast(s[n][c]);
      for (int r = 0; r < 2; ++r) {
        const int i = 2 * r + c;
        const float dot = score[n][0][i] + score[n][1][i];
        const float x = fmaf(dot * factor[r], inverse, fmaf(rope_score[n][i], rope_factor, -shift));
        value[n][i] = token + c < count ? x : -INFINITY;
        most[r] = fmaxf(most[r], value[n][i]);
      }
    }
  }
  auto* warp_most = reinterpret_cast<float*>(memory + Memory::kMost);
  for (int r = 0; r < 2; ++r) {
    most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffU, most[r], 1));
    most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffU, most[r], 2));
    if (t == 0) warp_most[(g + 8 * r) * kClusterWarps + warp] = most[r];
  }
  __syncthreads();
  for (int r = 0; r < 2; ++r) {
    const auto* others = reinterpret_cast<const float4*>(warp_most + (g + 8 * r) * kClusterWarps);
    const float4 x = others[0], y = others[1];
    most[r] =
        fmaxf(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)), fmaxf(fmaxf(y.x, y.y), fmaxf(y.z, y.w)));
    most[r] = fmaxf(most[r], sums.most[r]);
    const float keep = detail::weight_of(sums.most[r], most[r]);
    sums.most[r] = most[r];
    sums.total[r] *= keep;
    sums.weights[r] *= keep;
    for (auto& tile : sums.acc) {
      tile[2 * r] *= keep;
      tile[2 * r + 1] *= keep;
    }
  }
  std::uint32_t p[4];
  for (int n = 0; n < 2; ++n) {
    for (int r = 0; r < 2; ++r) {
      float w[2];
      for (int c = 0; c < 2; ++c) {
        const bool visible = 16 * warp + 8 * n + 2 * t + c < count;
        w[c] = visible ? detail::weight_of(value[n][2 * r + c], most[r]) : 0.0F;
        sums.weights[r] += w[c];
        sums.total[r] += visible ? w[c] * s[n][c] : 0.0F;
      }
      p[2 * n + r] = detail::pack_halves(w[0], w[1]);
    }
  }
  *reinterpret_cast<uint4*>(memory + Memory::kWeights + warp * kFragmentBytes + 16 * lane) =
      make_uint4(p[0], p[1], p[2], p[3]);
  __syncthreads();

  // Weighted latents. Transposed loads take two bytes, of dimensions 2 n and 2 n + 1, as one.
  const int first_chunk = warp * kChunks;
  if (first_chunk * 16 >= kRank) return;
  const int in_matrix = lane % 8, token = lane / 8 % 2 * 8 + in_matrix;
  std::uint32_t address[(kChunks + 1) / 2];
  for (int pair = 0; pair < (kChunks + 1) / 2; ++pair) {
    const int chunk = first_chunk + min(2 * pair + lane / 16, kChunks - 1);
    address[pair] =
        shared_address(stage) + token * kStride + (chunk ^ detail::swizzle(in_matrix)) * 16;
  }
#pragma unroll
  for (int k = 0; k < kClusterWarps; ++k) {
    const uint4 weights =
        *reinterpret_cast<const uint4*>(memory + Memory::kWeights + k * kFragmentBytes + 16 * lane);
    const std::uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int pair = 0; pair < (kChunks + 1) / 2; ++pair) {
      std::uint32_t m[4];
      detail::load_matrices_transposed(m, address[pair] + k * 16 * kStride);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = 2 * pair + half;
        if (chunk >= kChunks) break;
        const std::uint32_t low = m[2 * half] ^ 0x80808080U, high = m[2 * half + 1] ^ 0x80808080U;
        detail::multiply(sums.acc[2 * chunk], a, detail::widen_pair(low, 0x4240),
                         detail::widen_pair(high, 0x4240), __half{});
        detail::multiply(sums.acc[2 * chunk + 1], a, detail::widen_pair(low, 0x4341),
                         detail::widen_pair(high, 0x4341), __half{});
      }
    }
  }
}

/// Stores what this thread block has of each head to the thread block that combines it.
template <int kRank, int kRope>
__device__ inline void send_sums(const ClusterPlace& at, unsigned char* memory,
                                 ClusterSums<kRank>& sums) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kChunks = ClusterSums<kRank>::kChunks;
  const int g = at.lane / 4, t = at.lane % 4;
  const std::uint32_t barrier = at.memory + Memory::kBarriers + 8;
  auto* totals = reinterpret_cast<float2*>(memory + Memory::kWeights);  // [heads][warps]
  for (int r = 0; r < 2; ++r) {
    const int head = g + 8 * r, to = head / at.heads_each();
    for (int offset = 1; offset < 4; offset *= 2) {
      sums.total[r] += __shfl_xor_sync(0xffffffffU, sums.total[r], offset);
      sums.weights[r] += __shfl_xor_sync(0xffffffffU, sums.weights[r], offset);
    }
    if (t == 0) {
      totals[head * kClusterWarps + at.warp] = make_float2(sums.total[r], sums.weights[r]);
    }
    if (head >= at.num_heads) continue;
    const int slot = at.rank * at.heads_each() + head % at.heads_each();
    const std::uint32_t parts =
        cluster_address(at.memory + Memory::kParts + (slot * kRank + 4 * t) * 4, to);
    const std::uint32_t arrival = cluster_address(barrier, to);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = at.warp * kChunks + i;
      if (chunk * 16 >= kRank) break;
      const float* even = sums.acc[2 * i] + 2 * r;
      const float* odd = sums.acc[2 * i + 1] + 2 * r;
      detail::store_remote(parts + 64 * chunk, make_float4(even[0], odd[0], even[1], odd[1]),
                           arrival);
    }
  }
  __syncthreads();
  if (at.warp != 0 || t != 0) return;
  for (int r = 0; r < 2; ++r) {
    const int head = g + 8 * r, to = head / at.heads_each();
    if (head >= at.num_heads) continue;
    float2 total = totals[head * kClusterWarps];
    for (int w = 1; w < kClusterWarps; ++w) {
      total.x += totals[head * kClusterWarps + w].x;
      total.y += totals[head * kClusterWarps + w].y;
    }
    const int slot = at.rank * at.heads_each() + head % at.heads_each();
    detail::store_remote(cluster_address(at.memory + Memory::kStats + 16 * slot, to),
                         make_float4(sums.most[r], total.x, total.y, 0.0F),
                         cluster_address(barrier, to));
  }
}

/// One new token of each row. Grid: cluster x groups of 16 heads x rows; S is 1.
/// @param memory Shared memory, ClusterMemory<R, P>::kBytes.
template <int kRank, int kRope, typename T>
__device__ inline void latent_cluster_row(const LatentArgs<T>& args, unsigned char* memory) {
  using Memory = ClusterMemory<kRank, kRope>;
  ClusterPlace at{};
  at.rank = detail::cluster_rank();
  at.size = detail::cluster_size();
  at.b = blockIdx.z;
  at.first_head = blockIdx.y * kClusterHeads;
  at.num_heads = min(kClusterHeads, args.num_heads - at.first_head);
  at.lane = threadIdx.x % 32;
  at.warp = threadIdx.x / 32;
  at.memory = shared_address(memory);
  const bool attends = at.warp<kClusterWarps, appends = at.warp> kClusterWarps;
  const std::uint32_t barriers = at.memory + Memory::kBarriers;
  if (threadIdx.x == kAttendThreads) {
    detail::barrier_init(barriers, 1);
    detail::barrier_init(barriers + 8, 1);
    detail::fence_barrier_init();
    const int others = at.num_heads - at.heads_here();
    detail::barrier_expect(barriers, others * Memory::kQueryStride);
    detail::barrier_expect(barriers + 8, at.heads_here() * at.size * (4 * kRank + 16));
  }
  __syncwarp();
  detail::cluster_arrive();  // the others' shared memory may be written once all run

  // What no kernel writes is loaded, and the rest asked for, before the kernel before has ended.
  KeyCodes key_codes[2] = {};  // of the warp's first units
  QueryScaling<kRank, kRope, T> scaling{};
  FreshToken<kRank, kRope, T> fresh_token{};
  QueryRotation<kRank, kRope, T> rotation{};
  const bool has_head = attends && at.warp < at.heads_here();
  for (int i = 0; i < 2; ++i) {
    const int unit = at.warp + i * kClusterWarps;
    if (attends && unit < at.heads_here() * (kRank / 32)) {
      key_codes[i].load(args, at, unit, kRank / 32, 0);
    }
  }
  if (has_head) scaling.load_scales(args, at);
  if (appends) fresh_token.load_norm(args, at.lane);
  prefetch_row<kRank, kRope>(args, at);
  // Angles take long: they are those of the position that is there already, until it proves wrong.
  const auto angle_at = [&](int position) {
    float2 angle{};
    if (at.lane < kRope / 2) rotary(args.frequencies, position, at.lane, angle.x, angle.y);
    return angle;
  };
  int expected = 0;
  float2 angle{};
  if (!attends) {
    expected = detail::load_newest(args.past_lens + at.b);
    angle = angle_at(expected);
  }
  wait_for_previous_kernel();
  launch_next_kernel();

  // Loads that others wait for come, and have arrived, before those of tokens are asked for.
  at.position = detail::load_newest(args.past_lens + at.b);
  const bool valid = args.seq_lens[at.b] > 0;
  if (has_head) {
    scaling.load_query(args, at);
  } else if (appends) {
    fresh_token.load(args, at);
  } else if (!attends) {
    rotation.load_first(args, at);
  }
  const auto stage = [&](int i) {
    return memory + Memory::kStage0 + i % Memory::kStages * Memory::kStageBytes;
  };
  T* y =
      args.y + (static_cast<std::int64_t>(at.b) * args.num_heads + at.first_head) * args.value_dim;
  if (!valid || at.position < 0 || at.position >= args.capacity) {
    const float fill = valid ? NAN : 0.0F;  // a token that the cache could not take
    detail::cluster_wait();
    if (at.rank != 0) return;
    for (int i = threadIdx.x; i < at.num_heads * args.value_dim; i += kClusterThreads) {
      y[i] = from_float<T>(fill);
    }
    return;
  }
  const int visible = at.position + 1, num_tiles = (visible + kClusterTokens - 1) / kClusterTokens;
  const std::int64_t slot = static_cast<std::int64_t>(at.b) * args.capacity + at.position;
  const bool owns_fresh = (num_tiles - 1) % at.size == at.rank;
  if (attends) {
    if (has_head) scaling.store(args, at, memory);
    for (int i = 0; i < 2; ++i) {
      detail::copy_tokens<kRank, kRope>(args, at, (at.rank + i * at.size) * kClusterTokens,
                                        at.position, stage(i));
      detail::commit_copies();
    }
  } else {
    if (at.position != expected) angle = angle_at(at.position);
    if (!appends) {
      rotation.store(args, at, angle, memory);
    } else if (owns_fresh) {
      fresh_token.rotate(args, at, angle, slot, memory);
      fresh_token.normalise(args);
    }
  }
  __syncthreads();
  if (attends) absorb_queries<kRank, kRope>(args, at, key_codes, memory);
  __syncthreads();
  detail::cluster_wait();
  if (!attends) {
    // Barriers are the whole thread block's: racecheck misjudged those of some warps.
    if (appends && owns_fresh) fresh_token.quantize(args, at, slot, memory);
    for (int tile = at.rank; tile < num_tiles; tile += at.size) {
      if (tile == num_tiles - 1) __syncthreads();
      for (int i = 0; i < 3; ++i) __syncthreads();
    }
    __syncthreads();
    if (at.heads_here() > 0) __syncthreads();
    return;
  }
  send_queries<kRank, kRope>(at, memory);
  detail::barrier_wait(barriers, 0);

  float factor[2];
  for (int r = 0; r < 2; ++r) {
    factor[r] = *reinterpret_cast<const float*>(
        memory + (at.lane / 4 + 8 * r) * Memory::kQueryStride + Memory::kQueryScale);
  }
  ClusterSums<kRank> sums;
  int step = 0;
  for (int tile = at.rank; tile < num_tiles; tile += at.size, ++step) {
    const int first = tile * kClusterTokens, fresh = at.position - first;
    detail::wait_for_copies<1>();
    __syncwarp();
    if (tile == num_tiles - 1) {
      __syncthreads();  // the new token has been appended
      if (fresh / 16 == at.warp) {
        detail::insert_fresh<kRank, kRope>(at.lane, fresh, memory, stage(step));
      }
    }
    attend_tile<kRank, kRope>(args, at, visible - first, factor, memory, stage(step), sums);
    __syncthreads();
    detail::copy_tokens<kRank, kRope>(args, at, first + 2 * at.size * kClusterTokens, at.position,
                                      stage(step));
    detail::commit_copies();
  }
  detail::wait_for_copies<0>();
  ValueCodes<kRank> value_codes{};
  if (at.warp < at.heads_here() * (args.value_dim / 16)) value_codes.load(args, at, at.warp);
  send_sums<kRank, kRope>(at, memory, sums);
  if (at.heads_here() == 0) return;

  auto* combined = reinterpret_cast<float*>(memory + Memory::kStage0);
  auto* ratio = reinterpret_cast<float*>(memory + Memory::kRatio);
  detail::barrier_wait(barriers + 8, 0);
  combine_parts<kRank, kRope>(at, memory, combined, ratio);
  __syncthreads();
  project_values(args, at, value_codes, combined, ratio, y);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// See latent_cluster_row(); sm_90a only.
template <int kRank, int kRope, typename T>
__global__ void __launch_bounds__(kClusterThreads, kRank <= 256 ? 2 : 1)
    latent_cluster(const __grid_constant__ LatentArgs<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) unsigned char cluster_memory[];
  latent_cluster_row<kRank, kRope, T>(args, cluster_memory);
#endif
}

}  // namespace tinylm::cuda
