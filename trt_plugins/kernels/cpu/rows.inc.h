// Norm, quantisers, SwiGLU and conversions, compiled once per family by isa_kernels.cpp.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace tinylm::cpu {
namespace {

constexpr float kMinScale = 1e-5F;
constexpr float kFp8Max = 448.0F;

/// Puts the normed row into p.normed, zeros from k to k_pad, and returns its largest magnitude: NaN
/// if a value is not finite, so that it shows in the output.
TINYLM_INLINE float norm_row(const RowParams& p) {
  const int64_t k = p.k;
  const int64_t full = k / 16 * 16;
  const float* x = static_cast<const float*>(p.x);
  if (p.type != FloatType::kFloat) {
    for (int64_t i = 0; i < k; ++i) p.normed[i] = load_float(p.x, i, p.type);
    x = p.normed;
  }
  float factor = 1.0F;
  if (p.norm_weight != nullptr) {
    f64x8 part[4] = {};
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
      for (int j = 0; j < 4; ++j) {
        const f64x8 v = widen(load<f32x8>(x + i + 8 * j));
        part[j] = fma(v, v, part[j]);
      }
    }
    for (; i + 8 <= k; i += 8) {
      const f64x8 v = widen(load<f32x8>(x + i));
      part[0] = fma(v, v, part[0]);
    }
    double square = sum((part[0] + part[1]) + (part[2] + part[3]));
    for (; i < k; ++i) square += static_cast<double>(x[i]) * x[i];
    factor = static_cast<float>(1.0 / sqrt(square / static_cast<double>(k) + p.eps));
  }
  f32x16 top = {};
  f32x16 poison = {};  // 0, or NaN
  float top_rest = 0.0F;
  float poison_rest = 0.0F;
  const f32x16 factors = splat(factor);
  if (p.norm_weight != nullptr) {
    for (int64_t i = 0; i < full; i += 16) {
      const f32x16 v = load<f32x16>(x + i) * factors * load<f32x16>(p.norm_weight + i);
      store(p.normed + i, v);
      top = max(abs(v), top);
      poison += v * 0.0F;
    }
  } else {
    for (int64_t i = 0; i < full; i += 16) {
      const f32x16 v = load<f32x16>(x + i);
      store(p.normed + i, v);
      top = max(abs(v), top);
      poison += v * 0.0F;
    }
  }
  for (int64_t i = full; i < k; ++i) {
    const float v = p.norm_weight != nullptr ? x[i] * factor * p.norm_weight[i] : x[i];
    p.normed[i] = v;
    const float magnitude = fabsf(v);
    top_rest = magnitude > top_rest ? magnitude : top_rest;
    poison_rest += v * 0.0F;
  }
  for (int64_t i = k; i < p.k_pad; ++i) p.normed[i] = 0.0F;
  for (int i = 0; i < 16; ++i) poison_rest += poison[i];
  const float found = largest(top);
  return (found > top_rest ? found : top_rest) + poison_rest;
}

float quantize_int8(const RowParams& p, int8_t* q, int32_t* total) {
  const float absmax = norm_row(p);
  const float s = 127.0F / (absmax < kMinScale ? kMinScale : absmax);
  i32x16 totals = {};
  for (int64_t i = 0; i < p.k_pad; i += 16) {
    const i32x16 v = round_to_int8(load<f32x16>(p.normed + i) * s);
    totals += v;
    store(q + i, narrow(v));
  }
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += totals[i];
  *total = sum;
  return s;
}

/// Rounds |v| <= 448 to e4m3fn, half to even, and returns it times 512, an integer.
TINYLM_INLINE int32_t e4m3_times_512(float v) {
  const float magnitude = fabsf(v);
  // Values with exponent e come in steps of 2**(e - 3), below 2**-6 in steps of 2**-9.
  const uint32_t exponent = bits<uint32_t>(magnitude) & 0x7F800000U;
  const float smallest = 0.015625F;  // 2**-6
  const float power = magnitude < smallest ? smallest : bits<float>(exponent);
  const float magic = power * 1048576.0F * 1.5F;  // a sum with it ends at steps of 2**(e - 3)
  const float rounded = (magnitude + magic) - magic;
  const int32_t integer = static_cast<int32_t>(rounded * 512.0F);
  return v < 0.0F ? -integer : integer;
}

