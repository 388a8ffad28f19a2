// Keys and values of cached tokens from their int8 latents: exact int32 sums with ternary codes,
// read from the cache as it is. Latents are the A operand of mma.m16n8k32, codes the B operand.
#pragma once

#include "async_copy.cuh"
#include "latent_append.cuh"
#include "latent_prefill.cuh"

namespace tinylm::cuda {

inline constexpr int kExpandThreads = 256;
inline constexpr int kExpandTokens = 64;                           // of a thread block
inline constexpr int kExpandOutputs = 32 * (kExpandThreads / 32);  // of it, 32 a warp
inline constexpr int kExpandMultiple = 32;                         // of R
inline constexpr int kExpandStride = 80;                           // of 32 outputs, padded

namespace detail {

/// acc += A . B with signed latents and unsigned codes {0, 1, 2}.
__device__ inline void multiply_latents(int (&acc)[4], const std::uint32_t (&a)[4],
                                        std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// x / s, for a result that is rounded again: one step of Newton's method, no branch.
__device__ inline float quotient(float x, float s, float inverse) {
  const float y = x * inverse, better = fmaf(fmaf(-y, s, x), inverse, y);
  return s == 0.0F ? y : better;
}

}  // namespace detail

/// Bytes of shared memory: latents, padded so that matrices load without bank conflicts, s,
/// 1/s and sums; 16 tokens' outputs a warp.
inline int expand_bytes(int rank) {
  return kExpandTokens * (rank + 16 + 12) + kExpandThreads / 32 * 16 * kExpandStride;
}

/// Grid: tiles of tokens x groups of outputs, or fewer, x batch rows from first_row on. R is a
/// multiple of 32, H * (nope + Dv) of 8.
/// @param expanded T [rows, C, H * (nope + Dv)]; slots that hold no token are left as they are.
template <typename T>
__global__ void __launch_bounds__(kExpandThreads, 2)
    latent_expand(const __grid_constant__ LatentArgs<T> args, int first_row, T* expanded) {
  const int b = first_row + blockIdx.z, first = blockIdx.x * kExpandTokens, rank = args.rank;
  extern __shared__ __align__(16) unsigned char memory[];
  const int stride = rank + 16;
  auto* scales = reinterpret_cast<float*>(memory + kExpandTokens * stride);
  auto* inverses = scales + kExpandTokens;
  auto* sums = reinterpret_cast<int*>(inverses + kExpandTokens);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

  const int n = args.num_heads * (args.nope_dim + args.value_dim);
  const int k_blocks = args.kv_b_blocks(), last_block = (n + 15) / 16 - 1;
  const std::uint8_t* packed[2];
  uint4 next[2] = {};
  const auto load_first = [&](int block) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const std::int64_t at = min(block + u, last_block);
      packed[u] = args.kv_b + 16 * lane + at * k_blocks * kWeightBlockBytes;
      next[u] = *reinterpret_cast<const uint4*>(packed[u]);
    }
  };
  int block = 2 * (blockIdx.y * (kExpandThreads / 32) + warp);
  load_first(block);
  wait_for_previous_kernel();
  launch_next_kernel();  // not earlier: latent_prefill_wgmma() reads angles without a wait
  const int count = min(args.past_lens[b] + args.seq_lens[b], args.capacity) - first;
  if (count <= 0) return;

