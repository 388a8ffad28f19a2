// Fixed point digits with AVX-512 VBMI, 64 numbers at a time. Included by isa_kernels.cpp where the
// family has it, in place of wide.inc.h's loop over the digits.
#pragma once

#include "wide.inc.h"

namespace tinylm::cpu {
namespace {

/// Digits of 64 numbers x * unit, |x * unit| < 2**47: digit d goes to out[d * stride], 64 bytes.
///
/// Adding 64 to every digit leaves fields of 7 bits, which one instruction cuts out of each
/// number; eight numbers' fields then go into order by a permutation, and eight vectors into order
/// by a transposition of 8 x 8 words.
TINYLM_INLINE void to_digits_64(const double* x, double unit, int8_t* out, int64_t stride) {
  const __m512d magic = _mm512_set1_pd(6755399441055744.0);  // 1.5 * 2**52
  const __m512i base =
      _mm512_sub_epi64(_mm512_set1_epi64(64 * ((1LL << 49) - 1) / 127), _mm512_castpd_si512(magic));
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
    const __m512i fields = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, number), field);
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

/// to_digits() of wide.inc.h.
void to_digits_vbmi(const double* x, int64_t count, double unit, int8_t* digits, int64_t stride,
                    int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i totals[kWideDigits] = {};
  for (int64_t i = 0; i < count; i += 64) {
    double padded[64];
    int8_t bytes[64 * kWideDigits];
    const int64_t left = count - i < 64 ? count - i : 64;
    const double* from = x + i;
    if (left < 64) {
      for (int64_t j = 0; j < 64; ++j) padded[j] = j < left ? x[i + j] : 0.0;
      from = padded;
    }
    to_digits_64(from, unit, bytes, 64);
    for (int64_t d = 0; d < kWideDigits; ++d) {
      const __m512i digit = _mm512_loadu_si512(bytes + 64 * d);
      totals[d] = _mm512_dpbusd_epi32(totals[d], ones, digit);
      if (left == 64) {
        _mm512_storeu_si512(digits + d * stride + i, digit);
      } else {
        memcpy(digits + d * stride + i, bytes + 64 * d, (left + 7) / 8 * 8);
      }
    }
  }
  for (int d = 0; d < kWideDigits; ++d) {
    const i32x16 total = (i32x16)totals[d];
    sums[d] = 0;
    for (int j = 0; j < 16; ++j) sums[d] += total[j];
  }
}

}  // namespace
}  // namespace tinylm::cpu
