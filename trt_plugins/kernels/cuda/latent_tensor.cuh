// latent_attend() of latent_decode.cuh for half precision, with tensor cores: 16 heads are the 16
// rows of mma.m16n8k16. Latents are integers that half holds exactly; queries and weights are split
// into two halves each, so that 22 bits of them count.
#pragma once

#include "latent_decode.cuh"
#include "latent_prefill.cuh"

namespace tinylm::cuda {

inline constexpr int kTensorThreads = 128;

/// Sizes in shared memory: rows are padded so that fragments come without bank conflicts.
struct TensorMemory {
  int rank, rope_dim;
  __host__ __device__ int latent_stride() const { return rank + 16; }   // bytes
  __host__ __device__ int query_stride() const { return rank + 8; }     // halves
  __host__ __device__ int rope_stride() const { return rope_dim + 8; }  // elements of T
  static constexpr int kWeightHalves = kDecodeTokens + 8;
  __host__ __device__ int stage_bytes() const {
    return kDecodeTokens * (latent_stride() + 2 * rope_stride() + 4);
  }
  __host__ __device__ int fixed_bytes() const {
    return 2 * 2 * kDecodeHeads * query_stride() + 2 * kDecodeHeads * rope_stride() +
           2 * 2 * kDecodeHeads * kWeightHalves + 4 * kDecodeHeads * (4 + 4 + 4);
  }
  __host__ __device__ int bytes() const { return fixed_bytes() + 2 * stage_bytes(); }
};

namespace detail {

/// Two int8 of a word as two exact halves: 1024 + 128 + value, minus 1152.
__device__ inline std::uint32_t widen_pair(std::uint32_t biased, std::uint32_t selector) {
  const std::uint32_t raw = __byte_perm(biased, 0x64646464U, selector);
  std::uint32_t out;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(out) : "r"(raw), "r"(0x64806480U));
  return out;
}

/// x = high + low to 22 bits.
__device__ inline void split(float x, __half& high, __half& low) {
  high = __float2half_rn(x);
  low = __float2half_rn(x - __half2float(high));
}

}  // namespace detail

