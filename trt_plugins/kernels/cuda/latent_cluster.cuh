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
#include "latent_prefill.cuh"
#include "latent_tensor.cuh"

namespace tinylm::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace detail {

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// 2^(x - most), where nothing is there yet: 0.
__device__ inline float weight_of(float x, float most) {
  return x == -INFINITY ? 0.0F : exp2_fast(x - most);
}

/// Pieces of 16 bytes of a latent row are exchanged, so that neither a row's words nor its
/// transposed matrices meet in a bank.
__device__ inline int swizzle(int token) { return (token & 1) << 2 | (token >> 1 & 3); }
/// The same for pieces of 32 bytes of a key: 16, 32 or 64 dimensions.
__device__ inline int rope_swizzle(int token, int rope_dim) {
  return (rope_dim == 32 ? token >> 1 : token) & (rope_dim / 16 - 1);
}

/// Copies a warp's 16 tokens of a tile, those before `limit`.
template <int kRank, typename T>
__device__ inline void copy_tokens(const LatentArgs<T>& args, const ClusterPlace& at, int first,
                                   int limit, unsigned char* stage) {
  using Memory = ClusterMemory<kRank>;
  first += 16 * at.warp;
  if (first >= limit) return;
  constexpr int kPieces = kRank / 16;
  const std::int64_t slot = static_cast<std::int64_t>(at.b) * args.capacity + first;
  unsigned char* latent = stage + 16 * at.warp * Memory::kLatentStride;
  const std::int8_t* from = args.latent + slot * kRank;
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    const int piece = at.lane + 32 * i, row = piece / kPieces, column = piece % kPieces;
    const bool exists = first + row < limit;
    copy_async(latent + row * Memory::kLatentStride + (column ^ swizzle(row)) * 16,
               from + (exists ? 16 * piece : 0), exists);
  }
  const int pieces = args.rope_dim / 8, row_bytes = 2 * args.rope_dim;
  unsigned char* rope = stage + kClusterTokens * Memory::kLatentStride + 16 * at.warp * row_bytes;
  const T* keys = args.rope + slot * args.rope_dim;
  for (int piece = at.lane; piece < 16 * pieces; piece += 32) {
    const int row = piece / pieces, column = piece % pieces;
    const bool exists = first + row < limit;
    copy_async(rope + row * row_bytes + (column ^ rope_swizzle(row, args.rope_dim) << 1) * 16,
               keys + (exists ? 8 * piece : 0), exists);
  }
  if (at.lane < 16 && first + at.lane < limit) {
    const auto to = shared_address(stage + kClusterTokens * (Memory::kLatentStride + row_bytes) +
                                   4 * (16 * at.warp + at.lane));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to),
                 "l"(args.scale + slot + at.lane));
  }
}

