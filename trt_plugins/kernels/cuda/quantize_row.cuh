// One row of activations by one thread block or one warp: gate, RMSNorm, absmax, quantise. Both
// kernels that quantise are built on it. Numerics: tinylm/norm.py and tinylm/quantization.py.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "convert.cuh"
#include "types.h"

namespace tinylm::cuda {

// Every float8_e4m3fn value is an integer in units of 2^-9, at most 448 * 512. It is summed as
// three int8 digits in base 256, which int8 tensor cores sum exactly; fp8 ones keep too few bits.
inline constexpr int kFp8Digits = 3;
inline constexpr float kFp8Units = 512.0F;

__host__ __device__ inline constexpr int num_digits(Activation activation) {
  return activation == Activation::kInt8 ? 1 : kFp8Digits;
}

/// Where one row comes from.
template <typename T>
struct RowSource {
  const T* x;                // [k], or [2k] = gate | up
  const float* norm_weight;  // [k] or nullptr
  float eps;
  int k;             // a multiple of 4
  bool gated;        // the row is silu(gate) * up
  double inverse_k;  // divisions take long in a kernel

  __host__ __device__ RowSource(const T* row, const float* norm, float norm_eps, int inputs,
                                bool is_gated)
      : x(row),
        norm_weight(norm),
        eps(norm_eps),
        k(inputs),
        gated(is_gated),
        inverse_k(1.0 / inputs) {}
};

/// What quantise_row() returns to every thread.
struct RowScale {
  float s;  // multiplier
  int sum;  // of the quantised values, in units of the digits
};

namespace detail {

template <typename V, typename Combine>
__device__ inline V warp_reduce(V value, Combine combine) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffU, value, offset));
  }
  return value;
}

template <int kThreads, typename V, typename Combine>
__device__ inline V block_reduce(V value, Combine combine) {
  constexpr int kWarps = kThreads / 32;
  value = warp_reduce(value, combine);
  if constexpr (kWarps == 1) return value;
  __shared__ V parts[kWarps];
  __syncthreads();  // an earlier reduction's parts have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[0];
  for (int i = 1; i < kWarps; ++i) value = combine(value, parts[i]);
  return value;
}

__device__ inline double silu(double x) { return x / (1.0 + exp(-x)); }
/// For half precision, which rounds again: a quotient without branches, by one step of Newton's
/// method. Below -87, where silu is under 1e-35, it is not followed.
__device__ inline float silu(float x) {
  const float d = 1.0F + expf(fminf(-x, 87.0F)), inverse = reciprocal_fast(d);
  const float y = x * inverse;
  return fabsf(y) < INFINITY ? fmaf(fmaf(-y, d, x), inverse, y) : y;
}

/// silu rounded to T, times up, rounded to T, as tinylm::SwiGLU.
template <typename T>
__device__ inline float gate(float gate_value, float up) {
  if constexpr (std::is_same_v<T, float>) return static_cast<float>(silu(double{gate_value})) * up;
  return rounded<T>(rounded<T>(silu(gate_value)) * up);
}

__device__ inline std::uint32_t pack4(int a, int b, int c, int d) {
  return (a & 0xff) | (b & 0xff) << 8 | (c & 0xff) << 16 | static_cast<std::uint32_t>(d) << 24;
}

__device__ inline __nv_fp8_storage_t fp8_value(float product) {
  return __nv_cvt_float_to_fp8(product, __NV_SATFINITE, __NV_E4M3);
}

/// An e4m3 value in units of 2^-9.
__device__ inline int fp8_units(__nv_fp8_storage_t q) {
  // Not-a-number has no digits; the row's multiplier carries it to the output.
  if ((q & 0x7f) == 0x7f) return 0;
  return static_cast<int>(to_float(__half(__nv_cvt_fp8_to_halfraw(q, __NV_E4M3))) * kFp8Units);
}
__device__ inline int fp8_units(float product) { return fp8_units(fp8_value(product)); }

