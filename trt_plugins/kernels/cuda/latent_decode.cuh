// Attention in the latent space: each thread block takes one query token with all its heads, or a
// group of them, over one chunk of the cache; another kernel combines the chunks in order and
// applies W_uv. Online softmax over tiles of the chunk (Milakov and Gimelshein, 1805.02867).
#pragma once

#include "latent_append.cuh"

namespace tinylm::cuda {

inline constexpr int kDecodeThreads = 256;
inline constexpr int kDecodeTokens = 64;  // of one tile
inline constexpr int kDecodeHeads = 16;   // of one thread block
inline constexpr int kWeightStride = 20;  // of a token's weights, padded against bank conflicts

/// Sizes of the parts that latent_attend() leaves for latent_combine().
struct ChunkLayout {
  int chunk_tokens;  // a multiple of kDecodeTokens
  int num_chunks;
};

/// Shared memory of latent_attend(), in elements and bytes.
template <typename W>
struct DecodeMemory {
  int rank, rope_dim;
  // Rows of the latents are padded by a word against bank conflicts.
  __host__ __device__ int latent_stride() const { return rank + 4; }
  __host__ __device__ int query_stride() const { return rank + rope_dim + 4; }
  __host__ __device__ int rope_stride() const { return rope_dim + 1; }  // 64 rows: aligned
  __host__ __device__ std::int64_t bytes() const {
    const std::int64_t wide = kDecodeHeads * query_stride() + kDecodeTokens * rope_stride() +
                              kDecodeTokens * kWeightStride + kDecodeTokens + 3 * kDecodeHeads;
    return wide * static_cast<std::int64_t>(sizeof(W)) + kDecodeTokens * latent_stride();
  }
};

/// Loads four values; p is aligned to 16 bytes.
template <typename W>
__device__ inline void load_wide(const W* p, W (&out)[4]) {
  constexpr int kPieces = 4 * sizeof(W) / 16;
  uint4 raw[kPieces];
  for (int i = 0; i < kPieces; ++i) raw[i] = reinterpret_cast<const uint4*>(p)[i];
  memcpy(out, raw, sizeof(raw));
}

/// Four int8 values as W, from the bits of 2^23 or 2^52 plus the value, as code_value() does.
__device__ inline void widen(std::uint32_t word, float (&out)[4]) {
  word ^= 0x80808080U;
  for (int j = 0; j < 4; ++j) {
    out[j] = __uint_as_float(__byte_perm(word, 0x4b000000U, 0x7540 | j)) - 8388736.0F;
  }
}
__device__ inline void widen(std::uint32_t word, double (&out)[4]) {
  word ^= 0x80808080U;
  for (int j = 0; j < 4; ++j) {
    out[j] = __hiloint2double(0x43300000, static_cast<int>(__byte_perm(word, 0, 0x4440 | j))) -
             4503599627370624.0;
  }
}

__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float exponential(float x) { return expf(x); }

/// The larger one, or not-a-number if one of them is that, as in PyTorch.
template <typename W>
__device__ inline W larger(W a, W b) {
  return a > b || a != a ? a : b;
}

/// Grid: tokens x chunks x groups of heads. kPasses: R / 256, rounded up.
/// @param query wide [tokens, H, R + P] of latent_absorb().
/// @param sums wide [tokens, chunks, H, R]: weighted latents.
/// @param stats wide [tokens, chunks, H, 2]: largest score and sum of weights.
template <int kPasses, typename T>
__global__ void __launch_bounds__(kDecodeThreads)
    latent_attend(LatentArgs<T> args, std::int64_t first_token, ChunkLayout layout,
                  const wide_t<T>* query, wide_t<T>* sums, wide_t<T>* stats) {
  using W = wide_t<T>;
  const std::int64_t token = first_token + blockIdx.x;
  const NewToken t = new_token(args, token);
  const int chunk = blockIdx.y, first_head = blockIdx.z * kDecodeHeads;
  const int begin = chunk * layout.chunk_tokens;
  const int visible = min(min(t.position + 1, args.capacity), begin + layout.chunk_tokens);
  if (!t.valid || begin >= visible) return;
  const int num_heads = min(kDecodeHeads, args.num_heads - first_head);
  const int rank = args.rank, rope_dim = args.rope_dim;
  const DecodeMemory<W> sizes{rank, rope_dim};

  extern __shared__ __align__(16) unsigned char memory[];
  W* q = reinterpret_cast<W*>(memory);                                 // [heads][R + P]
  W* rope = q + kDecodeHeads * sizes.query_stride();                   // [tokens][P]
  W* weights = rope + kDecodeTokens * sizes.rope_stride();             // [tokens][heads]
  W* inverse = weights + kDecodeTokens * kWeightStride;                // [tokens] 1 / s
  W* largest = inverse + kDecodeTokens;                                // [heads]
  W* total = largest + kDecodeHeads;                                   // [heads]
  W* keep = total + kDecodeHeads;                                      // [heads]
  auto* latent = reinterpret_cast<std::int8_t*>(keep + kDecodeHeads);  // [tokens][R]

  const int width = rank + rope_dim;
  for (int i = threadIdx.x; i < kDecodeHeads * width; i += kDecodeThreads) {
    const int h = i / width, j = i % width;
    const std::int64_t at =
        (static_cast<std::int64_t>(blockIdx.x) * args.num_heads + first_head + h) * width + j;
    q[h * sizes.query_stride() + j] = h < num_heads ? query[at] : static_cast<W>(0);
  }
  if (threadIdx.x < kDecodeHeads) {
    largest[threadIdx.x] = -INFINITY;
    total[threadIdx.x] = 0;
  }
  // Each thread sums four latent dimensions of some heads.
  constexpr int kHeadsAtOnce = 4;
  const int quads = rank / 4;
  const int num_items = quads * (kDecodeHeads / kHeadsAtOnce);
  W acc[kPasses][kHeadsAtOnce][4] = {};

  const std::int64_t first_slot = static_cast<std::int64_t>(t.b) * args.capacity;
  for (int tile = begin; tile < visible; tile += kDecodeTokens) {
    const int count = min(kDecodeTokens, visible - tile);
    __syncthreads();  // the tile before has been used
    for (int i = threadIdx.x; i < kDecodeTokens * quads; i += kDecodeThreads) {
      const int row = i / quads, quad = i % quads;
      std::uint32_t word = 0;
      if (row < count) {
        word = *reinterpret_cast<const std::uint32_t*>(args.latent +
                                                       (first_slot + tile + row) * rank + 4 * quad);
      }
      *reinterpret_cast<std::uint32_t*>(latent + row * sizes.latent_stride() + 4 * quad) = word;
    }
    for (int i = threadIdx.x; i < kDecodeTokens * rope_dim; i += kDecodeThreads) {
      const int row = i / rope_dim, j = i % rope_dim;
      const std::int64_t at = (first_slot + tile + row) * rope_dim + j;
      rope[row * sizes.rope_stride() + j] =
          row < count ? static_cast<W>(to_float(args.rope[at])) : static_cast<W>(0);
    }
    if (threadIdx.x < kDecodeTokens) {
      const int row = threadIdx.x;
      inverse[row] = row < count ? 1 / static_cast<W>(args.scale[first_slot + tile + row]) : 0;
    }
    __syncthreads();

    // Scores of two heads and two tokens a thread.
    {
      const int h = threadIdx.x / 32 * 2, row = threadIdx.x % 32;
      W score[2][2] = {}, score_rope[2][2] = {};
      for (int quad = 0; quad < quads; ++quad) {
        for (int u = 0; u < 2; ++u) {
          W c[4];
          widen(*reinterpret_cast<const std::uint32_t*>(
                    latent + (row + 32 * u) * sizes.latent_stride() + 4 * quad),
                c);
          for (int v = 0; v < 2; ++v) {
            W qv[4];
            load_wide(q + (h + v) * sizes.query_stride() + 4 * quad, qv);
            for (int j = 0; j < 4; ++j) score[v][u] += qv[j] * c[j];
          }
        }
      }
      for (int j = 0; j < rope_dim; ++j) {
        for (int u = 0; u < 2; ++u) {
          const W key = rope[(row + 32 * u) * sizes.rope_stride() + j];
          for (int v = 0; v < 2; ++v) {
            score_rope[v][u] += q[(h + v) * sizes.query_stride() + rank + j] * key;
          }
        }
      }
      // The warp has all scores of its two heads.
      for (int v = 0; v < 2; ++v) {
        for (int u = 0; u < 2; ++u) {
          const W value = (score[v][u] * inverse[row + 32 * u] + score_rope[v][u]) *
                          static_cast<W>(args.softmax_scale);
          score[v][u] = row + 32 * u < count ? value : static_cast<W>(-INFINITY);
        }
        const W before = largest[h + v];
        W most = larger(larger(score[v][0], score[v][1]), before);
        for (int offset = 16; offset > 0; offset /= 2) {
          most = larger(most, __shfl_xor_sync(0xffffffffU, most, offset));
        }
        W sum = 0;
        for (int u = 0; u < 2; ++u) {
          const W weight = exponential(score[v][u] - most);
          sum += weight;
          weights[(row + 32 * u) * kWeightStride + h + v] = weight * inverse[row + 32 * u];
        }
        for (int offset = 16; offset > 0; offset /= 2) {
          sum += __shfl_xor_sync(0xffffffffU, sum, offset);
        }
        __syncwarp();  // every lane has read the largest score so far
        if (row == 0) {
          keep[h + v] = exponential(before - most);
          total[h + v] = total[h + v] * keep[h + v] + sum;
          largest[h + v] = most;
        }
      }
    }
    __syncthreads();

#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int item = pass * kDecodeThreads + threadIdx.x;
      if (item >= num_items) break;
      const int quad = item % quads, h = item / quads * kHeadsAtOnce;
      for (int v = 0; v < kHeadsAtOnce; ++v) {
        for (W& value : acc[pass][v]) value *= keep[h + v];
      }
      for (int row = 0; row < count; ++row) {
        W latents[4];
        widen(*reinterpret_cast<const std::uint32_t*>(latent + row * sizes.latent_stride() +
                                                      4 * quad),
              latents);
        W weight[kHeadsAtOnce];
        load_wide(weights + row * kWeightStride + h, weight);
        for (int v = 0; v < kHeadsAtOnce; ++v) {
          for (int j = 0; j < 4; ++j) acc[pass][v][j] += weight[v] * latents[j];
        }
      }
    }
  }

