// Attention over expanded keys and values in float64, with an online softmax; compiled once per
// family by isa_kernels.cpp.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace tinylm::cpu {
namespace {

// Sums that stay in registers: 16 vectors of 64 bytes with AVX-512, else 4.
#if defined(__AVX512F__)
constexpr int kAccumulatorRows = 8;
constexpr int kAccumulatorVectors = 2;
#else
constexpr int kAccumulatorRows = 4;
constexpr int kAccumulatorVectors = 1;
#endif
constexpr int64_t kAccumulatorWidth = 8 * kAccumulatorVectors;

/// out[i, j] (+)= sum over d of a[i * lda + d] * b[d * ldb + j] for kAccumulatorRows rows and
/// kAccumulatorWidth columns.
template <bool kAdd>
TINYLM_INLINE void multiply_tile(const double* a, int64_t lda, const double* b, int64_t ldb,
                                 int64_t depth, double* out, int64_t ldo) {
  f64x8 total[kAccumulatorRows][kAccumulatorVectors];
  for (int i = 0; i < kAccumulatorRows; ++i) {
    for (int v = 0; v < kAccumulatorVectors; ++v) {
      total[i][v] = kAdd ? load<f64x8>(out + i * ldo + 8 * v) : f64x8{};
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    f64x8 right[kAccumulatorVectors];
    for (int v = 0; v < kAccumulatorVectors; ++v) right[v] = load<f64x8>(b + d * ldb + 8 * v);
    for (int i = 0; i < kAccumulatorRows; ++i) {
      const f64x8 left = splat(a[i * lda + d]);
      for (int v = 0; v < kAccumulatorVectors; ++v) {
        total[i][v] = fma(left, right[v], total[i][v]);
      }
    }
  }
  for (int i = 0; i < kAccumulatorRows; ++i) {
    for (int v = 0; v < kAccumulatorVectors; ++v) store(out + i * ldo + 8 * v, total[i][v]);
  }
}

/// Turns scores of query i into weights, zeros from `visible` to `end`, and scales what was summed
/// before to the new maximum.
TINYLM_INLINE void soften(const AttendTile& t, int64_t i, int64_t visible, int64_t end) {
  double* scores = t.scores + i * t.ld_keys;
  if (visible <= 0) {
    for (int64_t k = 0; k < end; ++k) scores[k] = 0.0;
    return;
  }
  const int64_t padded = (visible + 7) / 8 * 8;
  for (int64_t k = visible; k < padded; ++k) scores[k] = kNoScore;
  f64x8 top = splat(t.largest[i]);
  for (int64_t k = 0; k < padded; k += 8) top = max(load<f64x8>(scores + k), top);
  double largest = top[0];
  for (int j = 1; j < 8; ++j) largest = top[j] > largest ? top[j] : largest;
  f64x8 total = {};
  for (int64_t k = 0; k < padded; k += 8) {
    const f64x8 weights = exp(load<f64x8>(scores + k) - splat(largest));
    store(scores + k, weights);
    total += weights;
  }
  for (int64_t k = visible; k < end; ++k) scores[k] = 0.0;
  const double keep = exp(splat(t.largest[i] - largest))[0];
  t.largest[i] = largest;
  t.total[i] = t.total[i] * keep + sum(total);
  for (int64_t j = 0; j < t.ld_values; j += 8) {
    store(t.y + i * t.ld_values + j, load<f64x8>(t.y + i * t.ld_values + j) * splat(keep));
  }
}

void attend(const AttendTile& t) {
  int64_t seen = t.first_visible + t.num_queries - 1;  // by the last query
  seen = seen < t.num_keys ? seen : t.num_keys;
  if (seen <= 0) return;
  const int64_t end = (seen + kAccumulatorWidth - 1) / kAccumulatorWidth * kAccumulatorWidth;
  for (int64_t i = 0; i < t.num_queries; i += kAccumulatorRows) {
    for (int64_t k = 0; k < end; k += kAccumulatorWidth) {
      multiply_tile<false>(t.q + i * t.key_dim, t.key_dim, t.keys + k, t.ld_keys, t.key_dim,
                           t.scores + i * t.ld_keys + k, t.ld_keys);
    }
  }
  for (int64_t i = 0; i < kQueryTile; ++i) {
    int64_t visible = i < t.num_queries ? t.first_visible + i : 0;
    visible = visible < t.num_keys ? visible : t.num_keys;
    soften(t, i, visible, end);
  }
  for (int64_t i = 0; i < t.num_queries; i += kAccumulatorRows) {
    for (int64_t j = 0; j < t.ld_values; j += kAccumulatorWidth) {
      multiply_tile<true>(t.scores + i * t.ld_keys, t.ld_keys, t.values + j, t.ld_values, seen,
                          t.y + i * t.ld_values + j, t.ld_values);
    }
  }
}

}  // namespace
}  // namespace tinylm::cpu
