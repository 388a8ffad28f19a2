// Attention in the latent space with int8 tiles: the cached latents are int8 as they lie, queries
// and weights go through as seven digits of fixed point (wide_linear.h), and every sum is exact.
// 16 heads at a time; ranks that fill whole tiles. Included by isa_kernels.cpp for AMX only.
#pragma once

#include "decode.inc.h"
#include "dot_amx.inc.h"
#include "wide_vbmi.inc.h"

namespace tinylm::cpu {
namespace {

constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileInputs = 64;

/// Puts the seven digits at sums[d * stride] together, 16 columns. Two digits fit into int32 for
/// up to 2**11 products a sum; the rest is float64.
TINYLM_INLINE void join_digits(const int32_t* sums, int64_t stride, f64x8* low, f64x8* high) {
  const __m512d base = _mm512_set1_pd(16384.0);  // 128**2
  __m512i digit = _mm512_load_si512(sums + 6 * stride);
  __m512d a = _mm512_cvtepi32_pd(_mm512_castsi512_si256(digit));
  __m512d b = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(digit, 1));
  for (int d = 4; d >= 0; d -= 2) {
    digit = _mm512_add_epi32(_mm512_load_si512(sums + d * stride),
                             _mm512_slli_epi32(_mm512_load_si512(sums + (d + 1) * stride), 7));
    a = _mm512_fmadd_pd(a, base, _mm512_cvtepi32_pd(_mm512_castsi512_si256(digit)));
    b = _mm512_fmadd_pd(b, base, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(digit, 1)));
  }
  *low = (f64x8)a;
  *high = (f64x8)b;
}

/// Seven sums of products, one a digit, in tiles of 16 x 16: four digits at a time, because a tile
/// takes three times as long to come out of the multiplier as to go in.
/// @param left(d, k) and right(d, k) load tiles 4 and 5 and say nothing.
template <typename Left, typename Right>
TINYLM_INLINE void multiply_digits(int64_t depth, const Left& left, const Right& right,
                                   int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; ++k) {
    left(0, k);
    right(0, k);
    _tile_dpbssd(0, 4, 5);
    left(1, k);
    right(1, k);
    _tile_dpbssd(1, 4, 5);
    left(2, k);
    right(2, k);
    _tile_dpbssd(2, 4, 5);
    left(3, k);
    right(3, k);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (int64_t k = 0; k < depth; ++k) {
    left(4, k);
    right(4, k);
    _tile_dpbssd(0, 4, 5);
    left(5, k);
    right(5, k);
    _tile_dpbssd(1, 4, 5);
    left(6, k);
    right(6, k);
    _tile_dpbssd(2, 4, 5);
  }
  _tile_stored(0, sums + 1024, 64);
  _tile_stored(1, sums + 1280, 64);
  _tile_stored(2, sums + 1536, 64);
}

/// Scores of 16 tokens and 16 heads without the rotary part: [16, heads_pad].
TINYLM_INLINE void score_tile(const DecodeRun& p, const double* inverses, int64_t first,
                              int64_t head) {
  alignas(64) int32_t sums[kWideDigits * 256];
  const int64_t depth = p.latent_rank / kTileInputs;
  const int8_t* tokens = p.latent + first * p.latent_rank;
  const int8_t* query = p.q_tiles + head * kWideDigits * p.latent_rank;
  multiply_digits(
      depth,
      [&](int64_t d, int64_t k) {
        if (d % 4 == 0) _tile_loadd(4, tokens + k * kTileInputs, p.latent_rank);
      },
      [&](int64_t d, int64_t k) { _tile_loadd(5, query + (d * depth + k) * kTileBytes, 64); },
      sums);
  const f64x8 unit_low = load<f64x8>(p.q_unit + head);
  const f64x8 unit_high = load<f64x8>(p.q_unit + head + 8);
  const int64_t left = p.num_tokens - first;
  for (int64_t t = 0; t < (left < kTileTokens ? left : kTileTokens); ++t) {
    f64x8 low, high;
    join_digits(sums + t * 16, 256, &low, &high);
    const f64x8 inverse = splat(inverses[first + t]);
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
TINYLM_INLINE void interleave(const DecodeRun& p, int64_t first, int8_t* out) {
  const __m512i zero = _mm512_setzero_si512();
  out += first / kTileInputs * p.latent_rank * kTileInputs;
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
      _mm512_store_si512(out + (4 * block + i) * kTileBytes + 64 * quad, four[i]);
    }
  }
}

