// What becomes of wgmma's sums, a warp's 16 outputs of some rows: scaled as in epilogue.cuh, turned
// through shared memory where two bytes an output allow 16-byte stores.
#pragma once

#include "async_copy.cuh"
#include "epilogue.cuh"
#include "wgmma.cuh"

namespace tinylm::cuda {

/// A row's factors, read by every warp.
struct __align__(16) RowFactors {
  float s, inverse;
  float rest;  // 1 / s - inverse
  int bias;    // the bits of kFloatBias less the row's sum
};
inline constexpr float kFloatBias = 12582912.0F;  // 1.5 * 2^23, whose last bit is worth 1
inline constexpr int kFloatBiasBits = 0x4b400000;

#ifdef TINYLM_HOPPER

namespace detail {

__device__ inline RowFactors row_factors(float s, int row_sum) {
  const float inverse = 1.0F / s;
  return {s, inverse, fmaf(-inverse, s, 1.0F) * inverse, kFloatBiasBits - row_sum};
}

template <Activation kActivation>
using WgmmaSum = std::conditional_t<kActivation == Activation::kInt8, int, float>;

template <Activation kActivation, typename T>
__device__ inline float wgmma_value(WgmmaSum<kActivation> acc, RowFactors row, float weight_scale) {
  float sum;
  if constexpr (kActivation == Activation::kInt8) {
    // Exact below 2^22 = 128 * 32768, and faster than a conversion.
    sum = __int_as_float(acc + row.bias) - kFloatBias;
  } else {
    sum = acc * 0.5F;  // of codes as -2, 0, 2
  }
  const float x = sum * weight_scale;
  if constexpr (std::is_same_v<T, float>) return x / row.s;
  return fmaf(x, row.inverse, x * row.rest);
}

/// Four 8 x 8 matrices of two-byte values, transposed; lane 8 i + r has the address of row r of i.
__device__ inline void store_matrices(std::uint32_t address, const std::uint32_t (&packed)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
               : "memory");
}

/// Stores eight neighbouring outputs of one row, those that exist.
template <typename Y>
__device__ inline void store_eight(uint4 loaded, std::int64_t row, int column, std::int64_t m,
                                   const Output<Y>& out) {
  if (row >= m || column >= out.n) return;
  Y values[8];
  memcpy(values, &loaded, 16);
  const std::int64_t to = row * out.n + column;
  const bool whole = out.n % 8 == 0;
  if (out.residual != nullptr) {
    Y residual[8];
    if (whole) memcpy(residual, __builtin_assume_aligned(out.residual + to, 16), 16);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!whole) residual[i] = column + i < out.n ? out.residual[to + i] : values[i];
      values[i] = from_float<Y>(to_float(residual[i]) + to_float(values[i]));
    }
  }
  if (whole) {
    memcpy(&loaded, values, 16);
    *reinterpret_cast<uint4*>(out.y + to) = loaded;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < out.n) out.y[to + i] = values[i];
    }
  }
}

/// Stores 16 * kChunks rows of a warp's 16 outputs. acc[4 j + i]: register i of rows 8 j ...
/// @param transpose Shared memory [kChunks][32].
template <int kChunks, Activation kActivation, typename Y>
__device__ inline void store_rows(const WgmmaSum<kActivation> (&acc)[8 * kChunks],
                                  const RowFactors* factors, const float (&weight_scale)[2],
                                  std::int64_t row, int column, std::int64_t m,
                                  const Output<Y>& out, uint4 (*transpose)[32]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(Y) == 2) {
    std::uint32_t packed[kChunks][4];
#pragma unroll
    for (int j = 0; j < 2 * kChunks; ++j) {
      const RowFactors rows[2] = {factors[8 * j + 2 * t], factors[8 * j + 2 * t + 1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Y values[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          values[i] = from_float<Y>(
              wgmma_value<kActivation, Y>(acc[4 * j + 2 * half + i], rows[i], weight_scale[half]));
        }
        memcpy(&packed[j / 2][2 * (j % 2) + half], values, 4);
      }
    }
    // Matrix 2 j + half goes to rows 8 j ... and outputs 8 half ... of [16 rows][16 outputs].
    const int matrix = lane / 8, in_matrix = lane % 8;
    const int to = (8 * (matrix / 2) + in_matrix) * 2 + matrix % 2;
    __syncwarp();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      store_matrices(shared_address(&transpose[chunk][to]), packed[chunk]);
    }
    __syncwarp();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      store_eight(transpose[chunk][lane], row + 16 * chunk + lane / 2, column + 8 * (lane % 2), m,
                  out);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 2 * kChunks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int in_rows = 8 * j + 2 * t + i % 2, my_column = column + g + i / 2 * 8;
        if (row + in_rows >= m || my_column >= out.n) continue;
        const std::int64_t to = (row + in_rows) * out.n + my_column;
        if constexpr (std::is_same_v<Y, std::int32_t>) {
          out.y[to] = acc[4 * j + i] + factors[in_rows].bias - kFloatBiasBits;
        } else {
          const float value =
              wgmma_value<kActivation, Y>(acc[4 * j + i], factors[in_rows], weight_scale[i / 2]);
          out.y[to] = out.residual == nullptr ? value : out.residual[to] + value;
        }
      }
    }
  }
}

}  // namespace detail

#endif  // TINYLM_HOPPER

}  // namespace tinylm::cuda
