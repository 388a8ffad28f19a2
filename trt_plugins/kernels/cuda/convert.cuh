// Conversions between the activations' element types and float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tinylm::cuda {

// Sums and transcendental functions that a quantiser follows are carried in this type: float64 for
// float32 tensors, so that every backend quantises alike (tinylm/precision.py), else float32.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<float> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_wide(double x);
template <>
__device__ inline float from_wide<float>(double x) {
  return static_cast<float>(x);
}
template <>
__device__ inline __half from_wide<__half>(double x) {
  return __double2half(x);
}
template <>
__device__ inline __nv_bfloat16 from_wide<__nv_bfloat16>(double x) {
  return __double2bfloat16(x);
}

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

namespace detail {
__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace detail

/// x, rounded to T.
template <typename T>
__device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

/// Loads four consecutive elements as floats; p is aligned to four elements.
__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
template <typename T>
__device__ inline float4 load4(const T* p) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  T values[4];
  memcpy(values, &raw, sizeof(raw));
  return make_float4(to_float(values[0]), to_float(values[1]), to_float(values[2]),
                     to_float(values[3]));
}

/// bfloat16 are the upper halves of floats.
__device__ inline float4 load4(const __nv_bfloat16* p) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000U),
                     __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000U));
}

}  // namespace tinylm::cuda
