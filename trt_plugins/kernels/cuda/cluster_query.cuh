// What comes before attention in latent_cluster(): the new token's cache entry, and the queries in
// the latent space, W_uk^T q_nope, as operands of mma.m16n8k16. The thread blocks of a cluster
// share the heads, and store each result to all of them.
#pragma once

#include "cluster.cuh"
#include "cluster_plan.h"
#include "half_mma.cuh"
#include "latent_append.cuh"

namespace tinylm::cuda {

inline constexpr int kClusterThreads = 256;
inline constexpr int kClusterWarps = kClusterThreads / 32;
inline constexpr int kFragmentBytes = 512;  // an A operand of 16 x 16 halves: lane x 4 words

/// Shared memory of latent_cluster(), offsets in bytes.
template <int kRank>
struct ClusterMemory {
  static constexpr int kLatentStride = (kRank + 127) / 128 * 128;
  static constexpr int kStages = 2;
  static constexpr int kQuery = 0;                                       // half, R / 16 fragments
  static constexpr int kWeights = kQuery + kRank / 16 * kFragmentBytes;  // half, a fragment a warp
  static constexpr int kParts = kWeights + kClusterWarps * kFragmentBytes;   // float [16][R]
  static constexpr int kStats = kParts + kClusterHeads * kRank * 4;          // float [16][4]
  static constexpr int kQueryScale = kStats + kClusterHeads * 16;            // float [heads]
  static constexpr int kRatio = kQueryScale + kClusterHeads * 4;             // float [heads]
  static constexpr int kMost = kRatio + kClusterHeads * 4;                   // float [heads][warps]
  static constexpr int kTotals = kMost + kClusterHeads * kClusterWarps * 4;  // float2, the same
  static constexpr int kFreshScale = kTotals + kClusterHeads * kClusterWarps * 8;  // float
  static constexpr int kFresh = kFreshScale + 16;      // int8 [R]: the new token's latent
  static constexpr int kFreshRope = kFresh + kRank;    // T [P]: its key
  static constexpr int kQueryRope = kFreshRope + 128;  // T, P / 16 fragments
  // Scratch before attention: the weights' place holds the new latent as floats, the parts' place
  // a rotated query a warp; and after it: the stages hold the combined latents.

  int rope_dim;
  __host__ __device__ int stages() const {
    return (kQueryRope + rope_dim / 16 * kFragmentBytes + 127) / 128 * 128;
  }
  __host__ __device__ int stage_bytes() const {
    return kClusterTokens * (kLatentStride + 2 * rope_dim + 4);
  }
  __host__ __device__ int bytes() const { return stages() + kStages * stage_bytes(); }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace detail {

/// Two exact halves, codes -1, 0, 1, from bits 2 i and 16 + 2 i of a word.
template <int i>
__device__ inline std::uint32_t code_pair(std::uint32_t word) {
  // 1024 + 4^i (code + 1), times 4^-i, minus 1024 4^-i + 1.
  constexpr std::uint32_t kFactor[4] = {0x3c003c00U, 0x34003400U, 0x2c002c00U, 0x24002400U};
  constexpr std::uint32_t kOffset[4] = {0xe401e401U, 0xdc04dc04U, 0xd410d410U, 0xcc40cc40U};
  std::uint32_t out;
  const std::uint32_t raw = (word & (0x00030003U << (2 * i))) | 0x64006400U;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(raw), "r"(kFactor[i]), "r"(kOffset[i]));
  return out;
}

__device__ inline std::uint32_t pack_halves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  std::uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

/// The larger half of each of two floats, or what it leaves of them.
__device__ inline std::uint32_t pack_part(float a, float b, bool low) {
  const std::uint32_t high = pack_halves(a, b);
  if (!low) return high;
  __half2 pair;
  memcpy(&pair, &high, sizeof(pair));
  const float2 taken = __half22float2(pair);
  return pack_halves(a - taken.x, b - taken.y);
}

/// A power of two that brings a magnitude to 512 .. 1024, or 1.
__device__ inline float scale_up(float magnitude) {
  const int exponent = static_cast<int>(__float_as_uint(magnitude) >> 23 & 255);
  if (exponent == 0 || exponent == 255) return 1.0F;
  return __int_as_float(min(127 + 9 - (exponent - 127), 253) << 23);
}

}  // namespace detail

/// What a warp of latent_cluster() knows of its place.
struct ClusterPlace {
  int rank, size;  // of the cluster
  int b, first_head, num_heads, position;
  int lane, warp;
  std::uint32_t memory;  // address of the shared memory