/// As latent_attend(): grid tokens x chunks x groups of heads. R is a multiple of 64, P of 16;
/// kColumns: R / 64.
template <int kColumns, typename T>
__global__ void __launch_bounds__(kTensorThreads)
    latent_attend_tensor(LatentArgs<T> args, std::int64_t first_token, ChunkLayout layout,
                         const float* query, float* sums, float* stats) {
  constexpr int kRank = 64 * kColumns;
  const std::int64_t token = first_token + blockIdx.x;
  const NewToken t_new = new_token(args, token);
  const int chunk = blockIdx.y, first_head = blockIdx.z * kDecodeHeads;
  const int begin = chunk * layout.chunk_tokens;
  const int visible = min(min(t_new.position + 1, args.capacity), begin + layout.chunk_tokens);
  if (!t_new.valid || begin >= visible) return;
  const int num_heads = min(kDecodeHeads, args.num_heads - first_head);
  const int rope_dim = args.rope_dim, width = kRank + rope_dim;
  const TensorMemory sizes{kRank, rope_dim};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

  extern __shared__ __align__(16) unsigned char memory[];
  auto* q_high = reinterpret_cast<__half*>(memory);  // [heads][R]
  __half* q_low = q_high + kDecodeHeads * sizes.query_stride();
  T* q_rope = reinterpret_cast<T*>(q_low + kDecodeHeads * sizes.query_stride());  // [heads][P]
  auto* w_high = reinterpret_cast<__half*>(q_rope + kDecodeHeads * sizes.rope_stride());
  __half* w_low = w_high + kDecodeHeads * TensorMemory::kWeightHalves;  // [heads][tokens]
  auto* q_scale = reinterpret_cast<float*>(w_low + kDecodeHeads * TensorMemory::kWeightHalves);
  float* warp_most = q_scale + 4 * kDecodeHeads;     // [warps][heads]
  float* warp_total = warp_most + 4 * kDecodeHeads;  // [warps][heads]
  unsigned char* stages = memory + sizes.fixed_bytes();

  const std::int64_t first_slot = static_cast<std::int64_t>(t_new.b) * args.capacity;
  const auto copy_tile = [&](int tile, int stage) {
    unsigned char* latent = stages + stage * sizes.stage_bytes();
    T* rope = reinterpret_cast<T*>(latent + kDecodeTokens * sizes.latent_stride());
    float* scale = reinterpret_cast<float*>(rope + kDecodeTokens * sizes.rope_stride());
    for (int i = threadIdx.x; i < kDecodeTokens * (kRank / 16); i += kTensorThreads) {
      const int row = i / (kRank / 16), piece = i % (kRank / 16);
      const bool exists = tile + row < visible;
      const std::int64_t slot = first_slot + (exists ? tile + row : 0);
      detail::copy_async(latent + row * sizes.latent_stride() + 16 * piece,
                         args.latent + slot * kRank + 16 * piece, exists);
    }
    const int rope_pieces = rope_dim / 8;
    for (int i = threadIdx.x; i < kDecodeTokens * rope_pieces; i += kTensorThreads) {
      const int row = i / rope_pieces, piece = i % rope_pieces;
      const bool exists = tile + row < visible;
      const std::int64_t slot = first_slot + (exists ? tile + row : 0);
      detail::copy_async(rope + row * sizes.rope_stride() + 8 * piece,
                         args.rope + slot * rope_dim + 8 * piece, exists);
    }
    for (int row = threadIdx.x; row < kDecodeTokens; row += kTensorThreads) {
      scale[row] = tile + row < visible ? args.scale[first_slot + tile + row] : 1.0F;
    }
    detail::commit_copies();
  };
  copy_tile(begin, 0);

  // Queries: four heads a warp. A power of two brings the largest of a head near 1.
  for (int h = warp; h < kDecodeHeads; h += kTensorThreads / 32) {
    const float* from =
        query + (static_cast<std::int64_t>(blockIdx.x) * args.num_heads + first_head + h) * width;
    const bool exists = h < num_heads;
    float values[kRank / 32], most = 0.0F;
    for (int i = 0; i < kRank / 32; ++i) {
      values[i] = exists ? from[lane + 32 * i] : 0.0F;
      most = fmaxf(most, fabsf(values[i]));
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, offset));
    }
    const int exponent = most > 0.0F && most < INFINITY ? ilogbf(most) : 0;
    for (int i = 0; i < kRank / 32; ++i) {
      const int at = h * sizes.query_stride() + lane + 32 * i;
      detail::split(scalbnf(values[i], -exponent), q_high[at], q_low[at]);
    }
    for (int i = lane; i < rope_dim; i += 32) {
      q_rope[h * sizes.rope_stride() + i] = from_float<T>(exists ? from[kRank + i] : 0.0F);
    }
    if (lane == 0) q_scale[h] = scalbnf(1.0F, exponent);
  }

  float acc[2 * kColumns][4] = {};  // heads g and g + 8 x this warp's R / 4 dimensions
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};  // the same in every warp
  const int num_tiles = (visible - begin + kDecodeTokens - 1) / kDecodeTokens;
  for (int step = 0; step < num_tiles; ++step) {
    const int tile = begin + step * kDecodeTokens;
    if (step + 1 < num_tiles) {
      copy_tile(tile + kDecodeTokens, (step + 1) % 2);
      detail::wait_for_copies<1>();
    } else {
      detail::wait_for_copies<0>();
    }
    __syncthreads();
    const unsigned char* latent = stages + step % 2 * sizes.stage_bytes();
    const T* rope = reinterpret_cast<const T*>(latent + kDecodeTokens * sizes.latent_stride());
    const float* scale = reinterpret_cast<const float*>(rope + kDecodeTokens * sizes.rope_stride());

    // Scores of 16 heads and this warp's 16 tokens. Dimension 4 t + j of 16 is k index 2 t + j
    // for j < 2, else 2 t + 6 + j: any order serves, if both operands have it.
    float score[2][4] = {}, low_score[2][4] = {}, rope_score[2][4] = {};
#pragma unroll 4
    for (int k = 0; k < kRank / 16; ++k) {
      std::uint32_t high[4], low[4];
      for (int r = 0; r < 2; ++r) {
        const int at = (g + 8 * r) * sizes.query_stride() + 16 * k + 4 * t;
        const uint2 h = *reinterpret_cast<const uint2*>(q_high + at);
        const uint2 l = *reinterpret_cast<const uint2*>(q_low + at);
        high[r] = h.x, high[r + 2] = h.y, low[r] = l.x, low[r + 2] = l.y;
      }
      for (int n = 0; n < 2; ++n) {
        const std::uint32_t word =
            *reinterpret_cast<const std::uint32_t*>(
                latent + (16 * warp + 8 * n + g) * sizes.latent_stride() + 16 * k + 4 * t) ^
            0x80808080U;
        const std::uint32_t b0 = detail::widen_pair(word, 0x4140);
        const std::uint32_t b1 = detail::widen_pair(word, 0x4342);
        detail::multiply(score[n], high, b0, b1, __half{});
        detail::multiply(low_score[n], low, b0, b1, __half{});
      }
    }
    for (int k = 0; k < rope_dim / 16; ++k) {
      std::uint32_t a[4];
      for (int r = 0; r < 2; ++r) {
        const uint2 q = *reinterpret_cast<const uint2*>(q_rope + (g + 8 * r) * sizes.rope_stride() +
                                                        16 * k + 4 * t);
        a[r] = q.x, a[r + 2] = q.y;
      }
      for (int n = 0; n < 2; ++n) {
        const uint2 key = *reinterpret_cast<const uint2*>(
            rope + (16 * warp + 8 * n + g) * sizes.rope_stride() + 16 * k + 4 * t);
        detail::multiply(rope_score[n], a, key.x, key.y, T{});
      }
    }
    float most[2] = {largest[0], largest[1]}, inverse[2][2];
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + 8 * n + 2 * t + i % 2, r = i / 2;
        inverse[n][i % 2] = 1.0F / scale[row];
        const float value =
            (score[n][i] + low_score[n][i]) * q_scale[g + 8 * r] * inverse[n][i % 2] +
            rope_score[n][i];
        score[n][i] = tile + row < visible ? value * args.softmax_scale : -INFINITY;
        most[r] = larger(most[r], score[n][i]);
      }
    }
    for (int r = 0; r < 2; ++r) {
      most[r] = larger(most[r], __shfl_xor_sync(0xffffffffU, most[r], 1));
      most[r] = larger(most[r], __shfl_xor_sync(0xffffffffU, most[r], 2));
      if (t == 0) warp_most[warp * kDecodeHeads + g + 8 * r] = most[r];
    }
    __syncthreads();
    float sum[2] = {}, keep[2];
    for (int r = 0; r < 2; ++r) {
      for (int w = 0; w < kTensorThreads / 32; ++w) {
        most[r] = larger(most[r], warp_most[w * kDecodeHeads + g + 8 * r]);
      }
      keep[r] = expf(largest[r] - most[r]);
      largest[r] = most[r];
    }
    for (int n = 0; n < 2; ++n) {
      for (int r = 0; r < 2; ++r) {
        const int at = (g + 8 * r) * TensorMemory::kWeightHalves + 16 * warp + 8 * n + 2 * t;
        __half high[2], low[2];
        for (int c = 0; c < 2; ++c) {
          const float weight = expf(score[n][2 * r + c] - most[r]);
          sum[r] += weight;
          detail::split(weight * inverse[n][c], high[c], low[c]);
        }
        *reinterpret_cast<__half2*>(w_high + at) = __halves2half2(high[0], high[1]);
        *reinterpret_cast<__half2*>(w_low + at) = __halves2half2(low[0], low[1]);
      }
    }
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffffU, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffU, sum[r], 2);
      if (t == 0) warp_total[warp * kDecodeHeads + g + 8 * r] = sum[r];
    }
    __syncthreads();
    for (int r = 0; r < 2; ++r) {
      total[r] *= keep[r];
      for (int w = 0; w < kTensorThreads / 32; ++w) {
        total[r] += warp_total[w * kDecodeHeads + g + 8 * r];
      }
      for (auto& column : acc) {
        column[2 * r] *= keep[r];
        column[2 * r + 1] *= keep[r];
      }
    }

    // Weighted latents. Transposed loads take two bytes, of dimensions 2 n and 2 n + 1, as one.