/// Puts the new token into its warp's tile.
template <int kRank, typename T>
__device__ inline void insert_fresh(const LatentArgs<T>& args, const ClusterPlace& at, int row,
                                    unsigned char* memory, unsigned char* stage) {
  using Memory = ClusterMemory<kRank>;
  const int row_bytes = 2 * args.rope_dim, lane = at.lane;
  unsigned char* latent = stage + row * Memory::kLatentStride;
  unsigned char* rope = stage + kClusterTokens * Memory::kLatentStride + row * row_bytes;
  if (lane < kRank / 16) {
    *reinterpret_cast<uint4*>(latent + (lane ^ swizzle(row)) * 16) =
        *reinterpret_cast<const uint4*>(memory + Memory::kFresh + 16 * lane);
  }
  if (lane < args.rope_dim / 8) {
    *reinterpret_cast<uint4*>(rope + (lane ^ rope_swizzle(row, args.rope_dim) << 1) * 16) =
        *reinterpret_cast<const uint4*>(memory + Memory::kFreshRope + 16 * lane);
  }
  if (lane == 0) {
    *reinterpret_cast<float*>(stage + kClusterTokens * (Memory::kLatentStride + row_bytes) +
                              4 * row) =
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
template <int kRank, typename T>
__device__ inline void attend_tile(const LatentArgs<T>& args, const ClusterPlace& at, int count,
                                   const float (&factor)[2], unsigned char* memory,
                                   const unsigned char* stage, ClusterSums<kRank>& sums) {
  using Memory = ClusterMemory<kRank>;
  constexpr int kStride = Memory::kLatentStride, kChunks = ClusterSums<kRank>::kChunks;
  const int lane = at.lane, warp = at.warp, g = lane / 4, t = lane % 4;
  const float rope_factor = args.softmax_scale * 1.4426950408889634F;

  // Scores. Word w of a lane's 16 bytes is step 4 k + w: k indices 2 t, 2 t + 1, 2 t + 8, 2 t + 9
  // of the operands are its bytes 0 .. 3.
  float score[2][2][4] = {}, rope_score[2][4] = {};
  const unsigned char* row = stage + (16 * warp + g) * kStride;
  const int offset = (t ^ detail::swizzle(g)) * 16;
#pragma unroll
  for (int k = 0; k < kRank / 64; ++k) {
    const int column = (offset ^ (k & 1) * 64) + k / 2 * 128;
    const uint4 c0 = *reinterpret_cast<const uint4*>(row + column);
    const uint4 c1 = *reinterpret_cast<const uint4*>(row + 8 * kStride + column);
    const std::uint32_t words[2][4] = {{c0.x, c0.y, c0.z, c0.w}, {c1.x, c1.y, c1.z, c1.w}};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint4 q = *reinterpret_cast<const uint4*>(memory + Memory::kQuery +
                                                      (4 * k + w) * kFragmentBytes + 16 * lane);
      const std::uint32_t a[4] = {q.x, q.y, q.z, q.w};
      for (int n = 0; n < 2; ++n) {
        const std::uint32_t word = words[n][w] ^ 0x80808080U;
        detail::multiply(score[n][w % 2], a, detail::widen_pair(word, 0x4140),
                         detail::widen_pair(word, 0x4342), __half{});
      }
    }
  }
  const int row_bytes = 2 * args.rope_dim;
  const unsigned char* rope = stage + kClusterTokens * kStride + (16 * warp + g) * row_bytes;
  const int rope_offset = detail::rope_swizzle(g, args.rope_dim) * 32;
  for (int s = 0; s < args.rope_dim / 16; ++s) {
    const uint4 q = *reinterpret_cast<const uint4*>(memory + Memory::kQueryRope +
                                                    s * kFragmentBytes + 16 * lane);
    const std::uint32_t a[4] = {q.x, q.y, q.z, q.w};
    for (int n = 0; n < 2; ++n) {
      const uint2 key = *reinterpret_cast<const uint2*>(rope + 8 * n * row_bytes +
                                                        (32 * s ^ rope_offset) + 8 * t);
      detail::multiply(rope_score[n], a, key.x, key.y, T{});
    }
  }
  const float* scale =
      reinterpret_cast<const float*>(stage + kClusterTokens * (kStride + row_bytes));
  float s[2][2], value[2][4], most[2] = {-INFINITY, -INFINITY};
  for (int n = 0; n < 2; ++n) {
    const int token = 16 * warp + 8 * n + 2 * t;
    const float2 pair = *reinterpret_cast<const float2*>(scale + token);
    s[n][0] = pair.x, s[n][1] = pair.y;
    for (int c = 0; c < 2; ++c) {
      const float inverse = __frcp_rn(s[n][c]), shift = detail::log2_fast(s[n][c]);
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
  const int steps = min(kClusterWarps, (count + 15) / 16), first_chunk = warp * kChunks;
  if (first_chunk * 16 >= kRank) return;
  const int in_matrix = lane % 8, token = lane / 8 % 2 * 8 + in_matrix;
  std::uint32_t address[(kChunks + 1) / 2];
  for (int pair = 0; pair < (kChunks + 1) / 2; ++pair) {
    const int chunk = first_chunk + min(2 * pair + lane / 16, kChunks - 1);
    address[pair] =
        detail::shared_address(stage) + token * kStride + (chunk ^ detail::swizzle(in_matrix)) * 16;
  }
#pragma unroll 4
  for (int k = 0; k < steps; ++k) {
    const uint4 weights =
        *reinterpret_cast<const uint4*>(memory + Memory::kWeights + k * kFragmentBytes + 16 * lane);
    const std::uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int pair = 0; pair < (kChunks + 1) / 2; ++pair) {
      std::uint32_t m[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                   : "r"(address[pair] + k * 16 * kStride));
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
template <int kRank>
__device__ inline void send_sums(const ClusterPlace& at, unsigned char* memory,
                                 ClusterSums<kRank>& sums) {
  using Memory = ClusterMemory<kRank>;
  constexpr int kChunks = ClusterSums<kRank>::kChunks;
  const int g = at.lane / 4, t = at.lane % 4;
  auto* totals = reinterpret_cast<float2*>(memory + Memory::kTotals);
  for (int r = 0; r < 2; ++r) {
    const int head = g + 8 * r;
    for (int offset = 1; offset < 4; offset *= 2) {
      sums.total[r] += __shfl_xor_sync(0xffffffffU, sums.total[r], offset);
      sums.weights[r] += __shfl_xor_sync(0xffffffffU, sums.weights[r], offset);
    }
    if (t == 0) {
      totals[head * kClusterWarps + at.warp] = make_float2(sums.total[r], sums.weights[r]);
    }
    if (head >= at.num_heads) continue;
    const int slot = at.rank * at.heads_each() + head % at.heads_each();
    const std::uint32_t to = detail::remote_address(
        at.memory + Memory::kParts + (slot * kRank + 4 * t) * 4, head / at.heads_each());
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = at.warp * kChunks + i;
      if (chunk * 16 >= kRank) break;
      const float* even = sums.acc[2 * i] + 2 * r;
      const float* odd = sums.acc[2 * i + 1] + 2 * r;
      detail::store_remote(to + 64 * chunk, make_float4(even[0], odd[0], even[1], odd[1]));
    }
  }
  __syncthreads();
  if (at.warp != 0 || t != 0) return;
  for (int r = 0; r < 2; ++r) {
    const int head = g + 8 * r;
    if (head >= at.num_heads) continue;
    float2 total = totals[head * kClusterWarps];
    for (int w = 1; w < kClusterWarps; ++w) {
      total.x += totals[head * kClusterWarps + w].x;
      total.y += totals[head * kClusterWarps + w].y;
    }
    const int slot = at.rank * at.heads_each() + head % at.heads_each();
    const std::uint32_t to =
        detail::remote_address(at.memory + Memory::kStats + 16 * slot, head / at.heads_each());
    detail::store_remote(to, make_float4(sums.most[r], total.x, total.y, 0.0F));
  }
}

/// Mean latents of this thread block's heads, float [heads][R], and what makes them 1/s: [heads].
template <int kRank>
__device__ inline void combine_parts(const ClusterPlace& at, const unsigned char* memory,
                                     float* combined, float* ratio) {
  using Memory = ClusterMemory<kRank>;
  const auto* stats = reinterpret_cast<const float4*>(memory + Memory::kStats);
  const auto* parts = reinterpret_cast<const float*>(memory + Memory::kParts);
  const int heads = at.heads_each();
  for (int i = threadIdx.x; i < heads * kRank; i += kClusterThreads) {
    const int head = i / kRank, column = i % kRank;
    float most = -INFINITY, sum = 0.0F, total = 0.0F, weights = 0.0F;
    for (int part = 0; part < at.size; ++part) most = fmaxf(most, stats[part * heads + head].x);
#pragma unroll 4
    for (int part = 0; part < at.size; ++part) {
      const float4 stat = stats[part * heads + head];
      const float share = detail::weight_of(stat.x, most);
      total += stat.y * share;
      weights += stat.z * share;
      sum += parts[(part * heads + head) * kRank + column] * share;
    }
    combined[i] = sum / weights;
    if (column == 0) ratio[head] = weights / total;
  }
}

/// One new token of each row. Grid: cluster x groups of 16 heads x rows; S is 1.
/// Shared memory: ClusterMemory<R>{P}.bytes().
template <int kRank, typename T>
__device__ inline void latent_cluster_row(const LatentArgs<T>& args, unsigned char* memory) {
  using Memory = ClusterMemory<kRank>;
  ClusterPlace at{};
  at.rank = detail::cluster_rank();
  at.size = detail::cluster_size();
  at.b = blockIdx.z;
  at.first_head = blockIdx.y * kClusterHeads;
  at.num_heads = min(kClusterHeads, args.num_heads - at.first_head);
  at.lane = threadIdx.x % 32;
  at.warp = threadIdx.x / 32;
  at.memory = detail::shared_address(memory);
  detail::cluster_arrive();  // the others' shared memory may be written once all run
  const Memory sizes{args.rope_dim};
  const auto stage = [&](int i) {
    return memory + sizes.stages() + i % Memory::kStages * sizes.stage_bytes();
  };
  // The first tile is read before anybody knows how long the row is.
  detail::copy_tokens<kRank>(args, at, at.rank * kClusterTokens, args.capacity, stage(0));
  detail::commit_copies();
  const NewToken token = new_token(args, at.b);
  T* y =
      args.y + (static_cast<std::int64_t>(at.b) * args.num_heads + at.first_head) * args.value_dim;
  if (!token.valid || !token.fits) {
    const float fill = token.valid ? NAN : 0.0F;  // a token that the cache could not take
    detail::wait_for_copies<0>();
    detail::cluster_wait();
    if (at.rank != 0) return;
    for (int i = threadIdx.x; i < at.num_heads * args.value_dim; i += kClusterThreads) {
      y[i] = from_float<T>(fill);
    }
    return;
  }
  at.position = token.position;
  const int visible = at.position + 1, num_tiles = (visible + kClusterTokens - 1) / kClusterTokens;
  const int cached = at.position;
  detail::copy_tokens<kRank>(args, at, (at.rank + at.size) * kClusterTokens, cached, stage(1));
  detail::commit_copies();

  const bool appends =
      at.warp == kClusterWarps - 1 && at.position / kClusterTokens % at.size == at.rank;
  float cosine = 1.0F, sine = 0.0F;
  if ((appends || at.warp < at.heads_each()) && at.lane < args.rope_dim / 2) {
    rotary(args.frequencies, at.position, at.lane, cosine, sine);
  }
  detail::cluster_wait();
  absorb_queries<kRank>(args, at);
  rotate_queries<kRank>(args, at, memory, cosine, sine);
  if (appends) append_by_warp<kRank>(args, at, memory, cosine, sine);
  detail::cluster_arrive();
  detail::cluster_wait();

  const int g = at.lane / 4;
  const auto* query_scale = reinterpret_cast<const float*>(memory + Memory::kQueryScale);
  const float factor[2] = {query_scale[g], query_scale[g + 8]};
  ClusterSums<kRank> sums;
  int step = 0;
  for (int tile = at.rank; tile < num_tiles; tile += at.size, ++step) {
    const int first = tile * kClusterTokens, fresh = at.position - first;
    detail::wait_for_copies<1>();
    __syncwarp();
    if (fresh / 16 == at.warp && fresh < kClusterTokens) {
      detail::insert_fresh<kRank>(args, at, fresh, memory, stage(step));
    }
    attend_tile<kRank>(args, at, visible - first, factor, memory, stage(step), sums);
    __syncthreads();
    detail::copy_tokens<kRank>(args, at, first + 2 * at.size * kClusterTokens, cached, stage(step));
    detail::commit_copies();
  }
  detail::wait_for_copies<0>();
  send_sums<kRank>(at, memory, sums);
  __syncwarp();
  detail::cluster_arrive();

  // W_uv: a warp takes 16 values of a head at a time.
  const int value_tiles = args.value_dim / 16, heads = at.heads_each();
  constexpr int kBlocks = (kRank + 127) / 128;
  const auto load_codes = [&](int unit, uint4(&codes)[kBlocks]) {
    const int head = at.first_head + at.rank * heads + unit / value_tiles;
    const int row_block =
        (head * (args.nope_dim + args.value_dim) + args.nope_dim) / 16 + unit % value_tiles;
    for (int i = 0; i < kBlocks; ++i) {
      codes[i] = load_weights(
          args.kv_b + (static_cast<std::int64_t>(row_block) * kBlocks + i) * kWeightBlockBytes +
          16 * at.lane);
    }
  };
  const int num_units = min(heads, max(0, at.num_heads - at.rank * heads)) * value_tiles;
  uint4 codes[kBlocks];
  if (at.warp < num_units) load_codes(at.warp, codes);
  auto* combined = reinterpret_cast<float*>(memory + sizes.stages());
  auto* ratio = reinterpret_cast<float*>(memory + Memory::kRatio);
  detail::cluster_wait();
  combine_parts<kRank>(at, memory, combined, ratio);
  __syncthreads();
  const int t = at.lane % 4;
  for (int unit = at.warp; unit < num_units; unit += kClusterWarps) {
    if (unit != at.warp) load_codes(unit, codes);
    const float* latent = combined + unit / value_tiles * kRank + 4 * t;
    float acc[2][4] = {};
#pragma unroll
    for (int word = 0; word < kRank / 32; ++word) {
      const uint4 four = codes[word / 4];
      const std::uint32_t even = word % 4 == 0   ? four.x
                                 : word % 4 == 1 ? four.y
                                 : word % 4 == 2 ? four.z
                                                 : four.w;
      const std::uint32_t odd = even >> 8;
      // Column 0 has the larger half of each latent value, column 1 the rest.
      std::uint32_t b[2][2] = {};
      for (int half = 0; half < 2 && g < 2; ++half) {
        const float4 v = *reinterpret_cast<const float4*>(latent + 32 * word + 16 * half);
        b[half][0] = detail::pack_part(v.x, v.z, g == 1);
        b[half][1] = detail::pack_part(v.y, v.w, g == 1);
      }
      const std::uint32_t low[4] = {detail::code_pair<0>(even), detail::code_pair<1>(even),
                                    detail::code_pair<0>(odd), detail::code_pair<1>(odd)};
      const std::uint32_t high[4] = {detail::code_pair<2>(even), detail::code_pair<3>(even),
                                     detail::code_pair<2>(odd), detail::code_pair<3>(odd)};
      detail::multiply(acc[0], low, b[0][0], b[0][1], __half{});
      detail::multiply(acc[1], high, b[1][0], b[1][1], __half{});
    }
    if (t != 0) continue;
    const int head = at.rank * heads + unit / value_tiles;
    const float* scale =
        args.kv_b_scale + (at.first_head + head) * (args.nope_dim + args.value_dim) + args.nope_dim;
    for (int u = 0; u < 2; ++u) {
      const int j = unit % value_tiles * 16 + g + 8 * u;
      const float sum = acc[0][2 * u] + acc[1][2 * u] + (acc[0][2 * u + 1] + acc[1][2 * u + 1]);
      y[head * args.value_dim + j] = from_float<T>(sum * ratio[unit / value_tiles] * scale[j]);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// See latent_cluster_row(); sm_90a only.
template <int kRank, typename T>
__global__ void __launch_bounds__(kClusterThreads, kRank <= 256 ? 2 : 1)
    latent_cluster(const __grid_constant__ LatentArgs<T> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) unsigned char cluster_memory[];
  latent_cluster_row<kRank, T>(args, cluster_memory);
#endif
}

}  // namespace tinylm::cuda
