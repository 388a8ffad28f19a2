// What comes before attention in latent_cluster(): the new token's cache entry, and the queries in
// the latent space, W_uk^T q_nope, with their rotated parts. The thread blocks of a cluster share
// the heads, and store each result to all of them.
#pragma once

#include "cluster.cuh"
#include "cluster_plan.h"
#include "half_mma.cuh"
#include "latent_append.cuh"

namespace tinylm::cuda {

inline constexpr int kClusterWarps = 8;  // that attend; one more appends
inline constexpr int kAttendThreads = 32 * kClusterWarps;
inline constexpr int kClusterThreads = kAttendThreads + 32;
inline constexpr int kFragmentBytes = 512;  // an A operand of 16 x 16 halves: lane x 4 words

/// Named barriers of latent_cluster(); 0 is __syncthreads().
inline constexpr int kAttendBarrier = 1, kFreshBarrier = 2;

/// Shared memory of latent_cluster(), offsets in bytes.
template <int kRank, int kRope>
struct ClusterMemory {
  static constexpr int kLatentStride = (kRank + 127) / 128 * 128;
  static constexpr int kStages = 2;
  // A query is half [R] and T [P], both in query_column()'s order, a float that scales its scores,
  // padding: an odd number of 16 bytes.
  static constexpr int kQueryScale = 2 * (kRank + kRope);
  static constexpr int kQueryStride = kQueryScale + 16;
  static constexpr int kQuery = 0;
  static constexpr int kWeights = kQuery + kClusterHeads * kQueryStride;  // half, a fragment a warp
  static constexpr int kParts = kWeights + kClusterWarps * kFragmentBytes;  // float [16][R]
  static constexpr int kStats = kParts + kClusterHeads * kRank * 4;         // float [16][4]
  static constexpr int kRatio = kStats + kClusterHeads * 16;                // float [heads]
  static constexpr int kMost = kRatio + kClusterHeads * 4;                  // float [heads][warps]
  static constexpr int kFreshScale = kMost + kClusterHeads * kClusterWarps * 4;  // float
  static constexpr int kBarriers = kFreshScale + 16;        // of the queries, of the parts
  static constexpr int kFresh = kBarriers + 16;             // int8 [R]: the new token's latent
  static constexpr int kFreshRope = kFresh + kRank;         // T [P]: its key
  static constexpr int kFreshRow = kFreshRope + 2 * kRope;  // float [R]: scratch for it
  static constexpr int kAngles = kFreshRow + 4 * kRank;     // float2 [P / 2]
  static constexpr int kStage0 = (kAngles + 4 * kRope + 127) / 128 * 128;
  static constexpr int kStageRope = kClusterTokens * kLatentStride;
  static constexpr int kStageScale = kStageRope + kClusterTokens * 2 * kRope;
  static constexpr int kStageBytes = kStageScale + kClusterTokens * 4;
  static constexpr int kBytes = kStage0 + kStages * kStageBytes;
  // The place of the weights and the parts holds the scaled queries before attention, float [heads]
  // [nope]; that of the weights the warps' sums after it; that of the stages the mean latents.
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

/// Where a query has its dimension: as matrices of 8 halves a row take them for products whose
/// lanes hold `run` neighbouring dimensions of each run * 4, of which two and two are one's k
/// indices.
template <int run>
__device__ inline int query_column(int dimension) {
  const int in_group = dimension % (4 * run), in_run = in_group % run;
  return dimension - in_group + in_run / 4 * 16 + in_run % 4 / 2 * 8 + in_group / run * 2 +
         in_run % 2;
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
  /// Heads of this thread block that there are.
  __device__ int heads_here() const {
    return min(heads_each(), max(0, num_heads - rank * heads_each()));
  }
};

/// Two blocks of 16 rows of W_uk by 32 latent dimensions: codes of rows 2 t, 2 t + 1, 8 + 2 t and
/// 9 + 2 t, dimensions 4 (g % 4) ... and 16 further.
struct KeyCodes {
  std::uint32_t words[2][2];

