/// @file wide_linear.h
/// Ternary weights times a float64 vector, through the integer kernels.
///
/// The vector is written in fixed point, 47 bits below its largest magnitude, as seven digits to
/// base 128. Each digit is an int8 row for the integer product, whose sums are exact; put together
/// they are the exact product of the fixed point vector. That is as good as float64 sums, the same
/// on every machine, and several times faster.
#pragma once

#include <cstdint>

#include "packed_linear.h"

namespace tinylm::cpu {

/// Fixed point numbers for a vector.
struct FixedPoint {
  double steps;  ///< steps of a unit: x * steps is below 2**47
  double unit;   ///< 1 / steps
};

/// The fixed point for vectors whose largest magnitude is this; NaN gives a unit of NaN.
FixedPoint fixed_point(double largest);

/// Scratch that wide_linear() needs.
struct WideScratch {
  std::int8_t* digits = nullptr;  ///< [32, k_pad + 64]
  std::int32_t* sums = nullptr;   ///< [8, columns of the blocks taken]
};

/// Bytes of WideScratch::digits and number of WideScratch::sums.
inline std::int64_t wide_digit_bytes(const PackedLinear& w) { return 32 * (w.k_pad() + 64); }
inline std::int64_t wide_num_sums(const PackedLinear& w) {
  return 8 * w.num_blocks() * kBlockRows + 8;
}

/// out[j] = sum over i of x[i] * code[first + j, i], without the weights' scale.
/// @param x [w.inputs()].
/// @param out [w.outputs() - first].
void wide_linear(const PackedLinear& w, const double* x, std::int64_t first, double* out,
                 const WideScratch& scratch);

}  // namespace tinylm::cpu
