// What becomes of an exact sum: y = sum * weight_scale / s, rounded once, and the residual.
#pragma once

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

/// Stores y of one output and row, whose product with codes {0, 1, 2} is `acc`. int32 outputs get
/// the bare sum.
template <Activation kActivation, typename T>
__device__ inline void store_output(const Output<T>& out, std::int64_t row, int column, int acc,
                                    RowScale scale) {
  const std::int64_t at = row * out.n + column;
  const int sum = acc - scale.sum;
  constexpr float kUnit = kActivation == Activation::kInt8 ? 1.0F : 1.0F / kFp8Units;
  const float y = static_cast<float>(sum) * kUnit * out.weight_scale[column] / scale.s;
  const T value = from_float<T>(y);
  out.y[at] = out.residual == nullptr
                  ? value
                  : from_float<T>(to_float(out.residual[at]) + to_float(value));
}

template <Activation kActivation>
__device__ inline void store_output(const Output<std::int32_t>& out, std::int64_t row, int column,
                                    int acc, RowScale scale) {
  out.y[row * out.n + column] = acc - scale.sum;
}

}  // namespace tinylm::cuda
