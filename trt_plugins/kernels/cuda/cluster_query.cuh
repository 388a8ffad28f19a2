// What comes before attention in latent_cluster(): the new token's cache entry, and the queries in
// the latent space, W_uk^T q_nope, with their rotated parts. The thread blocks of a cluster share
// the heads, and store each result to all of them.
#pragma once

#include "async_copy.cuh"
#include "cluster.cuh"
#include "cluster_plan.h"
#include "half_mma.cuh"
#include "latent_append.cuh"

namespace tinylm::cuda {

inline constexpr int kClusterWarps = 8;  // that attend; two more rotate queries and append
inline constexpr int kAttendThreads = 32 * kClusterWarps;
inline constexpr int kClusterThreads = kAttendThreads + 64;
inline constexpr int kFragmentBytes = 512;  // an A operand of 16 x 16 halves: lane x 4 words

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
  static constexpr int kBarriers = kFreshScale + 16;      // of the queries, of the parts
  static constexpr int kFresh = kBarriers + 16;           // int8 [R]: the new token's latent
  static constexpr int kFreshRope = kFresh + kRank;       // T [P]: its key
  static constexpr int kAngles = kFreshRope + 2 * kRope;  // float2 [P / 2]
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
        const int word = unit % words_each, lane = 4 * (at.lane % 4 * 2 + d) + at.lane / 4 % 4;
        const std::int64_t block =
            static_cast<std::int64_t>(row_block + min(first + i, last)) * args.kv_b_blocks() +
            word / 4;
        // Volatile: it shall not wait for tokens that are asked for later.
        asm volatile("ld.global.nc.u32 %0, [%1];"
                     : "=r"(words[i][d])
                     : "l"(args.kv_b + block * kWeightBlockBytes + 16 * lane + word % 4 * 4));
      }
    }
  }
};

/// A query times W_uk's scales and a power of two: a warp has one of this thread block's heads.
template <int kRank, int kRope, typename T>
struct QueryScaling {
  static constexpr int kParts = 4;  // of 32 dimensions
  static_assert(kClusterHeads / kMinCluster <= kClusterWarps, "a warp has one head");
  float scale[kParts];
  T q[kParts];

  __device__ void load_scales(const LatentArgs<T>& args, const ClusterPlace& at) {
    const int head = at.first_head + at.rank * at.heads_each() + at.warp;
    const float* from = args.kv_b_scale + head * (args.nope_dim + args.value_dim);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int d = 32 * part + at.lane;
      scale[part] = d < args.nope_dim ? from[d] : 0.0F;
    }
  }
  __device__ void load_query(const LatentArgs<T>& args, const ClusterPlace& at) {
    const int head = at.first_head + at.rank * at.heads_each() + at.warp;
    const T* from = args.qkv + static_cast<std::int64_t>(at.b) * args.width + head * args.qk_dim();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int d = 32 * part + at.lane;
      q[part] = d < args.nope_dim ? from[d] : from_float<T>(0.0F);
    }
  }
  /// To float [heads][nope].
  __device__ void store(const LatentArgs<T>& args, const ClusterPlace& at, unsigned char* memory) {
    using Memory = ClusterMemory<kRank, kRope>;
    auto* scaled = reinterpret_cast<float*>(memory + Memory::kWeights) + at.warp * args.nope_dim;
    float values[kParts], bound = 0.0F;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      values[part] = to_float(q[part]) * scale[part];
      bound += fabsf(values[part]);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      bound += __shfl_xor_sync(0xffffffffU, bound, offset);
    }
    const float up = detail::scale_up(bound);  // no sum of codes times these can be larger
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int d = 32 * part + at.lane;
      if (d < args.nope_dim) scaled[d] = values[part] * up;
    }
    if (at.lane == 0) {
      const int local = at.rank * at.heads_each() + at.warp;
      *reinterpret_cast<float*>(memory + local * Memory::kQueryStride + Memory::kQueryScale) =
          1.0F / up * args.softmax_scale * 1.4426950408889634F;
    }
  }
};

