// Fixed point digits of float64 vectors and back, see wide_linear.h; compiled once per family by
// isa_kernels.cpp.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace tinylm::cpu {
namespace {

double largest_magnitude(const double* x, int64_t count) {
  f64x8 top = {};
  f64x8 poison = {};  // 0, or NaN
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const f64x8 v = load<f64x8>(x + i);
    top = max(max(v, -v), top);
    poison += v * 0.0;
  }
  double largest = top[0];
  double poisoned = sum(poison);
  for (int j = 1; j < 8; ++j) largest = top[j] > largest ? top[j] : largest;
  for (; i < count; ++i) {
    largest = fabs(x[i]) > largest ? fabs(x[i]) : largest;
    poisoned += x[i] * 0.0;
  }
  return largest + poisoned;
}

#if !defined(__AVX512VBMI__)
void to_digits_loop(const double* x, int64_t count, double unit, int8_t* digits, int64_t stride,
                    int32_t* sums) {
  const f64x8 magic = splat(6755399441055744.0);  // 1.5 * 2**52: adding it rounds to an integer
  i64x8 totals[kWideDigits] = {};
  for (int64_t i = 0; i < count; i += 8) {
    f64x8 v = {};
    if (count - i >= 8) {
      v = load<f64x8>(x + i);
    } else {
      for (int64_t j = 0; j < count - i; ++j) v[j] = x[i + j];
    }
    i64x8 rest = bits<i64x8>(v * unit + magic) - bits<i64x8>(magic);
    for (int d = 0; d < kWideDigits; ++d) {
      const i64x8 digit = ((rest + 64) & 127) - 64;
      rest = (rest - digit) >> 7;
      totals[d] += digit;
      store(digits + d * stride + i, narrow(digit));
    }
  }
  for (int d = 0; d < kWideDigits; ++d) {
    int64_t total = 0;
    for (int j = 0; j < 8; ++j) total += totals[d][j];
    sums[d] = static_cast<int32_t>(total);
  }
}
#endif

void from_digits(const int32_t* sums, int64_t stride, int64_t count, double unit, double* out) {
  for (int64_t i = 0; i < count; i += 8) {
    i64x8 total = {};
    for (int d = kWideDigits - 1; d >= 0; --d) {
      const i32x8 digit = load<i32x8>(sums + d * stride + i);
      total = (total << 7) + widen(digit);
    }
    const f64x8 value = __builtin_convertvector(total, f64x8) * unit;
    if (count - i >= 8) {
      store(out + i, value);
    } else {
      for (int64_t j = 0; j < count - i; ++j) out[i + j] = value[j];
    }
  }
}

}  // namespace
}  // namespace tinylm::cpu