  const std::int64_t slot = static_cast<std::int64_t>(b) * args.capacity + first;
  const int pieces = rank / 16;
  for (int i = threadIdx.x; i < kExpandTokens * pieces; i += kExpandThreads) {
    const int row = i / pieces, piece = i % pieces;
    const std::int8_t* from = args.latent + slot * rank;
    detail::copy_async(memory + row * stride + 16 * piece, from + (row < count ? 16 * i : 0),
                       row < count);
  }
  detail::commit_copies();
  if (threadIdx.x < kExpandTokens) {
    scales[threadIdx.x] =
        static_cast<int>(threadIdx.x) < count ? args.scale[slot + threadIdx.x] : 1.0F;
  }
  detail::wait_for_copies<0>();
  __syncthreads();
  {
    // Four neighbouring threads sum a token's latents.
    const int row = threadIdx.x / 4, part = threadIdx.x % 4;
    int sum = 0;
    for (int i = part; i < rank / 4; i += 4) {
      sum = __dp4a(*reinterpret_cast<const int*>(memory + row * stride + 4 * i), 0x01010101, sum);
    }
    sum += __shfl_xor_sync(0xffffffffU, sum, 1);
    sum += __shfl_xor_sync(0xffffffffU, sum, 2);
    if (part == 0) {
      sums[row] = sum;
      inverses[row] = 1.0F / scales[row];
    }
  }
  __syncthreads();
  unsigned char* rows =
      reinterpret_cast<unsigned char*>(sums + kExpandTokens) + warp * 16 * kExpandStride;
  T* out = expanded + (static_cast<std::int64_t>(blockIdx.z) * args.capacity + first) * n;
#pragma unroll 1
  while (block <= last_block) {
    int acc[kExpandTokens / 16][4][4] = {};
    for (int k = 0; k < k_blocks; ++k) {
      const uint4 four[2] = {next[0], next[1]};
      if (k + 1 < k_blocks) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          next[u] = *reinterpret_cast<const uint4*>(packed[u] + (k + 1) * kWeightBlockBytes);
        }
      }
      const std::uint32_t words[2][4] = {{four[0].x, four[0].y, four[0].z, four[0].w},
                                         {four[1].x, four[1].y, four[1].z, four[1].w}};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int column = kBlockInputs * k + 32 * w;
        if (column >= rank) break;
        std::uint32_t codes[2][4];
        unpack(words[0][w], codes[0]);
        unpack(words[1][w], codes[1]);
#pragma unroll
        for (int m = 0; m < kExpandTokens / 16; ++m) {
          std::uint32_t a[4];
          detail::load_matrices(a,
                                memory + (16 * m + lane % 16) * stride + column + lane / 16 * 16);
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            detail::multiply_latents(acc[m][2 * u], a, codes[u][0], codes[u][2]);
            detail::multiply_latents(acc[m][2 * u + 1], a, codes[u][1], codes[u][3]);
          }
        }
      }
    }

    // 16 tokens at a time pass through shared memory: whole sectors reach memory at once.
    const int first_column = 16 * block;
    block += 2 * gridDim.y * (kExpandThreads / 32);
    load_first(block);
    float2 scale[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int column = min(first_column + 8 * u + 2 * t, n - 2);
      scale[u] = *reinterpret_cast<const float2*>(args.kv_b_scale + column);
    }
#pragma unroll
    for (int m = 0; m < kExpandTokens / 16; ++m) {
      __syncwarp();  // the tokens before have been read
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * m + g + 8 * r, sum = sums[row];
        const float s = scales[row], inverse = inverses[row];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const float low = static_cast<float>(acc[m][u][2 * r] - sum) * scale[u].x;
          const float high = static_cast<float>(acc[m][u][2 * r + 1] - sum) * scale[u].y;
          *reinterpret_cast<std::uint32_t*>(rows + (g + 8 * r) * kExpandStride + 16 * u + 4 * t) =
              detail::pack2<T>(detail::quotient(low, s, inverse),
                               detail::quotient(high, s, inverse));
        }
      }
      __syncwarp();
      const int column = first_column + 8 * t;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * m + g + 8 * r;
        if (row < count && column < n) {
          *reinterpret_cast<uint4*>(out + static_cast<std::int64_t>(row) * n + column) =
              *reinterpret_cast<const uint4*>(rows + (g + 8 * r) * kExpandStride + 16 * t);
        }
      }
    }
  }
}

}  // namespace tinylm::cuda
