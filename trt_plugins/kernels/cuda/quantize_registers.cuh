// The same as quantize_row.cuh for rows that fit into the registers of their threads, which is
// faster: each value is read once and kept.
#pragma once

#include "quantize_row.cuh"

namespace tinylm::cuda {

/// Reductions over a whole thread block, or over each warp.
template <int kThreads>
struct Reduction {
  template <typename V, typename Combine>
  __device__ V operator()(V value, Combine combine) const {
    return detail::block_reduce<kThreads>(value, combine);
  }
};

/// The part of a row that one of kThreads threads holds: 4 * kVectors values.
template <int kThreads, int kVectors, typename T>
struct RegisterRow {
  float4 values[kVectors];
  float4 weights[kVectors];  // of the norm

  static constexpr int kMostInputs = 4 * kThreads * kVectors;

  __device__ static int column(int thread, int vector) { return 4 * (thread + vector * kThreads); }

  /// The norm's weights, which no kernel writes.
  __device__ void load_weights(const RowSource<T>& source, int thread) {
    if (source.norm_weight == nullptr) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = column(thread, v);
      if (i < source.k) weights[v] = load4(source.norm_weight + i);
    }
  }

  /// The row, gated.
  __device__ void load(const RowSource<T>& source, int thread) {
    float4 up[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = column(thread, v);
      values[v] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (i >= source.k) continue;
      values[v] = load4(source.x + i);
      if (source.gated) up[v] = load4(source.x + source.k + i);
    }
    if (!source.gated) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(thread, v) >= source.k) continue;
      float4& x = values[v];
      x = make_float4(detail::gate<T>(x.x, up[v].x), detail::gate<T>(x.y, up[v].y),
                      detail::gate<T>(x.z, up[v].z), detail::gate<T>(x.w, up[v].w));
    }
  }

  /// Norms and scales to the quantiser's range; returns the multiplier s.
  template <Activation kActivation, typename Reduce>
  __device__ float scale(const RowSource<T>& source, Reduce reduce) {
    if (source.norm_weight != nullptr) {
      const double squares = reduce(sum_of_squares(), [](double a, double b) { return a + b; });
      const float r = inverse_root(squares / source.k + static_cast<double>(source.eps));
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float4& x = values[v];
        const float4& w = weights[v];
        if (x.x == 0.0F && x.y == 0.0F && x.z == 0.0F && x.w == 0.0F) continue;  // or not loaded
        x = make_float4(x.x * r * w.x, x.y * r * w.y, x.z * r * w.z, x.w * r * w.w);
      }
    }
    // As integers, so that not-a-number, whose bits are larger than all others', is the largest.
    std::uint32_t largest = __float_as_uint(1e-5F);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4& x = values[v];
      largest = max(max(largest, __float_as_uint(fabsf(x.x))), __float_as_uint(fabsf(x.y)));
      largest = max(max(largest, __float_as_uint(fabsf(x.z))), __float_as_uint(fabsf(x.w)));
    }
    largest = reduce(largest, [](std::uint32_t a, std::uint32_t b) { return max(a, b); });
    return (kActivation == Activation::kInt8 ? 127.0F : 448.0F) / __uint_as_float(largest);
  }

  /// Quantises: emit(digit, column, word) for columns up to k_padded. Returns this thread's sum.
  /// @tparam kRaw Whether e4m3 values are given as they are, as digit 0.
  template <Activation kActivation, bool kRaw, typename Emit>
  __device__ int quantize(float s, int thread, int k_padded, Emit emit) const {
    int sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = column(thread, v);
      if (i >= k_padded) continue;
      const float x[4] = {values[v].x, values[v].y, values[v].z, values[v].w};
      int q[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kActivation == Activation::kInt8) {
          q[j] = detail::int8_value(x[j] * s);
          sum += q[j];
        } else {
          const __nv_fp8_storage_t value = detail::fp8_value(x[j] * s);
          q[j] = detail::fp8_units(value);
          sum += q[j];
          if (kRaw) q[j] = value;
        }
      }
#pragma unroll
      for (int digit = 0; digit < (kRaw ? 1 : num_digits(kActivation)); ++digit) {
        emit(digit, i, detail::pack4(q[0], q[1], q[2], q[3]));
#pragma unroll
        for (int j = 0; j < 4; ++j) q[j] = (q[j] - static_cast<std::int8_t>(q[j])) / 256;
      }
    }
    return sum;
  }

 private:
  __device__ double sum_of_squares() const {
    double sum = 0.0;
    if constexpr (!std::is_same_v<T, float>) {
      // Products of half precision are exact in float32, and four of them lose little.
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4& x = values[v];
        sum += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
      }
      if (isfinite(sum)) return sum;
      sum = 0.0;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const double a = values[v].x, b = values[v].y, c = values[v].z, d = values[v].w;
      sum += a * a + b * b + (c * c + d * d);
    }
    return sum;
  }

  /// 1 / sqrt(x), by one step of Newton's method in float64 where float32 can begin it.
  __device__ static float inverse_root(double x) {
    constexpr double kMost = 1e30;
    if (std::is_same_v<T, float> || !(x < kMost)) return static_cast<float>(1.0 / sqrt(x));
    const double y = rsqrtf(static_cast<float>(x));
    return static_cast<float>(y * (1.5 - 0.5 * x * y * y));
  }
};

}  // namespace tinylm::cuda
