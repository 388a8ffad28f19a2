// Attention in the latent space with int8 tiles: the cached latents are int8 as they lie, queries
// and weights go through as seven digits of fixed point (wide_linear.h), and every sum is exact.
// 16 heads at a time; ranks that fill whole tiles. Included by isa_kernels.cpp for AMX only.
#pragma once

#include "decode.inc.h"
#include "dot_amx.inc.h"
#include "wide.inc.h"

namespace tinylm::cpu {
namespace {

constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileInputs = 64;

typedef int32_t i32x8_a __attribute__((vector_size(32)));

/// Puts the seven digits at sums[d * stride] together, 16 columns.
TINYLM_INLINE void join_digits(const int32_t* sums, int64_t stride, f64x8* low, f64x8* high) {
  i64x8 a = {};
  i64x8 b = {};
  for (int d = kWideDigits - 1; d >= 0; --d) {
    a = (a << 7) + __builtin_convertvector(load<i32x8_a>(sums + d * stride), i64x8);
    b = (b << 7) + __builtin_convertvector(load<i32x8_a>(sums + d * stride + 8), i64x8);
  }
  *low = __builtin_convertvector(a, f64x8);
  *high = __builtin_convertvector(b, f64x8);
}

/// Scores of 16 tokens and 16 heads without the rotary part: [16, heads_pad].
TINYLM_INLINE void score_tile(const DecodeRun& p, int64_t first, int64_t head) {
  alignas(64) int32_t sums[kWideDigits * 256];
  const int64_t num_inputs = p.latent_rank / kTileInputs;
  const int8_t* a = p.latent + first * p.latent_rank;
  const int8_t* b = p.q_tiles + head / 16 * kWideDigits * num_inputs * kTileBytes;
  for (int64_t d = 0; d < kWideDigits; ++d) {
    _tile_zero(0);
    for (int64_t k = 0; k < num_inputs; ++k) {
      _tile_loadd(1, a + k * kTileInputs, p.latent_rank);
      _tile_loadd(2, b + (d * num_inputs + k) * kTileBytes, 64);
      _tile_dpbssd(0, 1, 2);
    }
    _tile_stored(0, sums + d * 256, 64);
  }
  const f64x8 unit_low = load<f64x8>(p.q_unit + head);
  const f64x8 unit_high = load<f64x8>(p.q_unit + head + 8);
  const int64_t left = p.num_tokens - first;
  for (int64_t t = 0; t < (left < kTileTokens ? left : kTileTokens); ++t) {
    f64x8 low, high;
    join_digits(sums + t * 16, 256, &low, &high);
    const f64x8 inverse = splat(1.0 / static_cast<double>(p.scale[first + t]));
    double* out = p.scores + (first + t) * p.heads_pad + head;
    store(out, low * unit_low * inverse);
    store(out + 8, high * unit_high * inverse);
  }
}

/// Adds the rotary part to the scores of 16 tokens.
TINYLM_INLINE void add_rope_scores(const DecodeRun& p, int64_t first, int64_t ld) {
  for (int64_t t = 0; t < kTileTokens; ++t) {
    const int64_t at = (first + t) * p.rope_dim;
    int64_t i = 0;
    if (first + t < p.num_tokens) {
      if (p.type == FloatType::kFloat) {
        for (; i + 8 <= p.rope_dim; i += 8) {
          store(p.wide + t * ld + i,
                widen(load<f32x8>(static_cast<const float*>(p.rope) + at + i)));
        }
      }
      for (; i < p.rope_dim; ++i) p.wide[t * ld + i] = load_float(p.rope, at + i, p.type);
    } else {
      for (; i < p.rope_dim; ++i) p.wide[t * ld + i] = 0.0;
    }
  }
  for (int64_t t = 0; t < kTileTokens; t += kAccumulatorRows) {
    for (int64_t h = 0; h < p.heads_pad; h += kAccumulatorWidth) {
      multiply_tile<true>(p.wide + t * ld, ld, p.q_rope + h, p.heads_pad, p.rope_dim,
                          p.scores + (first + t) * p.heads_pad + h, p.heads_pad);
    }
  }
}

/// Interleaves four tokens' latents byte by byte, 64 dimensions at a time. Row `quad` of tile
/// 4 * block + i then holds dimensions 64 * block + 16 * (n / 4) + 4 * i + n % 4, n = 0 .. 15.
TINYLM_INLINE void interleave(const DecodeRun& p, int64_t first, int64_t tiles_k, int8_t* out) {
  const __m512i zero = _mm512_setzero_si512();
  const int64_t tile_k = first / kTileInputs;
  const int64_t quad = first % kTileInputs / 4;
  for (int64_t block = 0; block < p.latent_rank / 64; ++block) {
    __m512i row[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int8_t* at = p.latent + (first + i) * p.latent_rank + 64 * block;
      row[i] = first + i < p.num_tokens ? _mm512_loadu_si512(at) : zero;
    }
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]);
    const __m512i b = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]);
    const __m512i d = _mm512_unpackhi_epi8(row[2], row[3]);
    const __m512i four[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c),
                             _mm512_unpacklo_epi16(b, d), _mm512_unpackhi_epi16(b, d)};
    for (int64_t i = 0; i < 4; ++i) {
      int8_t* tile = out + ((4 * block + i) * tiles_k + tile_k) * kTileBytes;
      _mm512_store_si512(tile + 64 * quad, four[i]);
    }
  }
}

