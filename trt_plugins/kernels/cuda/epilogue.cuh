// What becomes of an exact sum: y = sum * weight_scale / s, rounded once, and the residual.
#pragma once

#include <type_traits>

#include "quantize_row.cuh"

namespace tinylm::cuda {

/// Output of one product.
template <typename T>
struct Output {
  T* y;                       // [m, n]
  const T* residual;          // [m, n] or nullptr
  const float* weight_scale;  // [n]
  std::int64_t n;
};

/// The activations' multipliers and sums, by row.
struct RowScales {
  const float* s;
  const int* sums;
};

/// The scale of one output; bare sums have none.
template <typename T>
__device__ inline float column_scale(const Output<T>& out, int column) {
  return __ldg(out.weight_scale + column);
}
__device__ inline float column_scale(const Output<std::int32_t>&, int) { return 1.0F; }

/// x / s, given 1 / s; for half precision, which rounds again, by one step of Newton's method.
template <typename T>
__device__ inline float quotient(float x, float s, float inverse) {
  if constexpr (std::is_same_v<T, float>) return x / s;
  const float y = x * inverse;
  return s == 0.0F ? y : fmaf(fmaf(-y, s, x), inverse, y);
}

/// What the sum of activations times codes {0, 1, 2} becomes: less the row's sum, scaled.
template <Activation kActivation, typename T>
__device__ inline float scaled_sum(int acc, int row_sum, float s, float inverse,
                                   float weight_scale) {
  constexpr float kUnit = kActivation == Activation::kInt8 ? 1.0F : 1.0F / kFp8Units;
  const float scaled = static_cast<float>(acc - row_sum) * kUnit * weight_scale;
  return quotient<T>(scaled, s, inverse);
}

/// Stores outputs of one row, whose products with codes {0, 1, 2} are `acc`.
template <typename T>
class RowOutput {
 public:
  __device__ RowOutput(const Output<T>& out, std::int64_t row, RowScale scale)
      : y_(out.y + row * out.n),
        residual_(out.residual == nullptr ? nullptr : out.residual + row * out.n),
        scale_(scale),
        inverse_(1.0F / scale.s) {}

  template <Activation kActivation>
  __device__ void store(int column, int acc, float weight_scale) const {
    const T value = from_float<T>(
        scaled_sum<kActivation, T>(acc, scale_.sum, scale_.s, inverse_, weight_scale));
    y_[column] =
        residual_ == nullptr ? value : from_float<T>(to_float(residual_[column]) + to_float(value));
  }

 private:
  T* y_;
  const T* residual_;  // may be y
  RowScale scale_;
  float inverse_;
};

/// int32 outputs are the bare sums.
template <>
class RowOutput<std::int32_t> {
 public:
  __device__ RowOutput(const Output<std::int32_t>& out, std::int64_t row, RowScale scale)
      : y_(out.y + row * out.n), sum_(scale.sum) {}

  template <Activation kActivation>
  __device__ void store(int column, int acc, float) const {
    y_[column] = acc - sum_;
  }

 private:
  std::int32_t* y_;
  int sum_;
};

}  // namespace tinylm::cuda
