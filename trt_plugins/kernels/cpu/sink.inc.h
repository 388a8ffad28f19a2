// What becomes of a tile of integer sums, compiled once per family by isa_kernels.cpp.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace tinylm::cpu {
namespace {

/// p / s, rounded once, from s_inverse = 1 / s: two steps of Newton end in the correctly rounded
/// quotient (Markstein 1990, theorem 8) and cost a quarter of a division.
TINYLM_INLINE f32x16 divide(f32x16 p, f32x16 s, f32x16 s_inverse) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)p, b = (__m512)s, r = (__m512)s_inverse;
  __m512 q = _mm512_mul_ps(a, r);
  q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, b, a), r, q);
  q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, b, a), r, q);
  return (f32x16)q;
#else
  static_cast<void>(s_inverse);
  return p / s;
#endif
}

/// Whether emit() of whole blocks comes down to emit_float().
TINYLM_INLINE bool plain(const Sink& sink, int64_t last_block) {
  return sink.sums == nullptr && sink.type == FloatType::kFloat &&
         sink.outputs >= last_block * kBlockRows;
}

/// 16 sums that exist, to float32.
TINYLM_INLINE void emit_float(const Sink& sink, int64_t row, int64_t block, i32x16 total) {
  const int64_t column = block * kBlockRows;
  const f32x16 value = __builtin_convertvector(total - sink.correction[row], f32x16);
  const f32x16 y = divide(value * load<f32x16>(sink.scale + column), splat(sink.s[row]),
                          splat(sink.s_inverse[row]));
  store(static_cast<float*>(sink.y) + row * sink.ld + column - sink.first_column, y);
}

/// One row of up to 16 sums of block `block`.
TINYLM_INLINE void emit(const Sink& sink, int64_t row, int64_t block, i32x16 total) {
  const int64_t column = block * kBlockRows;
  const int64_t count = sink.outputs - column;
  const int64_t at = row * sink.ld + column - sink.first_column;
  total -= sink.correction[row];
  if (sink.sums != nullptr) {
    int32_t* out = sink.sums + at;
    if (count >= 16) {
      store(out, total);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = total[i];
    }
    return;
  }
  const float s = sink.s[row];
  const f32x16 value = __builtin_convertvector(total, f32x16);
  if (count >= 16) {
    const f32x16 scaled = value * load<f32x16>(sink.scale + column);
    const f32x16 y = divide(scaled, splat(s), splat(sink.s_inverse[row]));
    if (sink.type == FloatType::kFloat) {
      store(static_cast<float*>(sink.y) + at, y);
      return;
    }
    for (int i = 0; i < 16; ++i) store_float(sink.y, at + i, sink.type, y[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float y = value[i] * sink.scale[column + i] / s;
    store_float(sink.y, at + i, sink.type, y);
  }
}

}  // namespace
}  // namespace tinylm::cpu