#pragma unroll
    for (int k = 0; k < kDecodeTokens / 16; ++k) {
      std::uint32_t high[4], low[4];
      const int at = (lane % 16) * TensorMemory::kWeightHalves + 16 * k + lane / 16 * 8;
      detail::load_matrices(high, w_high + at);
      detail::load_matrices(low, w_low + at);
#pragma unroll
      for (int pair = 0; pair < kColumns; ++pair) {
        // Four matrices would be 32 dimensions; a warp has 16 at a time.
        const int column = 16 * (warp * kColumns + pair);
        std::uint32_t r[2];
        const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(
            latent + (16 * k + lane % 16) * sizes.latent_stride() + column));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address));
        r[0] ^= 0x80808080U;
        r[1] ^= 0x80808080U;
        for (int odd = 0; odd < 2; ++odd) {
          const std::uint32_t selector = odd ? 0x4341 : 0x4240;
          const std::uint32_t b0 = detail::widen_pair(r[0], selector);
          const std::uint32_t b1 = detail::widen_pair(r[1], selector);
          detail::multiply(acc[2 * pair + odd], high, b0, b1, __half{});
          detail::multiply(acc[2 * pair + odd], low, b0, b1, __half{});
        }
      }
    }
    __syncthreads();  // before the next copies overwrite this stage
  }

  const std::int64_t part = static_cast<std::int64_t>(blockIdx.x) * layout.num_chunks + chunk;
  for (int r = 0; r < 2; ++r) {
    const int h = g + 8 * r;
    if (h >= num_heads) continue;
    const std::int64_t at = part * args.num_heads + first_head + h;
    for (int pair = 0; pair < kColumns; ++pair) {
      float* to = sums + at * kRank + 16 * (warp * kColumns + pair) + 4 * t;
      // Columns 2 t and 2 t + 1 of the even and the odd fragment.
      *reinterpret_cast<float4*>(to) =
          make_float4(acc[2 * pair][2 * r], acc[2 * pair + 1][2 * r], acc[2 * pair][2 * r + 1],
                      acc[2 * pair + 1][2 * r + 1]);
    }
    if (warp == 0 && t == 0) {
      stats[2 * at] = largest[r];
      stats[2 * at + 1] = total[r];
    }
  }
}

}  // namespace tinylm::cuda