__device__ inline int int8_value(float product) {
  return static_cast<int>(fminf(fmaxf(rintf(product), -128.0F), 127.0F));
}

}  // namespace detail

/// Quantises one row by a thread block of kThreads, or by one warp of a larger one where that
/// is 32.
/// @param row Shared memory [k], scratch.
/// @param emit Called as emit(digit, column, word) with four values of columns column .. column +
/// 3,
///     one byte each; zeros from k to k_padded.
/// @tparam kRaw Whether e4m3 values are given as they are, as digit 0.
template <int kThreads, Activation kActivation, bool kRaw = false, typename T, typename Emit>
__device__ inline RowScale quantize_row(const RowSource<T>& source, float* row, int k_padded,
                                        Emit emit) {
  const int k = source.k;
  const int thread = threadIdx.x % kThreads;
  double squares = 0.0;
  for (int i = 4 * thread; i < k; i += 4 * kThreads) {
    float4 v = load4(source.x + i);
    if (source.gated) {
      const float4 up = load4(source.x + k + i);
      v = make_float4(detail::gate<T>(v.x, up.x), detail::gate<T>(v.y, up.y),
                      detail::gate<T>(v.z, up.z), detail::gate<T>(v.w, up.w));
    }
    *reinterpret_cast<float4*>(row + i) = v;
    const double a = v.x, b = v.y, c = v.z, d = v.w;
    squares += a * a + b * b + (c * c + d * d);
  }
  float r = 1.0F;
  if (source.norm_weight != nullptr) {
    squares = detail::block_reduce<kThreads>(squares, [](double a, double b) { return a + b; });
    r = static_cast<float>(1.0 /
                           sqrt(squares * source.inverse_k + static_cast<double>(source.eps)));
  }
  // As integers, so that not-a-number, whose bits are larger than all others', is the largest.
  std::uint32_t largest = __float_as_uint(1e-5F);
  for (int i = 4 * thread; i < k; i += 4 * kThreads) {
    float4 v = *reinterpret_cast<float4*>(row + i);
    if (source.norm_weight != nullptr) {
      const float4 w = load4(source.norm_weight + i);
      v = make_float4(v.x * r * w.x, v.y * r * w.y, v.z * r * w.z, v.w * r * w.w);
      *reinterpret_cast<float4*>(row + i) = v;
    }
    largest = max(max(largest, __float_as_uint(fabsf(v.x))), __float_as_uint(fabsf(v.y)));
    largest = max(max(largest, __float_as_uint(fabsf(v.z))), __float_as_uint(fabsf(v.w)));
  }
  largest = detail::block_reduce<kThreads>(
      largest, [](std::uint32_t a, std::uint32_t b) { return max(a, b); });
  constexpr bool kInt8 = kActivation == Activation::kInt8;
  const float s = (kInt8 ? 127.0F : 448.0F) / __uint_as_float(largest);
  int sum = 0;
  for (int i = 4 * thread; i < k_padded; i += 4 * kThreads) {
    int q[4] = {};
    if (i < k) {
      const float4 v = *reinterpret_cast<float4*>(row + i);
      const float values[4] = {v.x, v.y, v.z, v.w};
      for (int j = 0; j < 4; ++j) {
        const float product = values[j] * s;
        q[j] = kInt8 ? detail::int8_value(product) : detail::fp8_units(product);
        sum += q[j];
        if (!kInt8 && kRaw) q[j] = detail::fp8_value(product);
      }
    }
    for (int digit = 0; digit < (kRaw ? 1 : num_digits(kActivation)); ++digit) {
      emit(digit, i, detail::pack4(q[0], q[1], q[2], q[3]));
      for (int j = 0; j < 4; ++j) q[j] = (q[j] - static_cast<std::int8_t>(q[j])) / 256;
    }
  }
  sum = detail::block_reduce<kThreads>(sum, [](int a, int b) { return a + b; });
  return {s, sum};
}

}  // namespace tinylm::cuda