/// W_uk^T q of this thread block's heads: a warp takes a head and 32 latent dimensions at a time.
/// @param codes Of the warp's first units.
template <int kRank, int kRope, typename T>
__device__ inline void absorb_queries(const LatentArgs<T>& args, const ClusterPlace& at,
                                      const KeyCodes (&first_codes)[2], unsigned char* memory) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kWords = kRank / 32;
  const int g = at.lane / 4, t = at.lane % 4, num_blocks = args.nope_dim / 16;
  const std::uint32_t byte = at.lane / 16 * 2;
  const auto* scaled = reinterpret_cast<const float*>(memory + Memory::kWeights);
  const int num_units = at.heads_here() * kWords;
  KeyCodes codes = first_codes[0];
  for (int unit = at.warp; unit < num_units; unit += kClusterWarps) {
    const float* q = scaled + unit / kWords * args.nope_dim + 2 * t;
    float sums[2][4] = {};
    for (int first = 0; first < num_blocks; first += 2) {
      const KeyCodes now = codes;
      if (first + 2 < num_blocks) {
        codes.load(args, at, unit, kWords, first + 2);
      } else if (unit == at.warp) {
        codes = first_codes[1];
      } else if (unit + kClusterWarps < num_units) {
        codes.load(args, at, unit + kClusterWarps, kWords, 0);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // A = 16 latent dimensions x 16 of the head, B = the query: column 0 has the larger half of
        // each value, column 1 the rest.
        std::uint32_t b[2];
        const int block = min(first + i, num_blocks - 1);
        for (int u = 0; u < 2; ++u) {
          const float2 pair = *reinterpret_cast<const float2*>(q + 16 * block + 8 * u);
          b[u] = detail::pack_part(pair.x, pair.y, g == 1);
          if (g >= 2 || block < first + i) b[u] = 0;  // no branch: loads overlap
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
struct QueryRotation {
  static constexpr int kHalf = kRope / 2;
  T first[2];  // the lane's first pair

  static __device__ void load(const LatentArgs<T>& args, const ClusterPlace& at, int i, T (&x)[2]) {
    const int head = at.first_head + at.rank * at.heads_each() + i / kHalf;
    const T* q = args.qkv + static_cast<std::int64_t>(at.b) * args.width + head * args.qk_dim() +
                 args.nope_dim + i % kHalf;
    x[0] = q[0], x[1] = q[kHalf];
  }
  __device__ void load_first(const LatentArgs<T>& args, const ClusterPlace& at) {
    if (at.lane < at.heads_here() * kHalf) load(args, at, at.lane, first);
  }
  /// @param angle Of pair `lane`.
  __device__ void store(const LatentArgs<T>& args, const ClusterPlace& at, float2 angle,
                        unsigned char* memory) {
    using Memory = ClusterMemory<kRank, kRope>;
    auto* angles = reinterpret_cast<float2*>(memory + Memory::kAngles);
    if (at.lane < kHalf) angles[at.lane] = angle;
    __syncwarp();
    for (int i = at.lane; i < at.heads_here() * kHalf; i += 32) {
      const int local = at.rank * at.heads_each() + i / kHalf, pair = i % kHalf;
      T* to = reinterpret_cast<T*>(memory + local * Memory::kQueryStride + 2 * kRank);
      T turned[2];
      rotate_pair(first, turned, 1, 0, angles[pair].x, angles[pair].y);
      to[detail::query_column<4>(pair)] = turned[0];
      to[detail::query_column<4>(pair + kHalf)] = turned[1];
      if (i + 32 < at.heads_here() * kHalf) load(args, at, i + 32, first);
    }
  }
};

/// This thread block's queries to the others.
template <int kRank, int kRope>
__device__ inline void send_queries(const ClusterPlace& at, const unsigned char* memory) {
  using Memory = ClusterMemory<kRank, kRope>;
  constexpr int kPieces = Memory::kQueryStride / 16;
  const int first = Memory::kQuery + at.rank * at.heads_each() * Memory::kQueryStride;
  const int pieces = at.heads_here() * kPieces;
  for (int other = 1 + at.warp; other < at.size; other += kClusterWarps) {
    const int to = (at.rank + other) & (at.size - 1);
    const std::uint32_t there = cluster_address(at.memory + first, to);
    const std::uint32_t arrival = cluster_address(at.memory + Memory::kBarriers, to);
    for (int i = at.lane; i < pieces; i += 32) {
      detail::store_remote(there + 16 * i,
                           *reinterpret_cast<const float4*>(memory + first + 16 * i), arrival);
    }
  }
}

/// One warp norms, quantises and rotates the new token, as quantize_row() does, into shared memory
/// and into the cache.
template <int kRank, int kRope, typename T>
struct FreshToken {
  static constexpr int kHalf = kRope / 2, kParts = (kRank + 127) / 128;  // of 4 values a lane
  uint2 raw[kParts];
  T key[2];
  float4 norm[kParts], normed[kParts];

  static __device__ bool has(int lane, int part) { return 128 * part + 4 * lane < kRank; }

  __device__ void load_norm(const LatentArgs<T>& args, int lane) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      norm[part] = has(lane, part) ? load4(args.norm_weight + 128 * part + 4 * lane) : float4{};
    }
  }
  __device__ void load(const LatentArgs<T>& args, const ClusterPlace& at) {
    const T* kv = args.qkv + static_cast<std::int64_t>(at.b) * args.width +
                  static_cast<std::int64_t>(args.num_heads) * args.qk_dim();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const T* from = kv + 128 * part + 4 * at.lane;
      raw[part] = has(at.lane, part) ? *reinterpret_cast<const uint2*>(from) : uint2{};
    }
    if (at.lane < kHalf) key[0] = kv[kRank + at.lane], key[1] = kv[kRank + at.lane + kHalf];
  }
  /// @param angle Of pair `lane`.
  __device__ void rotate(const LatentArgs<T>& args, const ClusterPlace& at, float2 angle,
                         std::int64_t slot, unsigned char* memory) {
    if (at.lane >= kHalf) return;
    T* to = reinterpret_cast<T*>(memory + ClusterMemory<kRank, kRope>::kFreshRope) + at.lane;
    T turned[2];
    rotate_pair(key, turned, 1, 0, angle.x, angle.y);
    to[0] = turned[0], to[kHalf] = turned[1];
    if (at.first_head != 0) return;  // one group of heads stores
    args.rope[slot * kRope + at.lane] = turned[0];
    args.rope[slot * kRope + at.lane + kHalf] = turned[1];
  }
  __device__ void normalise(const LatentArgs<T>& args) {
    double squares = 0.0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      T x[4];
      memcpy(x, &raw[part], sizeof(x));
      normed[part] = make_float4(to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3]));
      const double a = normed[part].x, b = normed[part].y, c = normed[part].z, d = normed[part].w;
      squares += a * a + b * b + (c * c + d * d);
    }
    squares = detail::block_reduce<32>(squares, [](double a, double b) { return a + b; });
    const auto r = static_cast<float>(1.0 / sqrt(squares / kRank + static_cast<double>(args.eps)));
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float4 v = normed[part], w = norm[part];
      normed[part] = make_float4(v.x * r * w.x, v.y * r * w.y, v.z * r * w.z, v.w * r * w.w);
    }
  }
  __device__ void quantize(const LatentArgs<T>& args, const ClusterPlace& at, std::int64_t slot,
                           unsigned char* memory) const {
    using Memory = ClusterMemory<kRank, kRope>;
    std::uint32_t largest = __float_as_uint(1e-5F);  // not-a-number is larger than all others
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float4 v = normed[part];
      if (!has(at.lane, part)) continue;
      largest = max(max(largest, __float_as_uint(fabsf(v.x))), __float_as_uint(fabsf(v.y)));
      largest = max(max(largest, __float_as_uint(fabsf(v.z))), __float_as_uint(fabsf(v.w)));
    }
    largest = __reduce_max_sync(0xffffffffU, largest);
    const float s = 127.0F / __uint_as_float(largest);
    const bool stores = at.first_head == 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float4 v = normed[part];
      const int column = 128 * part + 4 * at.lane;
      const std::uint32_t word =
          detail::pack4(detail::int8_value(v.x * s), detail::int8_value(v.y * s),
                        detail::int8_value(v.z * s), detail::int8_value(v.w * s));
      if (!has(at.lane, part)) continue;
      *reinterpret_cast<std::uint32_t*>(memory + Memory::kFresh + column) = word;
      if (stores) *reinterpret_cast<std::uint32_t*>(args.latent + slot * kRank + column) = word;
    }
    if (at.lane == 0) {
      *reinterpret_cast<float*>(memory + Memory::kFreshScale) = s;
      if (stores) args.scale[slot] = s;
    }
  }
};