  template <typename T>
  __device__ void load(const LatentArgs<T>& args, const ClusterPlace& at, int unit, int words_each,
                       int first) {
    const int head = at.first_head + at.rank * at.heads_each() + unit / words_each;
    const int row_block = head * (args.nope_dim + args.value_dim) / 16;
    const int last = args.nope_dim / 16 - 1;
    for (int i = 0; i < 2; ++i) {
      for (int d = 0; d < 2; ++d) {
        words[i][d] = weight_word(args.kv_b, row_block + min(first + i, last), unit % words_each,
                                  args.kv_b_blocks(), 4 * (at.lane % 4 * 2 + d) + at.lane / 4 % 4);
      }
    }
  }
};

/// Queries of this thread block's heads times W_uk's scales and a power of two, a warp a head:
/// float [heads][nope].
template <int kRank, int kRope, typename T>
__device__ inline void scale_queries(const LatentArgs<T>& args, const ClusterPlace& at,
                                     unsigned char* memory) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kMaxParts = 4;  // of 32 dimensions
  auto* scaled = reinterpret_cast<float*>(memory + Memory::kWeights);
  for (int i = at.warp; i < at.heads_here(); i += kClusterWarps) {
    const int local = at.rank * at.heads_each() + i, head = at.first_head + local;
    const T* q = args.qkv + static_cast<std::int64_t>(at.b) * args.width + head * args.qk_dim();
    const float* scale = args.kv_b_scale + head * (args.nope_dim + args.value_dim);
    float values[kMaxParts], bound = 0.0F;
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      const int d = 32 * part + at.lane;
      values[part] = d < args.nope_dim ? to_float(q[d]) * scale[d] : 0.0F;
      bound += fabsf(values[part]);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      bound += __shfl_xor_sync(0xffffffffU, bound, offset);
    }
    const float up = detail::scale_up(bound);  // no sum of codes times these can be larger
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      const int d = 32 * part + at.lane;
      if (d < args.nope_dim) scaled[i * args.nope_dim + d] = values[part] * up;
    }
    if (at.lane == 0) {
      *reinterpret_cast<float*>(memory + local * Memory::kQueryStride + Memory::kQueryScale) =
          1.0F / up * args.softmax_scale * 1.4426950408889634F;
    }
  }
}

/// W_uk^T q of this thread block's heads: a warp takes a head and 32 latent dimensions at a time.
/// @param codes Of the warp's first unit.
template <int kRank, int kRope, typename T>
__device__ inline void absorb_queries(const LatentArgs<T>& args, const ClusterPlace& at,
                                      KeyCodes codes, unsigned char* memory) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kWords = kRank / 32;
  const int g = at.lane / 4, t = at.lane % 4, num_blocks = args.nope_dim / 16;
  const std::uint32_t byte = at.lane / 16 * 2;
  const auto* scaled = reinterpret_cast<const float*>(memory + Memory::kWeights);
  const int num_units = at.heads_here() * kWords;
  for (int unit = at.warp; unit < num_units; unit += kClusterWarps) {
    const float* q = scaled + unit / kWords * args.nope_dim + 2 * t;
    float sums[2][4] = {};
    for (int first = 0; first < num_blocks; first += 2) {
      const KeyCodes now = codes;
      if (first + 2 < num_blocks) {
        codes.load(args, at, unit, kWords, first + 2);
      } else if (unit + kClusterWarps < num_units) {
        codes.load(args, at, unit + kClusterWarps, kWords, 0);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // A = 16 latent dimensions x 16 of the head, B = the query: column 0 has the larger half of
        // each value, column 1 the rest.
        std::uint32_t b[2] = {};
        if (first + i < num_blocks && g < 2) {
          for (int u = 0; u < 2; ++u) {
            const float2 pair = *reinterpret_cast<const float2*>(q + 16 * (first + i) + 8 * u);
            b[u] = detail::pack_part(pair.x, pair.y, g == 1);
          }
        }
        const std::uint32_t even =
            __byte_perm(now.words[i][0], now.words[i][1], 0x4400U + 0x1111U * byte);
        const std::uint32_t odd =
            __byte_perm(now.words[i][0], now.words[i][1], 0x5511U + 0x1111U * byte);
        const std::uint32_t low[4] = {detail::code_pair<0>(even), detail::code_pair<0>(odd),
                                      detail::code_pair<1>(even), detail::code_pair<1>(odd)};
        const std::uint32_t high[4] = {detail::code_pair<2>(even), detail::code_pair<2>(odd),
                                       detail::code_pair<3>(even), detail::code_pair<3>(odd)};
        detail::multiply(sums[0], low, b[0], b[1], __half{});
        detail::multiply(sums[1], high, b[0], b[1], __half{});
      }
    }
    if (t != 0) continue;
    const int local = at.rank * at.heads_each() + unit / kWords;
    unsigned char* row = memory + local * Memory::kQueryStride;
    for (int i = 0; i < 2; ++i) {
      const int column = unit % kWords * 32 + 16 * i + g % 4 * 4 + g / 4 * 2;
      *reinterpret_cast<std::uint32_t*>(row + 2 * detail::query_column<16>(column)) =
          detail::pack_halves(sums[i][0] + sums[i][1], sums[i][2] + sums[i][3]);
    }
  }
}