/// Weighted sums of the latents for 16 heads.
TINYLM_INLINE void sum_latents(const DecodeRun& p, int64_t head, int64_t tiles_k,
                               const int8_t* latents, int8_t* digits) {
  alignas(64) int32_t sums[kWideDigits * 256];
  double weights[kDecodeRun];
  double unit[16];
  for (int64_t h = 0; h < 16; ++h) {
    for (int64_t t = 0; t < p.num_tokens; ++t) weights[t] = p.scores[t * p.heads_pad + head + h];
    // The largest weight of this run sets the fixed point, 2**47 steps to its power of two.
    const double largest = largest_magnitude(weights, p.num_tokens);
    int exponent = 0;
    if (largest > 0.0 && largest < 1e300) frexp(largest, &exponent);
    unit[h] = ldexp(1.0, exponent - 47);
    int32_t unused[kWideDigits];
    for (int64_t k = 0; k < tiles_k; ++k) {
      const int64_t left = p.num_tokens - k * kTileInputs;
      int8_t* row = digits + k * kTileBytes + h * 64;
      if (left < kTileInputs) {
        for (int64_t d = 0; d < kWideDigits; ++d) memset(row + d * tiles_k * kTileBytes, 0, 64);
      }
      to_digits(weights + k * kTileInputs, left < kTileInputs ? left : kTileInputs,
                ldexp(1.0, 47 - exponent), row, tiles_k * kTileBytes, unused);
    }
  }
  const int64_t ld = p.latent_rank;
  for (int64_t tile = 0; tile < p.latent_rank / 16; ++tile) {
    for (int64_t d = 0; d < kWideDigits; ++d) {
      _tile_zero(0);
      for (int64_t k = 0; k < tiles_k; ++k) {
        _tile_loadd(1, digits + (d * tiles_k + k) * kTileBytes, 64);
        _tile_loadd(2, latents + (tile * tiles_k + k) * kTileBytes, 64);
        _tile_dpbssd(0, 1, 2);
      }
      _tile_stored(0, sums + d * 256, 64);
    }
    for (int64_t h = 0; h < 16; ++h) {
      f64x8 half[2];
      join_digits(sums + h * 16, 256, &half[0], &half[1]);
      double* out = p.y + (head + h) * ld + tile / 4 * 64 + tile % 4 * 4;
      for (int64_t n = 0; n < 16; n += 4) {
        const f64x8 v = half[n / 8] * unit[h];
        for (int64_t j = 0; j < 4; ++j) out[4 * n + j] = v[n % 8 + j];
      }
    }
  }
}

void decode(const DecodeRun& p) {
  if (p.q_tiles == nullptr) return decode_f64(p);
  const int64_t ld = (p.rope_dim + 15) / 16 * 16;
  const int64_t tiles_k = (p.num_tokens + kTileInputs - 1) / kTileInputs;
  const Tiles tiles;
  for (int64_t first = 0; first < p.num_tokens; first += kTileTokens) {
    for (int64_t head = 0; head < p.heads_pad; head += 16) score_tile(p, first, head);
    add_rope_scores(p, first, ld);
  }
  soften_heads(p);
  int8_t* latents = p.bytes;
  int8_t* digits = latents + p.latent_rank * tiles_k * kTileInputs;
  for (int64_t first = 0; first < tiles_k * kTileInputs; first += 4) {
    interleave(p, first, tiles_k, latents);
  }
  for (int64_t head = 0; head < p.heads_pad; head += 16) {
    sum_latents(p, head, tiles_k, latents, digits);
  }
}

bool decode_takes_tiles(int64_t latent_rank) { return latent_rank % kTileInputs == 0; }

}  // namespace
}  // namespace tinylm::cpu