namespace detail {

/// Asks L2 for `bytes`, by a thread block.
__device__ inline void prefetch(const void* p, std::int64_t bytes) {
  for (std::int64_t i = 128 * threadIdx.x; i < bytes; i += 128 * kClusterThreads) {
    prefetch(static_cast<const unsigned char*>(p) + i);
  }
}

}  // namespace detail

/// Asks L2 for what this thread block will read, while the kernel before may still run. Not for
/// tokens where all thread blocks' would come before the small things of the last ones.
template <int kRank, int kRope, typename T>
__device__ inline void prefetch_row(const LatentArgs<T>& args, const ClusterPlace& at) {
  const int rows = args.nope_dim + args.value_dim, heads = at.heads_here();
  const int head = at.first_head + at.rank * at.heads_each();
  const std::int64_t row_bytes = static_cast<std::int64_t>(args.kv_b_blocks()) * 32;
  const T* qkv = args.qkv + static_cast<std::int64_t>(at.b) * args.width;
  if (threadIdx.x < 2) detail::prefetch((threadIdx.x == 0 ? args.past_lens : args.seq_lens) + at.b);
  detail::prefetch(qkv + head * args.qk_dim(), 2LL * heads * args.qk_dim());
  detail::prefetch(qkv + static_cast<std::int64_t>(args.num_heads) * args.qk_dim(),
                   2 * (kRank + kRope));
  for (int i = 0; i < heads; ++i) {
    const std::int64_t row = static_cast<std::int64_t>(head + i) * rows;
    const std::uint8_t* codes = args.kv_b + row * row_bytes;
    detail::prefetch(codes + args.nope_dim * row_bytes, args.value_dim * row_bytes);
    if (threadIdx.x < 2) {
      detail::prefetch(args.kv_b_scale + row + args.nope_dim + threadIdx.x * (args.value_dim - 1));
    }
  }
  constexpr unsigned kFew = 64;
  if (gridDim.x * gridDim.y * gridDim.z > kFew) return;
  const std::int64_t first = static_cast<std::int64_t>(at.rank) * kClusterTokens;
  const std::int64_t slot = static_cast<std::int64_t>(at.b) * args.capacity + first;
  const std::int64_t count =
      max(std::int64_t{0}, min(std::int64_t{kClusterTokens}, args.capacity - first));
  detail::prefetch(args.latent + slot * kRank, count * kRank);
  detail::prefetch(args.rope + slot * kRope, count * 2 * kRope);
  detail::prefetch(args.scale + slot, count * 4);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace tinylm::cuda
