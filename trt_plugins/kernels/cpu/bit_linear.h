/// @file bit_linear.h
/// tinylm::BitLinear and tinylm::Int8Linear on the CPU: RMSNorm, absmax, quantise, exact integer
/// product, scale, in one call.
///
/// Numerics: tinylm/quantization.py and tinylm/norm.py; the mean square is summed in float64 and
/// the factor rounded to float32 once (tinylm/precision.py).
#pragma once

#include <cstdint>
#include <memory>

#include "float_type.h"
#include "parallel.h"

namespace tinylm::cpu {

/// Number format of the activations.
enum class Activation { kInt8, kFp8E4m3 };

/// Where packed weights hold a code of 3; found is false where they don't.
struct InvalidCode {
  bool found = false;
  std::int64_t row = 0;
  std::int64_t column = 0;
};

/// Looks for a code of 3 in 2-bit weights [rows, columns / 4].
InvalidCode find_invalid_code(const std::uint8_t* packed, std::int64_t rows, std::int64_t columns);

/// Weights of one linear layer, re-packed for the active instruction set. Immutable, so that any
/// number of threads may share it.
class LinearWeights {
 public:
  /// Re-packs 2-bit codes.
  /// @param packed uint8 [n, k / 4], code + 1 in two bits, first code in the low bits.
  /// @param scale float32 [n], scale of each row; copied.
  /// @param n Outputs, at least 1.
  /// @param k Inputs, a positive multiple of 4, at most kMaxInputs.
  /// @throws std::invalid_argument A size is out of range, or a code is 3 (names row and column).
  static std::unique_ptr<LinearWeights> pack_ternary(const std::uint8_t* packed, const float* scale,
                                                     std::int64_t n, std::int64_t k);

  /// Re-packs int8 weights.
  /// @param weight int8 [n, k], -127 .. 127.
  /// @param scale float32 [n]; copied.
  /// @throws std::invalid_argument A size is out of range, or a weight is -128.
  static std::unique_ptr<LinearWeights> pack_int8(const std::int8_t* weight, const float* scale,
                                                  std::int64_t n, std::int64_t k);

  virtual ~LinearWeights() = default;
  virtual std::int64_t outputs() const = 0;
  virtual std::int64_t inputs() const = 0;
  /// Bytes held, scales included.
  virtual std::int64_t num_bytes() const = 0;
};

/// Largest K: int32 holds every sum of 127 * 127 * kMaxInputs (and 256 * 127 * kMaxInputs).
inline constexpr std::int64_t kMaxInputs = 1 << 16;

/// Arguments of linear().
struct LinearParams {
  const void* x = nullptr;             ///< [m, k] of `type`
  void* y = nullptr;                   ///< [m, n] of `type`
  FloatType type = FloatType::kFloat;  ///< of x and y
  std::int64_t m = 0;                  ///< rows, 0 allowed
  const float* norm_weight = nullptr;  ///< [k], or nullptr for no norm
  float eps = 1e-5F;                   ///< added to the mean square
  Activation activation = Activation::kInt8;
};

/// y = (q . weight) * scale / s with q, s = quantise(rms_norm(x)). No allocation once the calling
/// thread has seen the size.
void linear(const LinearWeights& weights, const LinearParams& params, const Parallel& parallel);

/// The exact integer sums alone, for tests and as the GPU kernels' reference.
/// @param q int8 [m, k].
/// @param sums int32 [m, n].
void accumulate_int8(const LinearWeights& weights, const std::int8_t* q, std::int64_t m,
                     std::int32_t* sums, const Parallel& parallel);

/// The quantiser alone: int8 activations and their multipliers, for tests.
/// @param q int8 [m, k].
/// @param s float32 [m].
void quantize_int8(const LinearParams& params, std::int64_t k, std::int8_t* q, float* s);

}  // namespace tinylm::cpu
