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

/// Digits of 64 numbers x * unit, |x * unit| < 2**47: digit d goes to out[d * stride], 64 bytes.
///
/// Adding 64 to every digit leaves fields of 7 bits, which one instruction cuts out of each
/// number; eight numbers' fields then go into order by a permutation, and eight vectors into order
/// by a transposition of 8 x 8 words.
TINYLM_INLINE void to_digits_64(const double* x, double unit, int8_t* out, int64_t stride) {
  const __m512d magic = _mm512_set1_pd(6755399441055744.0);  // 1.5 * 2**52
  const __m512i base = _mm512_sub_epi64(_mm512_set1_epi64(64 * ((1LL << 49) - 1) / 127),
                                        _mm512_castpd_si512(magic));
  const __m512i shifts = _mm512_set1_epi64(0x00'2A'23'1C'15'0E'07'00);
  const __m512i order = _mm512_set_epi8(
      63, 55, 47, 39, 31, 23, 15, 7, 62, 54, 46, 38, 30, 22, 14, 6, 61, 53, 45, 37, 29, 21, 13, 5,
      60, 52, 44, 36, 28, 20, 12, 4, 59, 51, 43, 35, 27, 19, 11, 3, 58, 50, 42, 34, 26, 18, 10, 2,
      57, 49, 41, 33, 25, 17, 9, 1, 56, 48, 40, 32, 24, 16, 8, 0);
  const __m512i field = _mm512_set1_epi8(127);
  const __m512i middle = _mm512_set1_epi8(64);
  __m512i v[8];  // qword d of v[i]: digit d of numbers 8 i .. 8 i + 7
  for (int i = 0; i < 8; ++i) {
    const __m512d scaled = _mm512_fmadd_pd(_mm512_loadu_pd(x + 8 * i), _mm512_set1_pd(unit), magic);
    const __m512i number = _mm512_add_epi64(_mm512_castpd_si512(scaled), base);
    const __m512i fields =
        _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, number), field);
    v[i] = _mm512_permutexvar_epi8(order, _mm512_sub_epi8(fields, middle));
  }
  __m512i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm512_unpacklo_epi64(v[i], v[i + 1]);      // digits 0, 2, 4, 6
    a[i + 1] = _mm512_unpackhi_epi64(v[i], v[i + 1]);  // digits 1, 3, 5, 7
  }
  for (int half = 0; half < 2; ++half) {  // of the numbers: 32 each
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i low = a[4 * half + odd], high = a[4 * half + 2 + odd];
      b[4 * half + odd] = _mm512_shuffle_i64x2(low, high, 0x88);      // digits 0 (1), 4 (5)
      b[4 * half + 2 + odd] = _mm512_shuffle_i64x2(low, high, 0xDD);  // digits 2 (3), 6 (7)
    }
  }
  for (int i = 0; i < 4; ++i) {  // digits i and i + 4
    const __m512i low = _mm512_shuffle_i64x2(b[i], b[i + 4], 0x88);
    const __m512i high = _mm512_shuffle_i64x2(b[i], b[i + 4], 0xDD);
    _mm512_storeu_si512(out + i * stride, low);
    if (i + 4 < kWideDigits) _mm512_storeu_si512(out + (i + 4) * stride, high);
  }
}

/// Products of 16 tokens and 16 heads: seven tiles of sums. A rank of 256 keeps the tokens' tiles
/// in registers.
TINYLM_INLINE void multiply_tokens(const int8_t* a, int64_t rank, const int8_t* b, int32_t* sums) {
  const int64_t num_inputs = rank / kTileInputs;
  if (num_inputs == 4) {
    _tile_loadd(4, a, rank);
    _tile_loadd(5, a + 64, rank);
    _tile_loadd(6, a + 128, rank);
    _tile_loadd(7, a + 192, rank);
    for (int64_t d = 0; d < kWideDigits; ++d) {
      const int8_t* digit = b + 4 * d * kTileBytes;
      _tile_zero(0);
      _tile_loadd(2, digit, 64);
      _tile_dpbssd(0, 4, 2);
      _tile_loadd(3, digit + kTileBytes, 64);
      _tile_dpbssd(0, 5, 3);
      _tile_loadd(2, digit + 2 * kTileBytes, 64);
      _tile_dpbssd(0, 6, 2);
      _tile_loadd(3, digit + 3 * kTileBytes, 64);
      _tile_dpbssd(0, 7, 3);
      _tile_stored(0, sums + d * 256, 64);
    }
    return;
  }
  for (int64_t d = 0; d < kWideDigits; ++d) {
    _tile_zero(0);
    for (int64_t k = 0; k < num_inputs; ++k) {
      _tile_loadd(1, a + k * kTileInputs, rank);
      _tile_loadd(2, b + (d * num_inputs + k) * kTileBytes, 64);
      _tile_dpbssd(0, 1, 2);
    }
    _tile_stored(0, sums + d * 256, 64);
  }
}

/// Scores of 16 tokens and 16 heads without the rotary part: [16, heads_pad].
TINYLM_INLINE void score_tile(const DecodeRun& p, int64_t first, int64_t head) {
  alignas(64) int32_t sums[kWideDigits * 256];
  multiply_tokens(p.latent + first * p.latent_rank, p.latent_rank,
                  p.q_tiles + head * kWideDigits * p.latent_rank, sums);
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

/// A head's weights of this run in digits: row h of tile [d, k].
TINYLM_INLINE double store_weights(const DecodeRun& p, int64_t head, int64_t tiles_k,
                                   int8_t* row) {
  double weights[kDecodeRun];
  for (int64_t t = 0; t < p.num_tokens; ++t) weights[t] = p.scores[t * p.heads_pad + head];
  for (int64_t t = p.num_tokens; t < tiles_k * kTileInputs; ++t) weights[t] = 0.0;
  const double largest = largest_magnitude(weights, p.num_tokens);
  int exponent = 0;
  if (largest > 0.0 && largest < 1e300) frexp(largest, &exponent);
  exponent = exponent > -900 ? exponent : -900;
  const double steps = ldexp(1.0, 47 - exponent);
  for (int64_t k = 0; k < tiles_k; ++k) {
    to_digits_64(weights + k * kTileInputs, steps, row + k * kTileBytes, tiles_k * kTileBytes);
  }
  return ldexp(1.0, exponent - 47);
}

/// Weighted sums of the latents for 16 heads.
TINYLM_INLINE void sum_latents(const DecodeRun& p, int64_t head, int64_t tiles_k,
                               const int8_t* latents, int8_t* digits) {
  alignas(64) int32_t sums[kWideDigits * 256];
  double unit[16];
  for (int64_t h = 0; h < 16; ++h) {
    unit[h] = store_weights(p, head + h, tiles_k, digits + h * 64);
  }
  const int64_t ld = p.latent_rank;
  for (int64_t tile = 0; tile < p.latent_rank / 16; ++tile) {
    for (int64_t d = 0; d < kWideDigits; ++d) {
      _tile_zero(0);
      for (int64_t k = 0; k < tiles_k; ++k) {
        _tile_loadd(1, digits + (d * tiles_k + k) * kTileBytes, 64);
        _tile_loadd(2, latents + k * ld * kTileInputs + tile * kTileBytes, 64);
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
    interleave(p, first, latents);
  }
  for (int64_t head = 0; head < p.heads_pad; head += 16) {
    sum_latents(p, head, tiles_k, latents, digits);
  }
}

bool decode_takes_tiles(int64_t latent_rank) { 
  return latent_rank % kTileInputs == 0 && latent_rank <= 2048;
}

}  // namespace
}  // namespace tinylm::cpu