  const std::int64_t part = static_cast<std::int64_t>(blockIdx.x) * layout.num_chunks + chunk;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int item = pass * kDecodeThreads + threadIdx.x;
    if (item >= num_items) break;
    const int quad = item % quads, h = item / quads * kHeadsAtOnce;
    for (int v = 0; v < kHeadsAtOnce && h + v < num_heads; ++v) {
      W* to = sums + (part * args.num_heads + first_head + h + v) * rank + 4 * quad;
      for (int j = 0; j < 4; ++j) to[j] = acc[pass][v][j];
    }
  }
  __syncthreads();
  if (threadIdx.x < num_heads) {
    W* to = stats + (part * args.num_heads + first_head + threadIdx.x) * 2;
    to[0] = largest[threadIdx.x];
    to[1] = total[threadIdx.x];
  }
}

/// Combines the chunks of one token and head and up-projects: y = W_uv . sum. Grid: tokens x heads.
/// Shared memory: wide [R + chunks].
template <typename T>
__global__ void __launch_bounds__(kDecodeThreads)
    latent_combine(LatentArgs<T> args, std::int64_t first_token, ChunkLayout layout,
                   const wide_t<T>* sums, const wide_t<T>* stats) {
  using W = wide_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  W* combined = reinterpret_cast<W*>(memory);
  const std::int64_t token = first_token + blockIdx.x;
  const NewToken t = new_token(args, token);
  const int head = blockIdx.y;
  T* y = args.y + (token * args.num_heads + head) * args.value_dim;
  if (!t.valid || !t.fits) {
    const float fill = t.valid ? NAN : 0.0F;  // a token that the cache could not take
    for (int j = threadIdx.x; j < args.value_dim; j += kDecodeThreads) y[j] = from_float<T>(fill);
    return;
  }
  const int used = (t.position + layout.chunk_tokens) / layout.chunk_tokens;
  const auto at = [&](int chunk) {
    return (static_cast<std::int64_t>(blockIdx.x) * layout.num_chunks + chunk) * args.num_heads +
           head;
  };
  W* factors = combined + args.rank;  // [chunks]
  // Each warp finds the largest score and the sum of weights for itself.
  const int lane = threadIdx.x % 32;
  W largest = -INFINITY, total = 0;
  for (int c = lane; c < used; c += 32) largest = larger(stats[2 * at(c)], largest);
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = larger(largest, __shfl_xor_sync(0xffffffffU, largest, offset));
  }
  for (int c = lane; c < used; c += 32) {
    const W factor = exponential(stats[2 * at(c)] - largest);
    total += stats[2 * at(c) + 1] * factor;
    if (threadIdx.x < 32) factors[c] = factor;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(0xffffffffU, total, offset);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < args.rank; r += kDecodeThreads) {
    W sum = 0;
#pragma unroll 8
    for (int c = 0; c < used; ++c) sum += sums[at(c) * args.rank + r] * factors[c];
    combined[r] = sum / total;
  }
  __syncthreads();
  // A warp takes 16 rows of W_uv: its lanes hold two of them and eight of each 32 columns.
  const int first_row = head * (args.nope_dim + args.value_dim) + args.nope_dim;
  const int g = lane / 4, quad = lane % 4;
  const int last_block = (first_row + args.value_dim - 1) / 16;
  for (int block = first_row / 16 + threadIdx.x / 32; block <= last_block;
       block += kDecodeThreads / 32) {
    W totals[2] = {};
#pragma unroll 4
    for (int word = 0; 32 * word < args.rank; ++word) {
      const std::uint32_t codes = weight_word(args.kv_b, block, word, args.kv_b_blocks(), lane);
      for (int half_word = 0; half_word < 2; ++half_word) {
        const int r = 32 * word + 16 * half_word + 4 * quad;
        if (r >= args.rank) continue;
        W values[4];
        load_wide(combined + r, values);
        for (int u = 0; u < 2; ++u) {
          for (int j = 0; j < 4; ++j) {
            totals[u] += values[j] * code_value<W>(codes, u + 2 * half_word, j);
          }
        }
      }
    }
    for (int u = 0; u < 2; ++u) {
      totals[u] += __shfl_xor_sync(0xffffffffU, totals[u], 1);
      totals[u] += __shfl_xor_sync(0xffffffffU, totals[u], 2);
      const int j = 16 * block + g + 8 * u - first_row;
      if (quad == 0 && j >= 0 && j < args.value_dim) {
        y[j] = from_wide<T>(
            static_cast<double>(totals[u] * static_cast<W>(args.kv_b_scale[first_row + j])));
      }
    }
  }
}

}  // namespace tinylm::cuda