  __device__ int heads_each() const { return kClusterHeads / size; }
};

/// W_uk^T q of this thread block's heads: a warp takes a head and 32 latent dimensions at a time.
template <int kRank, typename T>
__device__ inline void absorb_queries(const LatentArgs<T>& args, const ClusterPlace& at) {
  using Memory = ClusterMemory<kRank>;
  constexpr int kWords = kRank / 32, kMaxBlocks = 8;
  const int g = at.lane / 4, t = at.lane % 4;
  const int num_blocks = args.nope_dim / 16;
  for (int unit = at.warp; unit < at.heads_each() * kWords; unit += kClusterWarps) {
    const int head = at.rank * at.heads_each() + unit / kWords, word = unit % kWords;
    float sums[2][4] = {};
    float up = 1.0F;
    if (head < at.num_heads) {
      const int first_row = (at.first_head + head) * (args.nope_dim + args.value_dim);
      const T* q = args.qkv + static_cast<std::int64_t>(at.b) * args.width +
                   (at.first_head + head) * args.qk_dim() + 2 * t;
      const float* scale = args.kv_b_scale + first_row + 2 * t;
      std::uint32_t codes[kMaxBlocks][2];
      float values[kMaxBlocks][4], bound = 0.0F;
#pragma unroll
      for (int i = 0; i < kMaxBlocks; ++i) {
        if (i >= num_blocks) break;
        // The words with dimensions 2 t and 2 t + 1 of the head: another order than a lane's own.
        for (int d = 0; d < 2; ++d) {
          codes[i][d] = weight_word(args.kv_b, first_row / 16 + i, word, args.kv_b_blocks(),
                                    4 * (2 * t + d) + g % 4);
        }
        for (int u = 0; u < 2; ++u) {
          T pair[2];
          memcpy(pair, q + 16 * i + 8 * u, sizeof(pair));
          const float2 s = *reinterpret_cast<const float2*>(scale + 16 * i + 8 * u);
          values[i][2 * u] = to_float(pair[0]) * s.x;
          values[i][2 * u + 1] = to_float(pair[1]) * s.y;
          bound += fabsf(values[i][2 * u]) + fabsf(values[i][2 * u + 1]);
        }
      }
      bound += __shfl_xor_sync(0xffffffffU, bound, 1);
      bound += __shfl_xor_sync(0xffffffffU, bound, 2);
      up = detail::scale_up(bound);
      const std::uint32_t byte = at.lane / 16 * 2;
#pragma unroll
      for (int i = 0; i < kMaxBlocks; ++i) {
        if (i >= num_blocks) break;
        // A = 16 latent dimensions x 16 of the head, B = the query: column 0 has the larger half of
        // each value, column 1 the rest.
        std::uint32_t b[2] = {};
        for (int u = 0; u < 2 && g < 2; ++u) {
          b[u] = detail::pack_part(values[i][2 * u] * up, values[i][2 * u + 1] * up, g == 1);
        }
        const std::uint32_t even = __byte_perm(codes[i][0], codes[i][1], 0x4400U + 0x1111U * byte);
        const std::uint32_t odd = __byte_perm(codes[i][0], codes[i][1], 0x5511U + 0x1111U * byte);
        const std::uint32_t low[4] = {detail::code_pair<0>(even), detail::code_pair<0>(odd),
                                      detail::code_pair<1>(even), detail::code_pair<1>(odd)};
        const std::uint32_t high[4] = {detail::code_pair<2>(even), detail::code_pair<2>(odd),
                                       detail::code_pair<3>(even), detail::code_pair<3>(odd)};
        detail::multiply(sums[0], low, b[0], b[1], __half{});
        detail::multiply(sums[1], high, b[0], b[1], __half{});
      }
    }
    // Lanes of t = 0 have dimensions 32 word + 16 i + 4 (g % 4) + 2 (g / 4) and the next.
    for (int i = 0; i < 2; ++i) {
      std::uint32_t pair = detail::pack_halves(sums[i][0] + sums[i][1], sums[i][2] + sums[i][3]);
      pair = __shfl_sync(0xffffffffU, pair, at.lane & ~3);
      const int step = word / 2 * 4 + g % 4, quad = (2 * word + i) % 4;
      const std::uint32_t to = at.memory + Memory::kQuery + step * kFragmentBytes +
                               (head % 8 * 4 + quad) * 16 + (head / 8 + g / 4 * 2) * 4;
      for (int rank = t; rank < at.size; rank += 4) {
        detail::store_remote(detail::remote_address(to, rank), pair);
      }
    }
    if (word == 0 && at.lane < at.size) {
      const float down = 1.0F / up * args.softmax_scale * 1.4426950408889634F;
      const std::uint32_t to = at.memory + Memory::kQueryScale + 4 * head;
      detail::store_remote(detail::remote_address(to, at.lane), __float_as_uint(down));
    }
  }
}

/// Rotated parts of the queries of this thread block's heads: a warp takes a head at a time.
template <int kRank, typename T>
__device__ inline void rotate_queries(const LatentArgs<T>& args, const ClusterPlace& at,
                                      unsigned char* memory, float cosine, float sine) {
  using Memory = ClusterMemory<kRank>;
  const int half = args.rope_dim / 2;
  T* rotated = reinterpret_cast<T*>(memory + Memory::kParts) + at.warp * 64;
  for (int i = at.warp; i < at.heads_each(); i += kClusterWarps) {
    const int head = at.rank * at.heads_each() + i;
    const bool exists = head < at.num_heads;
    if (at.lane < half && exists) {
      const T* q = args.qkv + static_cast<std::int64_t>(at.b) * args.width +
                   (at.first_head + head) * args.qk_dim() + args.nope_dim;
      rotate_pair(q, rotated, half, at.lane, cosine, sine);
    }
    __syncwarp();
    for (int j = at.lane; j < half * at.size; j += 32) {
      const int column = j % half * 2, rank = j / half;
      std::uint32_t pair = 0;
      if (exists) memcpy(&pair, rotated + column, sizeof(pair));
      const std::uint32_t to = at.memory + Memory::kQueryRope + column / 16 * kFragmentBytes +
                               (head % 8 * 4 + column % 16 / 4) * 16 +
                               (head / 8 + column % 4 / 2 * 2) * 4;
      detail::store_remote(detail::remote_address(to, rank), pair);
    }
    __syncwarp();
  }
}

/// One warp norms, quantises and rotates the new token, into shared memory and into the cache.
template <int kRank, typename T>
__device__ inline void append_by_warp(const LatentArgs<T>& args, const ClusterPlace& at,
                                      unsigned char* memory, float cosine, float sine) {
  using Memory = ClusterMemory<kRank>;
  const int half = args.rope_dim / 2;
  const bool stores = at.first_head == 0;  // one group of heads does
  const T* kv = args.qkv + static_cast<std::int64_t>(at.b) * args.width +
                static_cast<std::int64_t>(args.num_heads) * args.qk_dim();
  const std::int64_t slot = static_cast<std::int64_t>(at.b) * args.capacity + at.position;
  T* key = reinterpret_cast<T*>(memory + Memory::kFreshRope);
  if (at.lane < half) {
    rotate_pair(kv + kRank, key, half, at.lane, cosine, sine);
    if (stores) {
      T* to = args.rope + slot * args.rope_dim;
      to[at.lane] = key[at.lane];
      to[at.lane + half] = key[at.lane + half];
    }
  }
  const RowSource<T> source{kv, args.norm_weight, args.eps, kRank, false};
  const RowScale scale = quantize_row<32, Activation::kInt8>(
      source, reinterpret_cast<float*>(memory + Memory::kWeights), kRank,
      [&](int, int column, std::uint32_t word) {
        *reinterpret_cast<std::uint32_t*>(memory + Memory::kFresh + column) = word;
        if (stores) *reinterpret_cast<std::uint32_t*>(args.latent + slot * kRank + column) = word;
      });
  if (at.lane == 0) {
    *reinterpret_cast<float*>(memory + Memory::kFreshScale) = scale.s;
    if (stores) args.scale[slot] = scale.s;
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace tinylm::cuda