/// Transposes 8 x 8 numbers.
TINYLM_INLINE void transpose(f64x8* v) {
  __m512d a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm512_unpacklo_pd((__m512d)v[i], (__m512d)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_pd((__m512d)v[i], (__m512d)v[i + 1]);
  }
  for (int half = 0; half < 8; half += 4) {
    for (int odd = 0; odd < 2; ++odd) {
      b[half + odd] = _mm512_shuffle_f64x2(a[half + odd], a[half + 2 + odd], 0x88);
      b[half + 2 + odd] = _mm512_shuffle_f64x2(a[half + odd], a[half + 2 + odd], 0xDD);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = (f64x8)_mm512_shuffle_f64x2(b[i], b[i + 4], 0x88);
    v[i + 4] = (f64x8)_mm512_shuffle_f64x2(b[i], b[i + 4], 0xDD);
  }
}

/// Softens the scores of eight heads: weights over the multiplier, by head and token, zeros up to
/// a multiple of 64 tokens; and the largest of each head.
TINYLM_INLINE void soften_eight(const DecodeRun& p, const double* inverses, int64_t head,
                                int64_t num_padded, double* weights, double* largest) {
  f64x8 top = splat(kNoScore);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    top = max(load<f64x8>(p.scores + t * p.heads_pad + head), top);
  }
  f64x8 total = {};
  f64x8 largest_weight = {};
  for (int64_t t = 0; t < num_padded; t += 8) {
    f64x8 v[8] = {};
    for (int64_t i = 0; i < 8; ++i) {
      if (t + i >= p.num_tokens) break;
      const f64x8 weight = exp(load<f64x8>(p.scores + (t + i) * p.heads_pad + head) - top);
      total += weight;
      v[i] = weight * inverses[t + i];
      largest_weight = max(v[i], largest_weight);
    }
    transpose(v);
    for (int64_t i = 0; i < 8; ++i) store(weights + i * kDecodeRun + t, v[i]);
  }
  store(p.largest + head, top);
  store(p.total + head, total);
  store(largest, largest_weight);
}

/// Weighted sums of the latents for 16 heads.
TINYLM_INLINE void sum_latents(const DecodeRun& p, const double* inverses, int64_t head,
                               int64_t tiles_k, const int8_t* latents, int8_t* digits) {
  alignas(64) int32_t sums[kWideDigits * 256];
  double weights[8 * kDecodeRun];
  double unit[16];
  for (int64_t h = 0; h < 16; ++h) {
    if (h % 8 == 0) soften_eight(p, inverses, head + h, tiles_k * kTileInputs, weights, unit + h);
    int exponent = 0;
    if (unit[h] < 1e300) frexp(unit[h], &exponent);  // else nothing here is a number
    exponent = exponent > -900 ? exponent : -900;
    const double steps = ldexp(1.0, 47 - exponent);
    unit[h] = ldexp(1.0, exponent - 47);
    for (int64_t k = 0; k < tiles_k; ++k) {
      to_digits_64(weights + h % 8 * kDecodeRun + k * kTileInputs, steps,
                   digits + k * kTileBytes + h * 64, tiles_k * kTileBytes);
    }
  }
  const int64_t ld = p.latent_rank;
  for (int64_t tile = 0; tile < p.latent_rank / 16; ++tile) {
    multiply_digits(
        tiles_k,
        [&](int64_t d, int64_t k) { _tile_loadd(4, digits + (d * tiles_k + k) * kTileBytes, 64); },
        [&](int64_t d, int64_t k) {
          if (d % 4 == 0) {
            _tile_loadd(5, latents + k * ld * kTileInputs + tile * kTileBytes, 64);
          }
        },
        sums);
    for (int64_t h = 0; h < 16; ++h) {
      f64x8 half[2];
      join_digits(sums + h * 16, 256, &half[0], &half[1]);
      double* out = p.y + (head + h) * ld + tile / 4 * 64 + tile % 4 * 4;
      for (int64_t i = 0; i < 2; ++i) {
        const __m512d v = (__m512d)(half[i] * unit[h]);
        _mm256_storeu_pd(out + 32 * i, _mm512_castpd512_pd256(v));
        _mm256_storeu_pd(out + 32 * i + 16, _mm512_extractf64x4_pd(v, 1));
      }
    }
  }
}

void decode(const DecodeRun& p) {
  if (p.q_tiles == nullptr) return decode_f64(p);
  const int64_t ld = (p.rope_dim + 15) / 16 * 16;
  const int64_t tiles_k = (p.num_tokens + kTileInputs - 1) / kTileInputs;
  const Tiles tiles;
  double inverses[kDecodeRun];
  for (int64_t t = 0; t < p.num_tokens; ++t) inverses[t] = 1.0 / static_cast<double>(p.scale[t]);
  for (int64_t first = 0; first < p.num_tokens; first += kTileTokens) {
    for (int64_t head = 0; head < p.heads_pad; head += 16) score_tile(p, inverses, first, head);
    add_rope_scores(p, first, ld);
  }
  int8_t* latents = p.bytes;
  int8_t* digits = latents + p.latent_rank * tiles_k * kTileInputs;
  for (int64_t first = 0; first < tiles_k * kTileInputs; first += 4) {
    interleave(p, first, latents);
  }
  for (int64_t head = 0; head < p.heads_pad; head += 16) {
    sum_latents(p, inverses, head, tiles_k, latents, digits);
  }
}

bool decode_takes_tiles(int64_t latent_rank) {
  return latent_rank % kTileInputs == 0 && latent_rank <= 2048;
}

}  // namespace
}  // namespace tinylm::cpu
