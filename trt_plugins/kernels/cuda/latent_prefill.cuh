// Causal attention of many new tokens with tensor cores, over keys and values expanded from the
// cache: FlashAttention-2 (2307.08691). The rope part of the keys is read from the cache as it is,
// one copy for all heads.
#pragma once

#include "half_mma.cuh"
#include "latent_append.cuh"
#include "ternary_tile.cuh"

namespace tinylm::cuda {

inline constexpr int kPrefillQueries = 64;  // of a thread block, 16 a warp
inline constexpr int kPrefillKeys = 64;     // of a tile
inline constexpr int kPrefillThreads = 128;

namespace detail {

__device__ inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

template <typename T>
__device__ inline std::uint32_t pack2(float low, float high) {
  const T values[2] = {from_float<T>(low), from_float<T>(high)};
  std::uint32_t word;
  memcpy(&word, values, sizeof(word));
  return word;
}

template <typename T>
__device__ inline float2 unpack2(std::uint32_t word) {
  T values[2];
  memcpy(values, &word, sizeof(word));
  return make_float2(to_float(values[0]), to_float(values[1]));
}

}  // namespace detail

/// Shared memory of latent_prefill(): rows padded by 16 bytes, two stages of keys and values.
template <int kKeyDim, int kValueDim>
struct PrefillMemory {
  static constexpr int kKeyStride = kKeyDim + 8;
  static constexpr int kValueStride = kValueDim + 8;
  static constexpr int kStage = kPrefillKeys * (kKeyStride + kValueStride);
  static constexpr int kBytes = 2 * (kPrefillQueries * kKeyStride + 2 * kStage);
};

/// Grid: query tiles x heads x batch rows from first_row on.
/// @param expanded T [rows, C, H * (nope + Dv)], keys without position and values of cached tokens.
/// @param angles cosine and sine [B * S, P / 2] of the new tokens.
template <int kKeyDim, int kValueDim, typename T>
__global__ void __launch_bounds__(kPrefillThreads)
    latent_prefill(LatentArgs<T> args, int first_row, const T* expanded, const float2* angles) {
  using Memory = PrefillMemory<kKeyDim, kValueDim>;
  extern __shared__ __align__(16) unsigned char memory[];
  T* q_tile = reinterpret_cast<T*>(memory);  // [queries][D]
  T* stages = q_tile + kPrefillQueries * Memory::kKeyStride;

  // The longest rows of queries first: they have the most keys.
  const int tile = gridDim.x - 1 - blockIdx.x;
  const int head = blockIdx.y, b = first_row + blockIdx.z;
  const int first = tile * kPrefillQueries;
  const int past = args.past_lens[b], fresh = args.seq_lens[b];
  const int num_queries = min(kPrefillQueries, args.length - first);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T* y = args.y +
         ((static_cast<std::int64_t>(b) * args.length + first) * args.num_heads + head) * kValueDim;
  const std::int64_t y_stride = static_cast<std::int64_t>(args.num_heads) * kValueDim;
  if (first >= fresh) {
    for (int i = threadIdx.x; i < num_queries * kValueDim; i += kPrefillThreads) {
      y[i / kValueDim * y_stride + i % kValueDim] = from_float<T>(0.0F);
    }
    return;
  }
  const int last_query = min(first + kPrefillQueries, fresh) - 1;
  const int num_keys = min(past + last_query + 1, args.capacity);
  const int head_width = args.nope_dim + kValueDim;
  const std::int64_t row_width = static_cast<std::int64_t>(args.num_heads) * head_width;
  const std::int64_t row_slot = static_cast<std::int64_t>(b) * args.capacity;
  const T* source = expanded + static_cast<std::int64_t>(blockIdx.z) * args.capacity * row_width +
                    head * head_width;

  const auto copy_keys = [&](int key, int stage) {
    T* keys = stages + stage * Memory::kStage;
    T* values = keys + kPrefillKeys * Memory::kKeyStride;
    constexpr int kPieces = (kKeyDim + kValueDim) / 8;  // of 16 bytes
    for (int i = threadIdx.x; i < kPrefillKeys * kPieces; i += kPrefillThreads) {
      const int row = i / kPieces, column = i % kPieces * 8;
      const bool exists = key + row < num_keys;
      const std::int64_t slot = exists ? key + row : 0;
      if (column < args.nope_dim) {
        detail::copy_async(keys + row * Memory::kKeyStride + column,
                           source + slot * row_width + column, exists);
      } else if (column < kKeyDim) {
        detail::copy_async(keys + row * Memory::kKeyStride + column,
                           args.rope + (row_slot + slot) * args.rope_dim + column - args.nope_dim,
                           exists);
      } else {
        detail::copy_async(values + row * Memory::kValueStride + column - kKeyDim,
                           source + slot * row_width + args.nope_dim + column - kKeyDim, exists);
      }
    }
    detail::commit_copies();
  };
  copy_keys(0, 0);

  const int half = args.rope_dim / 2;
  for (int i = threadIdx.x; i < kPrefillQueries * (args.nope_dim + half); i += kPrefillThreads) {
    const int row = i / (args.nope_dim + half), j = i % (args.nope_dim + half);
    const std::int64_t token = static_cast<std::int64_t>(b) * args.length + first + row;
    T* to = q_tile + row * Memory::kKeyStride;
    const T* from = args.qkv + token * args.width + head * kKeyDim;
    const bool exists = row < num_queries;
    if (j < args.nope_dim) {
      to[j] = exists ? from[j] : from_float<T>(0.0F);
    } else if (exists) {
      const int pair = j - args.nope_dim;
      const float2 angle = angles[token * half + pair];
      rotate_pair(from + args.nope_dim, to + args.nope_dim, half, pair, angle.x, angle.y);
    } else {
      to[j] = to[j + half] = from_float<T>(0.0F);
    }
  }
  __syncthreads();
  std::uint32_t q[kKeyDim / 16][4];
  for (int i = 0; i < kKeyDim / 16; ++i) {
    detail::load_matrices(
        q[i], q_tile + (warp * 16 + lane % 16) * Memory::kKeyStride + 16 * i + lane / 16 * 8);
  }

  const int g = lane / 4, t = lane % 4;
  float acc[kValueDim / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const float factor = args.softmax_scale * 1.4426950408889634F;  // powers of 2 are cheaper
  const int num_tiles = (num_keys + kPrefillKeys - 1) / kPrefillKeys;
  for (int step = 0; step < num_tiles; ++step) {
    const int key = step * kPrefillKeys;
    if (step + 1 < num_tiles) {
      copy_keys(key + kPrefillKeys, (step + 1) % 2);
      detail::wait_for_copies<1>();
    } else {
      detail::wait_for_copies<0>();
    }
    __syncthreads();
    const T* keys = stages + step % 2 * Memory::kStage;
    const T* values = keys + kPrefillKeys * Memory::kKeyStride;

    float scores[kPrefillKeys / 8][4] = {};
#pragma unroll
    for (int n = 0; n < kPrefillKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < kKeyDim / 16; ++i) {
        std::uint32_t k[4];
        detail::load_matrices(k, keys + (16 * n + lane / 16 * 8 + lane % 8) * Memory::kKeyStride +
                                     16 * i + lane / 8 % 2 * 8);
        detail::multiply(scores[2 * n], q[i], k[0], k[1], T{});
        detail::multiply(scores[2 * n + 1], q[i], k[2], k[3], T{});
      }
    }
    const int first_query = first + warp * 16 + g;
    if (key + kPrefillKeys > past + first + warp * 16 + 1 || key + kPrefillKeys > num_keys) {
#pragma unroll
      for (int n = 0; n < kPrefillKeys / 8; ++n) {
        for (int i = 0; i < 4; ++i) {
          const int at = key + 8 * n + 2 * t + i % 2;
          if (at > past + first_query + i / 2 * 8 || at >= num_keys) scores[n][i] = -INFINITY;
        }
      }
    }
    float most[2] = {largest[0], largest[1]};
    for (const auto& score : scores) {
      for (int i = 0; i < 4; ++i) most[i / 2] = fmaxf(most[i / 2], score[i]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffU, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffU, most[r], 2));
      const float keep = exp2f((largest[r] - most[r]) * factor);
      largest[r] = most[r];
      total[r] *= keep;
      for (auto& row : acc) {
        row[2 * r] *= keep;
        row[2 * r + 1] *= keep;
      }
    }
    for (auto& score : scores) {
      for (int i = 0; i < 4; ++i) {
        score[i] = exp2f((score[i] - most[i / 2]) * factor);
        total[i / 2] += score[i];
      }
    }
#pragma unroll
    for (int n = 0; n < kPrefillKeys / 16; ++n) {
      const std::uint32_t weights[4] = {
          detail::pack2<T>(scores[2 * n][0], scores[2 * n][1]),
          detail::pack2<T>(scores[2 * n][2], scores[2 * n][3]),
          detail::pack2<T>(scores[2 * n + 1][0], scores[2 * n + 1][1]),
          detail::pack2<T>(scores[2 * n + 1][2], scores[2 * n + 1][3])};
#pragma unroll
      for (int j = 0; j < kValueDim / 16; ++j) {
        std::uint32_t v[4];
        detail::load_matrices_transposed(
            v, values + (16 * n + lane % 16) * Memory::kValueStride + 16 * j + lane / 16 * 8);
        detail::multiply(acc[2 * j], weights, v[0], v[1], T{});
        detail::multiply(acc[2 * j + 1], weights, v[2], v[3], T{});
      }
    }
    __syncthreads();  // before the next copies overwrite this stage
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffU, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffU, total[r], 2);
    const int row = warp * 16 + g + 8 * r;
    if (row >= num_queries) continue;
    const bool valid = first + row < fresh, fits = past + first + row < args.capacity;
    for (int j = 0; j < kValueDim / 8; ++j) {
      for (int i = 0; i < 2; ++i) {
        const float value = !valid ? 0.0F : fits ? acc[j][2 * r + i] / total[r] : NAN;
        y[row * y_stride + 8 * j + 2 * t + i] = from_float<T>(value);
      }
    }
  }
}

}  // namespace tinylm::cuda
