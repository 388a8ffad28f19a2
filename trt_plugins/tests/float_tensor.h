/// @file float_tensor.h
/// Tensors of float32, float16 or bfloat16, with conversions written for clearness, not speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "float_type.h"

namespace tinylm::reference {

/// A binary floating point format.
struct Format {
  int mantissa_bits;  ///< without the leading one
  int min_exponent;   ///< of normal numbers
  double max;         ///< largest finite value
};
inline constexpr Format kHalf{10, -14, 65504.0};
inline constexpr Format kBFloat16{7, -126, 3.3895313892515355e38};
inline constexpr Format kE4m3{3, -6, 448.0};

/// Distance between neighbours of the format at v.
inline double step_at(double v, const Format& format) {
  const int exponent = v == 0.0 ? format.min_exponent : std::ilogb(v);
  return std::ldexp(1.0, std::max(exponent, format.min_exponent) - format.mantissa_bits);
}

/// Rounds a finite v half to even to the format, without a limit at the top.
inline double round_to(double v, const Format& format) {
  const double step = step_at(v, format);
  return std::nearbyint(v / step) * step;
}

/// Rounds half to even to 16 bits; what is too large becomes infinite, as IEEE 754 says.
inline std::uint16_t to_bits(float value, const Format& format) {
  const unsigned sign = std::signbit(value) ? 0x8000U : 0U;
  const unsigned infinity = 0x7FFFU & ~((1U << format.mantissa_bits) - 1U);
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | (infinity + 1U));
  const double v = std::isinf(value) ? value : round_to(value, format);
  const double magnitude = std::fabs(v);
  if (magnitude > format.max) return static_cast<std::uint16_t>(sign | infinity);
  // Counted in steps, the format's numbers are consecutive within a binade and the next begins
  // where one ends.
  const int exponent =
      magnitude == 0.0 ? format.min_exponent : std::max(std::ilogb(magnitude), format.min_exponent);
  const auto steps = static_cast<unsigned>(magnitude / step_at(magnitude, format));
  const auto binades = static_cast<unsigned>(exponent - format.min_exponent);
  return static_cast<std::uint16_t>(sign | (steps + (binades << format.mantissa_bits)));
}

/// The value of 16 bits; exact.
inline float from_bits(std::uint16_t bits, const Format& format) {
  const unsigned magnitude = bits & 0x7FFFU;
  const unsigned mantissa = magnitude & ((1U << format.mantissa_bits) - 1U);
  const unsigned field = magnitude >> format.mantissa_bits;
  const unsigned top = 0x7FFFU >> format.mantissa_bits;
  double v = 0.0;
  if (field == top) {
    v = mantissa == 0 ? std::numeric_limits<double>::infinity()
                      : std::numeric_limits<double>::quiet_NaN();
  } else {
    const unsigned leading = field == 0 ? 0U : 1U << format.mantissa_bits;
    const int exponent = format.min_exponent + std::max(static_cast<int>(field), 1) - 1;
    v = std::ldexp(static_cast<double>(leading + mantissa), exponent - format.mantissa_bits);
  }
  return static_cast<float>((bits & 0x8000U) != 0 ? -v : v);
}

/// The 16-bit format behind a FloatType.
inline const Format& format_of(cpu::FloatType type) {
  return type == cpu::FloatType::kFloat16 ? kHalf : kBFloat16;
}

/// A flat tensor of one floating point type.
class FloatTensor {
 public:
  FloatTensor() = default;
  FloatTensor(cpu::FloatType type, std::int64_t count)
      : type_(type), bytes_(static_cast<std::size_t>(count * cpu::float_size(type))) {}

  cpu::FloatType type() const { return type_; }
  std::int64_t size() const {
    return static_cast<std::int64_t>(bytes_.size()) / cpu::float_size(type_);
  }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }

  float get(std::int64_t i) const {
    if (type_ == cpu::FloatType::kFloat) return read<float>(i);
    return from_bits(read<std::uint16_t>(i), format_of(type_));
  }
  /// Rounds to the tensor's type; PyTorch turns float64 into 16 bits by way of float32 too.
  void set(std::int64_t i, float value) {
    if (type_ == cpu::FloatType::kFloat) {
      write(i, value);
    } else {
      write(i, to_bits(value, format_of(type_)));
    }
  }
  void set(std::int64_t i, double value) { set(i, static_cast<float>(value)); }
  /// Whether element i holds the same bits as the other tensor's.
  bool same_bits(const FloatTensor& other, std::int64_t i) const {
    const auto width = static_cast<std::size_t>(cpu::float_size(type_));
    const std::size_t at = static_cast<std::size_t>(i) * width;
    return std::memcmp(&bytes_[at], &other.bytes_[at], width) == 0;
  }
  bool operator==(const FloatTensor& other) const {
    return type_ == other.type_ && bytes_ == other.bytes_;
  }

 private:
  template <typename T>
  T read(std::int64_t i) const {
    T value;
    std::memcpy(&value, &bytes_[static_cast<std::size_t>(i) * sizeof(T)], sizeof(T));
    return value;
  }
  template <typename T>
  void write(std::int64_t i, T value) {
    std::memcpy(&bytes_[static_cast<std::size_t>(i) * sizeof(T)], &value, sizeof(T));
  }

  cpu::FloatType type_ = cpu::FloatType::kFloat;
  std::vector<std::uint8_t> bytes_;
};

}  // namespace tinylm::reference
