/// @file simd.h
/// Vectors of 64 bytes for isa_kernels.cpp. The compiler splits them where registers are shorter,
/// so one text serves every family. Everything here is local to the file that includes it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(TINYLM_X86)
#include <immintrin.h>
#endif

#include "float_type.h"

#define TINYLM_INLINE inline __attribute__((always_inline))

namespace tinylm::cpu {
namespace {

typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef int8_t i8x8 __attribute__((vector_size(8)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

template <typename V>
TINYLM_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
TINYLM_INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}

template <typename To, typename From>
TINYLM_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

TINYLM_INLINE f64x8 splat(double x) { return f64x8{x, x, x, x, x, x, x, x}; }
TINYLM_INLINE f32x16 splat(float x) {
  return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

/// a * b + c, rounded once where the family has an instruction for it.
TINYLM_INLINE f64x8 fma(f64x8 a, f64x8 b, f64x8 c) {
#if defined(__AVX512F__)
  return (f64x8)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  union U {
    f64x8 v;
    __m256d h[2];
  };
  U ua, ub, uc;
  ua.v = a;
  ub.v = b;
  uc.v = c;
  uc.h[0] = _mm256_fmadd_pd(ua.h[0], ub.h[0], uc.h[0]);
  uc.h[1] = _mm256_fmadd_pd(ua.h[1], ub.h[1], uc.h[1]);
  return uc.v;
#else
  return a * b + c;
#endif
}

// b where a is NaN, as the instruction has it.
#if defined(__AVX512F__)
TINYLM_INLINE f64x8 max(f64x8 a, f64x8 b) { return (f64x8)_mm512_max_pd((__m512d)a, (__m512d)b); }
TINYLM_INLINE f32x16 max(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
#else
TINYLM_INLINE f64x8 max(f64x8 a, f64x8 b) { return a > b ? a : b; }
TINYLM_INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
#endif
TINYLM_INLINE f32x16 abs(f32x16 a) { return bits<f32x16>(bits<u32x16>(a) & 0x7FFFFFFFU); }

TINYLM_INLINE double sum(f64x8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
TINYLM_INLINE float largest(f32x16 v) {
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Conversions that change the width: GCC 12 splits __builtin_convertvector of them into halves.
#if defined(__AVX512F__)
TINYLM_INLINE f64x8 widen(f32x8 v) { return (f64x8)_mm512_cvtps_pd((__m256)v); }
TINYLM_INLINE f32x8 narrow(f64x8 v) { return (f32x8)_mm512_cvtpd_ps((__m512d)v); }
TINYLM_INLINE i64x8 widen(i32x8 v) { return (i64x8)_mm512_cvtepi32_epi64((__m256i)v); }
TINYLM_INLINE i8x8 narrow(i64x8 v) {
  return bits<i8x8>(_mm_cvtsi128_si64(_mm512_cvtepi64_epi8((__m512i)v)));
}
TINYLM_INLINE i8x16 narrow(i32x16 v) { return (i8x16)_mm512_cvtepi32_epi8((__m512i)v); }
TINYLM_INLINE f64x8 widen(i8x8 v) {
  const __m128i bytes = _mm_cvtsi64_si128(bits<int64_t>(v));
  return (f64x8)_mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(bytes));
}
#else
TINYLM_INLINE f64x8 widen(f32x8 v) { return __builtin_convertvector(v, f64x8); }
TINYLM_INLINE f32x8 narrow(f64x8 v) { return __builtin_convertvector(v, f32x8); }
TINYLM_INLINE i64x8 widen(i32x8 v) { return __builtin_convertvector(v, i64x8); }
TINYLM_INLINE i8x8 narrow(i64x8 v) { return __builtin_convertvector(v, i8x8); }
TINYLM_INLINE i8x16 narrow(i32x16 v) { return __builtin_convertvector(v, i8x16); }
TINYLM_INLINE f64x8 widen(i8x8 v) { return __builtin_convertvector(v, f64x8); }
#endif

TINYLM_INLINE f32x8 low(f32x16 v) {
  f32x8 r;
  memcpy(&r, &v, 32);
  return r;
}
TINYLM_INLINE f32x8 high(f32x16 v) {
  f32x8 r;
  memcpy(&r, reinterpret_cast<const char*>(&v) + 32, 32);
  return r;
}
TINYLM_INLINE f32x16 join(f32x8 a, f32x8 b) {
  f32x16 r;
  memcpy(&r, &a, 32);
  memcpy(reinterpret_cast<char*>(&r) + 32, &b, 32);
  return r;
}
/// Rounds half to even and clamps to -128 .. 127; any value for NaN.
TINYLM_INLINE i32x16 round_to_int8(f32x16 x) {
#if defined(__AVX512F__)
  const __m512i v = _mm512_cvtps_epi32((__m512)x);
  const __m512i low = _mm512_max_epi32(v, _mm512_set1_epi32(-128));
  return (i32x16)_mm512_min_epi32(low, _mm512_set1_epi32(127));
#else
  const f32x16 magic = splat(12582912.0F);  // 1.5 * 2**23: adding it rounds |x| < 2**22
  i32x16 v = bits<i32x16>(x + magic) - bits<i32x16>(magic);
  v = v < -128 ? i32x16{} - 128 : v;
  return v > 127 ? i32x16{} + 127 : v;
#endif
}

/// e**x to within 1 unit of float64 for x in [-700, 700]; outside, the value at the limit.
///
/// x = n ln 2 + r with |r| <= ln(2) / 2; a Taylor polynomial for e**r; n goes into the exponent.
TINYLM_INLINE f64x8 exp(f64x8 x) {
  x = x < splat(-700.0) ? splat(-700.0) : x;
  x = x > splat(700.0) ? splat(700.0) : x;
  const f64x8 magic = splat(6755399441055744.0);  // 1.5 * 2**52
  const f64x8 shifted = fma(x, splat(1.4426950408889634), magic);
  const f64x8 n = shifted - magic;
  f64x8 r = fma(n, splat(-6.93147180369123816490e-01), x);  // ln 2, high part
  r = fma(n, splat(-1.90821492927058770002e-10), r);
  f64x8 p = splat(1.0 / 6227020800.0);
  p = fma(p, r, splat(1.0 / 479001600.0));
  p = fma(p, r, splat(1.0 / 39916800.0));
  p = fma(p, r, splat(1.0 / 3628800.0));
  p = fma(p, r, splat(1.0 / 362880.0));
  p = fma(p, r, splat(1.0 / 40320.0));
  p = fma(p, r, splat(1.0 / 5040.0));
  p = fma(p, r, splat(1.0 / 720.0));
  p = fma(p, r, splat(1.0 / 120.0));
  p = fma(p, r, splat(1.0 / 24.0));
  p = fma(p, r, splat(1.0 / 6.0));
  p = fma(p, r, splat(0.5));
  p = fma(p, r, splat(1.0));
  p = fma(p, r, splat(1.0));
  const i64x8 exponent = (bits<i64x8>(shifted) - bits<i64x8>(magic)) << 52;
  return bits<f64x8>(bits<i64x8>(p) + exponent);
}

TINYLM_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000U) << 16;
  const uint32_t rest = h & 0x7FFFU;
  if (rest >= 0x7C00U) return bits<float>(sign | 0x7F800000U | (rest & 0x3FFU) << 13);
  // Subnormals come out right too: 2**112 moves the exponent's bias.
  const float scaled = bits<float>(rest << 13) * bits<float>(0x77800000U);
  return bits<float>(sign | bits<uint32_t>(scaled));
}

/// Rounds half to even.
TINYLM_INLINE uint16_t float_to_half(float f) {
  const uint32_t u = bits<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000U);
  const uint32_t rest = u & 0x7FFFFFFFU;
  if (rest > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);
  if (rest >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);  // 65520 and above
  if (rest < 0x38800000U) {  // below 2**-14: adding 1/2 puts the steps of 2**-24 last
    const float shifted = bits<float>(rest) + 0.5F;
    return static_cast<uint16_t>(sign | (bits<uint32_t>(shifted) - 0x3F000000U));
  }
  const uint32_t rounded = rest + 0xFFFU + (rest >> 13 & 1U);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000U) >> 13);
}

TINYLM_INLINE float bfloat_to_float(uint16_t b) {
  return bits<float>(static_cast<uint32_t>(b) << 16);
}

/// Rounds half to even.
TINYLM_INLINE uint16_t float_to_bfloat(float f) {
  const uint32_t u = bits<uint32_t>(f);
  if ((u & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>(u >> 16 | 0x40U);
  return static_cast<uint16_t>((u + 0x7FFFU + (u >> 16 & 1U)) >> 16);
}

/// Element i of a tensor, as float32.
TINYLM_INLINE float load_float(const void* x, int64_t i, FloatType type) {
  if (type == FloatType::kFloat) return static_cast<const float*>(x)[i];
  const uint16_t u = static_cast<const uint16_t*>(x)[i];
  return type == FloatType::kFloat16 ? half_to_float(u) : bfloat_to_float(u);
}

/// Rounds a float32 into element i of a tensor.
TINYLM_INLINE void store_float(void* y, int64_t i, FloatType type, float value) {
  if (type == FloatType::kFloat) {
    static_cast<float*>(y)[i] = value;
  } else {
    static_cast<uint16_t*>(y)[i] =
        type == FloatType::kFloat16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

}  // namespace
}  // namespace tinylm::cpu
