// Attention of one query of every head in the latent space, in float64: heads side by side in the
// vectors for scores and weights, latent dimensions for the weighted sum. Compiled once per family
// by isa_kernels.cpp.
#pragma once

#include "attend.inc.h"

namespace tinylm::cpu {
namespace {

/// Converts the latents of `count` tokens to float64 rows of `ld`, and zeroes the rows up to
/// kDecodeTokens.
TINYLM_INLINE void widen_latents(const int8_t* latent, int64_t rank, int64_t count, double* wide,
                                 int64_t ld) {
  for (int64_t t = 0; t < kDecodeTokens; ++t) {
    int64_t r = 0;
    if (t < count) {
      const int8_t* row = latent + t * rank;
      for (; r + 8 <= rank; r += 8) {
        store(wide + t * ld + r, widen(load<i8x8>(row + r)));
      }
      for (; r < rank; ++r) wide[t * ld + r] = row[r];
    }
    for (; r < ld; ++r) wide[t * ld + r] = 0.0;
  }
}

/// Scores of kDecodeTokens tokens of which `count` exist: [tokens, heads_pad].
TINYLM_INLINE void score_tokens(const DecodeRun& p, int64_t first, int64_t count, int64_t ld) {
  double* scores = p.scores + first * p.heads_pad;
  widen_latents(p.latent + first * p.latent_rank, p.latent_rank, count, p.wide, ld);
  for (int64_t t = 0; t < kDecodeTokens; t += kAccumulatorRows) {
    for (int64_t h = 0; h < p.heads_pad; h += kAccumulatorWidth) {
      multiply_tile<false>(p.wide + t * ld, ld, p.q_latent + h, p.heads_pad, p.latent_rank,
                           scores + t * p.heads_pad + h, p.heads_pad);
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const f64x8 s = splat(static_cast<double>(p.scale[first + t]));
    for (int64_t h = 0; h < p.heads_pad; h += 8) {
      store(scores + t * p.heads_pad + h, load<f64x8>(scores + t * p.heads_pad + h) / s);
    }
  }
  for (int64_t t = 0; t < kDecodeTokens; ++t) {
    for (int64_t i = 0; i < p.rope_dim; ++i) {
      const int64_t at = (first + t) * p.rope_dim + i;
      p.wide[t * ld + i] = t < count ? static_cast<double>(load_float(p.rope, at, p.type)) : 0.0;
    }
  }
  for (int64_t t = 0; t < kDecodeTokens; t += kAccumulatorRows) {
    for (int64_t h = 0; h < p.heads_pad; h += kAccumulatorWidth) {
      multiply_tile<true>(p.wide + t * ld, ld, p.q_rope + h, p.heads_pad, p.rope_dim,
                          scores + t * p.heads_pad + h, p.heads_pad);
    }
  }
}

/// Scores to weights over the multiplier: weight / s. Leaves maximum and sum of each head.
TINYLM_INLINE void soften_heads(const DecodeRun& p) {
  for (int64_t h = 0; h < p.heads_pad; h += 8) {
    f64x8 top = splat(kNoScore);
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      top = max(load<f64x8>(p.scores + t * p.heads_pad + h), top);
    }
    f64x8 total = {};
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      double* at = p.scores + t * p.heads_pad + h;
      const f64x8 weights = exp(load<f64x8>(at) - top);
      total += weights;
      store(at, weights * splat(1.0 / static_cast<double>(p.scale[t])));
    }
    store(p.largest + h, top);
    store(p.total + h, total);
  }
}

/// y[head, r] += sum over tokens of weight[token, head] * latent[token, r].
TINYLM_INLINE void add_latents(const DecodeRun& p, int64_t first, int64_t count, int64_t ld) {
  widen_latents(p.latent + first * p.latent_rank, p.latent_rank, count, p.wide, ld);
  double weights[kAccumulatorRows * kDecodeTokens];  // transposed
  for (int64_t h = 0; h < p.heads_pad; h += kAccumulatorRows) {
    for (int64_t i = 0; i < kAccumulatorRows; ++i) {
      for (int64_t t = 0; t < count; ++t) {
        weights[i * kDecodeTokens + t] = p.scores[(first + t) * p.heads_pad + h + i];
      }
    }
    for (int64_t r = 0; r < ld; r += kAccumulatorWidth) {
      multiply_tile<true>(weights, kDecodeTokens, p.wide + r, ld, count, p.y + h * ld + r, ld);
    }
  }
}

void decode_f64(const DecodeRun& p) {
  const int64_t ld = (p.latent_rank + 15) / 16 * 16;
  const int64_t ld_wide = p.latent_rank > p.rope_dim ? ld : (p.rope_dim + 15) / 16 * 16;
  for (int64_t first = 0; first < p.num_tokens; first += kDecodeTokens) {
    const int64_t left = p.num_tokens - first;
    score_tokens(p, first, left < kDecodeTokens ? left : kDecodeTokens, ld_wide);
  }
  soften_heads(p);
  for (int64_t i = 0; i < p.heads_pad * ld; ++i) p.y[i] = 0.0;
  for (int64_t first = 0; first < p.num_tokens; first += kDecodeTokens) {
    const int64_t left = p.num_tokens - first;
    add_latents(p, first, left < kDecodeTokens ? left : kDecodeTokens, ld);
  }
}

#if !defined(__AMX_INT8__)
void decode(const DecodeRun& p) { decode_f64(p); }
bool decode_takes_tiles(int64_t) { return false; }
#endif

}  // namespace
}  // namespace tinylm::cpu
