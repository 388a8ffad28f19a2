// What comes after attention in latent_cluster(): the parts of a cluster's thread blocks combined
// in their order, and the value up-projection. Each thread block has some of the heads.
#pragma once

#include "cluster_query.cuh"

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

}  // namespace detail

/// Mean latents of this thread block's heads, float [heads][R], and what makes them 1/s: [heads].
template <int kRank, int kRope>
__device__ inline void combine_parts(const ClusterPlace& at, const unsigned char* memory,
                                     float* combined, float* ratio) {
  using Memory = ClusterMemory<kRank, kRope>;
  const auto* stats = reinterpret_cast<const float4*>(memory + Memory::kStats);
  const auto* parts = reinterpret_cast<const float*>(memory + Memory::kParts);
  const int heads = at.heads_each(), columns = at.heads_here() * kRank;
  for (int i = threadIdx.x; i < columns; i += kAttendThreads) {
    // A warp's columns are of one head; lanes p and p + 16 have part p.
    const int head = i / kRank, column = i % kRank, part = at.lane % kMaxCluster;
    float4 stat = make_float4(-INFINITY, 0.0F, 0.0F, 0.0F);
    if (part < at.size) stat = stats[part * heads + head];
    float most = stat.x;
    for (int offset = kMaxCluster / 2; offset > 0; offset /= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, offset));
    }
    const float share = detail::weight_of(stat.x, most);
    float total = stat.y * share, weights = stat.z * share, sum = 0.0F;
    for (int offset = kMaxCluster / 2; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(0xffffffffU, total, offset);
      weights += __shfl_xor_sync(0xffffffffU, weights, offset);
    }
#pragma unroll
    for (int p = 0; p < kMaxCluster; ++p) {
      const float x = p < at.size ? parts[(p * heads + head) * kRank + column] : 0.0F;
      sum = fmaf(x, __shfl_sync(0xffffffffU, share, p), sum);
    }
    combined[i] = sum / weights;
    if (column == 0) ratio[head] = weights / total;
  }
}

/// 16 rows of W_uv and their scales.
template <int kRank>
struct ValueCodes {
  static constexpr int kBlocks = (kRank + 127) / 128;
  uint4 blocks[kBlocks];
  float scale[2];  // of values g and g + 8

  template <typename T>
  __device__ void load(const LatentArgs<T>& args, const ClusterPlace& at, int unit) {
    const int tiles = args.value_dim / 16;
    const int head = at.first_head + at.rank * at.heads_each() + unit / tiles;
    const int row = head * (args.nope_dim + args.value_dim) + args.nope_dim + unit % tiles * 16;
    const std::uint8_t* from =
        args.kv_b + static_cast<std::int64_t>(row / 16) * kBlocks * kWeightBlockBytes;
    for (int i = 0; i < kBlocks; ++i) {
      blocks[i] = load_weights(from + i * kWeightBlockBytes + 16 * at.lane);
    }
    for (int u = 0; u < 2; ++u) scale[u] = args.kv_b_scale[row + at.lane / 4 + 8 * u];
  }
};

/// y = W_uv times the mean latents of this thread block's heads: a warp takes 16 values of a head
/// at a time.
template <int kRank, typename T>
__device__ inline void project_values(const LatentArgs<T>& args, const ClusterPlace& at,
                                      ValueCodes<kRank> codes, const float* combined,
                                      const float* ratio, T* y) {
  const int g = at.lane / 4, t = at.lane % 4, tiles = args.value_dim / 16;
  const int num_units = at.heads_here() * tiles;
  for (int unit = at.warp; unit < num_units; unit += kClusterWarps) {
    const ValueCodes<kRank> now = codes;
    const int local = unit / tiles, head = at.rank * at.heads_each() + local;
    if (unit + kClusterWarps < num_units) codes.load(args, at, unit + kClusterWarps);
    const float* latent = combined + unit / tiles * kRank + 4 * t;
    float acc[2][4] = {};
#pragma unroll
    for (int word = 0; word < kRank / 32; ++word) {
      const uint4 four = now.blocks[word / 4];
      const std::uint32_t even = word % 4 == 0   ? four.x
                                 : word % 4 == 1 ? four.y
                                 : word % 4 == 2 ? four.z
                                                 : four.w;
      const std::uint32_t odd = even >> 8;
      // Column 0 has the larger half of each latent value, column 1 the rest.
      std::uint32_t b[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 v = *reinterpret_cast<const float4*>(latent + 32 * word + 16 * half);
        b[half][0] = detail::pack_part(v.x, v.z, g == 1);
        b[half][1] = detail::pack_part(v.y, v.w, g == 1);
        if (g >= 2) b[half][0] = b[half][1] = 0;  // no branch: loads overlap
      }
      const std::uint32_t low[4] = {detail::code_pair<0>(even), detail::code_pair<1>(even),
                                    detail::code_pair<0>(odd), detail::code_pair<1>(odd)};
      const std::uint32_t high[4] = {detail::code_pair<2>(even), detail::code_pair<3>(even),
                                     detail::code_pair<2>(odd), detail::code_pair<3>(odd)};
      detail::multiply(acc[0], low, b[0][0], b[0][1], __half{});
      detail::multiply(acc[1], high, b[1][0], b[1][1], __half{});
    }
    if (t != 0) continue;
    for (int u = 0; u < 2; ++u) {
      const int j = unit % tiles * 16 + g + 8 * u;
      const float sum = acc[0][2 * u] + acc[1][2 * u] + (acc[0][2 * u + 1] + acc[1][2 * u + 1]);
      y[head * args.value_dim + j] = from_float<T>(sum * ratio[local] * now.scale[u]);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace tinylm::cuda
