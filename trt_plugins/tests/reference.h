/// @file reference.h
/// tinylm/{packing,norm,quantization}.py and SwiGLU again, step by step, in the widths that they
/// use. Slow and plain: what the kernels are held to. Compile without contraction of products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bit_linear.h"
#include "float_tensor.h"

namespace tinylm::reference {

/// tinylm.packing.pack, of any number of rows whose length is a multiple of 4.
inline std::vector<std::uint8_t> pack(const std::vector<std::int8_t>& codes) {
  std::vector<std::uint8_t> packed(codes.size() / 4);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const unsigned lane = static_cast<unsigned>(codes[i] + 1) << (2 * (i % 4));
    packed[i / 4] = static_cast<std::uint8_t>(packed[i / 4] | lane);
  }
  return packed;
}

/// tinylm.packing.unpack.
inline std::vector<std::int8_t> unpack(const std::vector<std::uint8_t>& packed) {
  std::vector<std::int8_t> codes(packed.size() * 4);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::int8_t>(((packed[i / 4] >> (2 * (i % 4))) & 3) - 1);
  }
  return codes;
}

/// tinylm.norm.rms_norm of one row: (x * r) * weight, r in float64 and rounded once.
/// @param x float32 [k], normed in place.
inline void rms_norm(std::vector<float>& x, const float* weight, float eps) {
  double sum = 0.0;
  for (const float v : x) sum += static_cast<double>(v) * static_cast<double>(v);
  const double mean = sum / static_cast<double>(x.size());
  const auto r = static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(eps)));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float scaled = x[i] * r;
    x[i] = scaled * weight[i];
  }
}

/// Units in which a quantised activation is an integer: 1 for int8, 2^-9 for float8_e4m3fn.
inline constexpr double units_per_one(cpu::Activation activation) {
  return activation == cpu::Activation::kInt8 ? 1.0 : 512.0;
}

/// A row of quantised activations.
struct Quantized {
  std::vector<std::int32_t> q;  ///< [k], in units of 1 / units_per_one
  float s = 0.0F;               ///< multiplier
};

/// tinylm.quantization.quantize_activation of one row.
inline Quantized quantize(const std::vector<float>& x, cpu::Activation activation) {
  const bool is_int8 = activation == cpu::Activation::kInt8;
  float absmax = 1e-5F;
  for (const float v : x) absmax = std::max(absmax, std::fabs(v));
  Quantized row;
  row.s = (is_int8 ? 127.0F : 448.0F) / absmax;
  row.q.reserve(x.size());
  for (const float v : x) {
    const float product = v * row.s;
    if (is_int8) {
      const float rounded = std::min(std::max(std::nearbyint(product), -128.0F), 127.0F);
      row.q.push_back(static_cast<std::int32_t>(rounded));
    } else {
      const double clamped = std::min(std::max(product, -448.0F), 448.0F);
      row.q.push_back(static_cast<std::int32_t>(round_to(clamped, kE4m3) * 512.0));
    }
  }
  return row;
}

/// The exact sum of q . weight, in q's units.
template <typename Q>
std::int64_t dot(const Q* q, const std::int8_t* weight, std::int64_t k) {
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < k; ++i) sum += static_cast<std::int64_t>(q[i]) * weight[i];
  return sum;
}

/// tinylm.quantization.dequantize: the sum rounded to float32 once, a product, a quotient.
inline float dequantize(std::int64_t sum, cpu::Activation activation, float scale, float s) {
  const auto accumulator = static_cast<float>(static_cast<double>(sum) / units_per_one(activation));
  const float scaled = accumulator * scale;
  return scaled / s;
}

/// Inputs of one call of linear().
struct LinearCase {
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  cpu::Activation activation = cpu::Activation::kInt8;
  FloatTensor x;                    ///< [m, k]
  std::vector<std::int8_t> weight;  ///< [n, k]
  std::vector<float> scale;         ///< [n]
  std::vector<float> norm_weight;   ///< [k], or empty
  float eps = 1e-5F;

  const float* norm() const { return norm_weight.empty() ? nullptr : norm_weight.data(); }
};

/// Row i of x, normed if the case says so, and quantised.
inline Quantized quantize_row(const LinearCase& c, std::int64_t i) {
  std::vector<float> row(static_cast<std::size_t>(c.k));
  for (std::int64_t j = 0; j < c.k; ++j) row[static_cast<std::size_t>(j)] = c.x.get(i * c.k + j);
  if (c.norm() != nullptr) rms_norm(row, c.norm(), c.eps);
  return quantize(row, c.activation);
}

/// Writes row i of y for given quantised activations.
inline void linear_row(const LinearCase& c, std::int64_t i, const Quantized& row, FloatTensor& y) {
  for (std::int64_t j = 0; j < c.n; ++j) {
    const std::int64_t sum = dot(row.q.data(), &c.weight[static_cast<std::size_t>(j * c.k)], c.k);
    y.set(i * c.n + j, dequantize(sum, c.activation, c.scale[static_cast<std::size_t>(j)], row.s));
  }
}

/// What linear() should give: [m, n] in x's type.
inline FloatTensor linear(const LinearCase& c) {
  FloatTensor y(c.x.type(), c.m * c.n);
  for (std::int64_t i = 0; i < c.m; ++i) linear_row(c, i, quantize_row(c, i), y);
  return y;
}

/// x * sigmoid(x) in float64.
inline double silu(double x) { return x / (1.0 + std::exp(-x)); }

/// silu rounded to the type, times up, rounded to the type again.
inline FloatTensor swiglu(const FloatTensor& gate, const FloatTensor& up) {
  FloatTensor y(gate.type(), gate.size());
  for (std::int64_t i = 0; i < gate.size(); ++i) {
    y.set(i, silu(static_cast<double>(gate.get(i))));
    y.set(i, y.get(i) * up.get(i));
  }
  return y;
}

}  // namespace tinylm::reference
