// New tokens into the cache, and queries into the latent space.
#pragma once

#include "async_copy.cuh"
#include "fragments.cuh"
#include "latent_attention.h"
#include "quantize_row.cuh"

namespace tinylm::cuda {

inline constexpr int kAppendThreads = 256;

/// Rotary frequencies, float32 as in tinylm/latent_attention.py.
struct Frequencies {
  float values[kMaxRopeDim / 2];
};

/// What the kernels of one layer share; T is the tensors' type.
template <typename T>
struct LatentArgs {
  int num_heads, nope_dim, rope_dim, value_dim, rank;
  float eps, softmax_scale;
  Frequencies frequencies;
  int length, capacity;
  const T* qkv;  // [B, S, width]
  int width;
  const float* norm_weight;
  const std::uint8_t* kv_b;
  const float* kv_b_scale;
  const std::int32_t* past_lens;
  const std::int32_t* seq_lens;
  std::int8_t* latent;
  float* scale;
  T* rope;
  T* y;

  __device__ int qk_dim() const { return nope_dim + rope_dim; }
  __device__ int kv_b_blocks() const { return num_blocks(rank); }
};

/// One new token: batch row, index among the new ones, position in the sequence.
struct NewToken {
  int b, i, position;
  bool valid;  // not padding
  bool fits;   // into the cache
};

template <typename T>
__device__ inline NewToken new_token(const LatentArgs<T>& args, std::int64_t token) {
  NewToken t{};
  const bool small = token <= 0x7fffffff;  // division of 64 bits is slow
  t.b = small ? static_cast<int>(token) / args.length : static_cast<int>(token / args.length);
  t.i = static_cast<int>(token - static_cast<std::int64_t>(t.b) * args.length);
  t.position = args.past_lens[t.b] + t.i;
  t.valid = t.i < args.seq_lens[t.b];
  t.fits = t.position >= 0 && t.position < args.capacity;
  return t;
}

/// Cosine and sine of pair i at a position: a float32 angle, float64 functions, float32 results.
__device__ inline void rotary(const Frequencies& frequencies, int position, int i, float& cosine,
                              float& sine) {
  const double angle = static_cast<double>(static_cast<float>(position) * frequencies.values[i]);
  double s, c;
  sincos(angle, &s, &c);
  cosine = static_cast<float>(c);
  sine = static_cast<float>(s);
}

/// Rotates pair i of x [P] and rounds to T.
template <typename T>
__device__ inline void rotate_pair(const T* x, T* y, int half, int i, float cosine, float sine) {
  const double first = to_float(x[i]), second = to_float(x[i + half]);
  // Products of float32 are exact in float64, so a fused multiply-add changes nothing.
  y[i] = from_wide<T>(first * cosine - second * sine);
  y[i + half] = from_wide<T>(second * cosine + first * sine);
}

/// Cosine and sine of pair i of a new token, and that pair of its key, rotated, into the cache.
/// @param angles float2 [B * S, P / 2] to fill, or nullptr.
template <typename T>
__device__ inline void append_pair(const LatentArgs<T>& args, std::int64_t token, const NewToken& t,
                                   int i, float2* angles) {
  const int half = args.rope_dim / 2;
  float cosine, sine;
  rotary(args.frequencies, t.position, i, cosine, sine);
  if (angles != nullptr) angles[token * half + i] = make_float2(cosine, sine);
  if (!t.valid || !t.fits) return;
  const T* kv = args.qkv + token * args.width + args.num_heads * args.qk_dim();
  const std::int64_t slot = static_cast<std::int64_t>(t.b) * args.capacity + t.position;
  rotate_pair(kv + args.rank, args.rope + slot * args.rope_dim, half, i, cosine, sine);
}

/// Norms, quantises and stores the latent of one new token, by a thread block of kThreads or by a
/// warp.
/// @param row Shared memory, float [R].
template <int kThreads, typename T>
__device__ inline void append_latent(const LatentArgs<T>& args, std::int64_t token,
                                     const NewToken& t, float* row) {
  if (!t.valid || !t.fits) return;
  const T* kv = args.qkv + token * args.width + args.num_heads * args.qk_dim();
  const std::int64_t slot = static_cast<std::int64_t>(t.b) * args.capacity + t.position;
  const RowSource<T> source{kv, args.norm_weight, args.eps, args.rank, false};
  const RowScale scale = quantize_row<kThreads, Activation::kInt8>(
      source, row, args.rank, [&](int, int column, std::uint32_t word) {
        *reinterpret_cast<std::uint32_t*>(args.latent + slot * args.rank + column) = word;
      });
  if (threadIdx.x % kThreads == 0) args.scale[slot] = scale.s;
}

/// Appends num_tokens new tokens: a warp quantises one, and a thread block's threads share the
/// angles of its tokens. Shared memory: float [warps][R].
template <typename T>
__global__ void __launch_bounds__(kAppendThreads)
    latent_append(const __grid_constant__ LatentArgs<T> args, std::int64_t num_tokens,
                  float2* angles) {
  extern __shared__ __align__(16) float row_memory[];
  constexpr int kWarps = kAppendThreads / 32;
  launch_next_kernel();
  wait_for_previous_kernel();
  const int warp = threadIdx.x / 32, half = args.rope_dim / 2;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kWarps;
  if (first + warp < num_tokens && threadIdx.x % 32 * 64 < args.rank + args.rope_dim) {
    detail::prefetch(args.qkv + (first + warp) * args.width + args.num_heads * args.qk_dim() +
                     threadIdx.x % 32 * 64);
  }
  for (int i = threadIdx.x; i < kWarps * half; i += kAppendThreads) {
    const std::int64_t token = first + i / half;
    if (token >= num_tokens) break;
    append_pair(args, token, new_token(args, token), i % half, angles);
  }
  if (first + warp >= num_tokens) return;
  append_latent<32>(args, first + warp, new_token(args, first + warp),
                    row_memory + warp * args.rank);
}

/// Appends new tokens and takes their queries into the latent space: W_uk^T q_nope, then the
/// rotated part as it is. Grid: tokens x (heads + 1); the last one appends.
/// Shared memory: the larger of float [R] and wide [nope] with T [P].
/// @param out wide [tokens, H, R + P].
template <typename T>
__global__ void __launch_bounds__(kAppendThreads)
    latent_absorb(LatentArgs<T> args, std::int64_t first_token, wide_t<T>* out) {
  using W = wide_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  const std::int64_t token = first_token + blockIdx.x;
  const NewToken t = new_token(args, token);
  const int head = blockIdx.y;
  if (head == args.num_heads) {
    for (int i = threadIdx.x; i < args.rope_dim / 2; i += kAppendThreads) {
      append_pair(args, token, t, i, nullptr);
    }
    append_latent<kAppendThreads>(args, token, t, reinterpret_cast<float*>(memory));
    return;
  }
  if (!t.valid) return;
  const int row_width = args.rank + args.rope_dim;
  const T* q = args.qkv + token * args.width + head * args.qk_dim();
  W* row = out + (static_cast<std::int64_t>(blockIdx.x) * args.num_heads + head) * row_width;
  const int first_row = head * (args.nope_dim + args.value_dim);
  W* scaled = reinterpret_cast<W*>(memory);  // [nope]
  for (int d = threadIdx.x; d < args.nope_dim; d += kAppendThreads) {
    scaled[d] = static_cast<W>(to_float(q[d])) * static_cast<W>(args.kv_b_scale[first_row + d]);
  }
  const int half = args.rope_dim / 2;
  T* rotated = reinterpret_cast<T*>(scaled + args.nope_dim);  // [P]
  for (int i = threadIdx.x; i < half; i += kAppendThreads) {
    float cosine, sine;
    rotary(args.frequencies, t.position, i, cosine, sine);
    rotate_pair(q + args.nope_dim, rotated, half, i, cosine, sine);
  }
  __syncthreads();
  // A warp takes 32 columns: its lanes hold two rows and eight columns of each 16 rows.
  const int lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  const int first_block = first_row / 16, last_block = (first_row + args.nope_dim - 1) / 16;
  for (int word = threadIdx.x / 32; 32 * word < args.rank; word += kAppendThreads / 32) {
    W sums[2][4] = {};
#pragma unroll 2
    for (int block = first_block; block <= last_block; ++block) {
      const std::uint32_t codes = weight_word(args.kv_b, block, word, args.kv_b_blocks(), lane);
      for (int u = 0; u < 2; ++u) {
        const int d = 16 * block + g + 8 * u - first_row;
        const W factor = d >= 0 && d < args.nope_dim ? scaled[d] : static_cast<W>(0);
        for (int half_word = 0; half_word < 2; ++half_word) {
          for (int j = 0; j < 4; ++j) {
            sums[half_word][j] += factor * code_value<W>(codes, u + 2 * half_word, j);
          }
        }
      }
    }
    for (auto& half_word : sums) {
      for (W& sum : half_word) {
        for (int offset = 4; offset < 32; offset *= 2) {
          sum += __shfl_xor_sync(0xffffffffU, sum, offset);
        }
      }
    }
    for (int half_word = 0; half_word < 2; ++half_word) {
      const int r = 32 * word + 16 * half_word + 4 * quad + g;
      if (g < 4 && r < args.rank) {
        W sum = sums[half_word][0];
        for (int j = 1; j < 4; ++j) sum = g == j ? sums[half_word][j] : sum;
        row[r] = sum;
      }
    }
  }
  for (int i = threadIdx.x; i < args.rope_dim; i += kAppendThreads) {
    row[args.rank + i] = static_cast<W>(to_float(rotated[i]));
  }
}

}  // namespace tinylm::cuda