float quantize_fp8(const RowParams& p, int8_t* q, int64_t stride, int32_t* total) {
  const float absmax = norm_row(p);
  const float s = kFp8Max / (absmax < kMinScale ? kMinScale : absmax);
  int32_t sums[3] = {};
  for (int64_t i = 0; i < p.k_pad; ++i) {
    float v = p.normed[i] * s;
    v = v > -kFp8Max ? v : -kFp8Max;  // NaN becomes a number too
    v = v < kFp8Max ? v : kFp8Max;
    const int32_t integer = e4m3_times_512(v);
    const int32_t magnitude = integer < 0 ? -integer : integer;
    const int32_t digits[3] = {magnitude & 127, magnitude >> 7 & 127, magnitude >> 14};
    for (int d = 0; d < 3; ++d) {
      const int32_t digit = integer < 0 ? -digits[d] : digits[d];
      q[d * stride + i] = static_cast<int8_t>(digit);
      sums[d] += digit;
    }
  }
  for (int d = 0; d < 3; ++d) total[d] = sums[d];
  return s;
}

void finish_fp8(const int32_t* sums, int64_t plane, int64_t ld, int64_t m, int64_t first_column,
                int64_t columns, const Sink& sink) {
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t c = 0; c < columns; ++c) {
      const int32_t* at = sums + row * ld + c;
      const int64_t exact = at[0] + 128 * static_cast<int64_t>(at[plane * ld]) +
                            16384 * static_cast<int64_t>(at[2 * plane * ld]);
      const float value = static_cast<float>(exact) * (1.0F / 512.0F);
      const int64_t column = first_column + c;
      store_float(sink.y, row * sink.ld + column, sink.type,
                  value * sink.scale[column] / sink.s[row]);
    }
  }
}

/// x / (1 + e**-x), which is NaN for minus infinity, as in PyTorch and ONNX.
TINYLM_INLINE f64x8 silu(f64x8 x) {
  const f64x8 power = x < splat(-700.0) ? splat(HUGE_VAL) : exp(-x);
  return x / (splat(1.0) + power);
}

void swiglu(const void* gate, const void* up, void* y, int64_t count, FloatType type) {
  int64_t i = 0;
  if (type == FloatType::kFloat) {
    for (; i + 16 <= count; i += 16) {
      const f32x16 g = load<f32x16>(static_cast<const float*>(gate) + i);
      const f32x16 s = join(narrow(silu(widen(low(g)))), narrow(silu(widen(high(g)))));
      store(static_cast<float*>(y) + i, s * load<f32x16>(static_cast<const float*>(up) + i));
    }
  }
  for (; i < count; i += 8) {
    const int64_t n = count - i < 8 ? count - i : 8;
    f64x8 g = {};
    for (int64_t j = 0; j < n; ++j) g[j] = load_float(gate, i + j, type);
    const f64x8 s = silu(g);
    for (int64_t j = 0; j < n; ++j) {
      float rounded = static_cast<float>(s[j]);
      if (type == FloatType::kFloat16) rounded = half_to_float(float_to_half(rounded));
      if (type == FloatType::kBFloat16) rounded = bfloat_to_float(float_to_bfloat(rounded));
      store_float(y, i + j, type, rounded * load_float(up, i + j, type));
    }
  }
}

void widen_all(const void* x, FloatType type, double* y, int64_t count) {
  int64_t i = 0;
  if (type == FloatType::kFloat) {
    for (; i + 8 <= count; i += 8) {
      store(y + i, widen(load<f32x8>(static_cast<const float*>(x) + i)));
    }
  }
  for (; i < count; ++i) y[i] = load_float(x, i, type);
}

void narrow_all(const double* x, FloatType type, void* y, int64_t count) {
  int64_t i = 0;
  if (type == FloatType::kFloat) {
    for (; i + 8 <= count; i += 8) {
      store(static_cast<float*>(y) + i, narrow(load<f64x8>(x + i)));
    }
  }
  for (; i < count; ++i) store_float(y, i, type, static_cast<float>(x[i]));
}

}  // namespace
}  // namespace tinylm::cpu