/// Rotated parts of the queries of this thread block's heads, by one warp.
template <int kRank, int kRope, typename T>
__device__ inline void rotate_queries(const LatentArgs<T>& args, const ClusterPlace& at,
                                      unsigned char* memory) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kHalf = kRope / 2;
  const auto* angles = reinterpret_cast<const float2*>(memory + Memory::kAngles);
  for (int i = at.lane; i < at.heads_here() * kHalf; i += 32) {
    const int local = at.rank * at.heads_each() + i / kHalf, pair = i % kHalf;
    const T* q = args.qkv + static_cast<std::int64_t>(at.b) * args.width +
                 (at.first_head + local) * args.qk_dim() + args.nope_dim;
    T* to = reinterpret_cast<T*>(memory + local * Memory::kQueryStride + 2 * kRank);
    const T both[2] = {q[pair], q[pair + kHalf]};
    T turned[2];
    rotate_pair(both, turned, 1, 0, angles[pair].x, angles[pair].y);
    to[detail::query_column<4>(pair)] = turned[0];
    to[detail::query_column<4>(pair + kHalf)] = turned[1];
  }
}

/// This thread block's queries to the others.
template <int kRank, int kRope>
__device__ inline void send_queries(const ClusterPlace& at, const unsigned char* memory) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kPieces = Memory::kQueryStride / 16;
  const int first = Memory::kQuery + at.rank * at.heads_each() * Memory::kQueryStride;
  const int pieces = at.heads_here() * kPieces;
  for (int i = threadIdx.x; i < pieces * (at.size - 1); i += kAttendThreads) {
    const int to = (at.rank + 1 + i / pieces) % at.size, offset = first + 16 * (i % pieces);
    detail::store_remote(detail::remote_address(at.memory + offset, to),
                         *reinterpret_cast<const float4*>(memory + offset),
                         detail::remote_address(at.memory + Memory::kBarriers, to));
  }
}

/// One warp norms, quantises and rotates the new token, into shared memory and into the cache.
template <int kRank, int kRope, typename T>
__device__ inline void append_by_warp(const LatentArgs<T>& args, const ClusterPlace& at,
                                      unsigned char* memory) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kHalf = kRope / 2;
  const bool stores = at.first_head == 0;  // one group of heads does
  const T* kv = args.qkv + static_cast<std::int64_t>(at.b) * args.width +
                static_cast<std::int64_t>(args.num_heads) * args.qk_dim();
  const std::int64_t slot = static_cast<std::int64_t>(at.b) * args.capacity + at.position;
  T* key = reinterpret_cast<T*>(memory + Memory::kFreshRope);
  if (at.lane < kHalf) {
    const float2 angle = reinterpret_cast<const float2*>(memory + Memory::kAngles)[at.lane];
    rotate_pair(kv + kRank, key, kHalf, at.lane, angle.x, angle.y);
    if (stores) {
      T* to = args.rope + slot * kRope;
      to[at.lane] = key[at.lane];
      to[at.lane + kHalf] = key[at.lane + kHalf];
    }
  }
  const RowSource<T> source{kv, args.norm_weight, args.eps, kRank, false};
  const RowScale scale = quantize_row<32, Activation::kInt8>(
      source, reinterpret_cast<float*>(memory + Memory::kFreshRow), kRank,
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
