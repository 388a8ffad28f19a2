#include "wide_linear.h"

#include <cmath>
#include <cstring>

namespace tinylm::cpu {
namespace {

constexpr int kBits = 7;
constexpr int kRows = 8;  // the digits and one row of zeros: the kernels take eight rows best

/// Returns e such that every |x| is below 2**e, or 0 for zeros and what is not finite.
int exponent_above(const double* x, std::int64_t count) {
  double largest = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double magnitude = std::fabs(x[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  int exponent = 0;
  if (largest > 0.0 && std::isfinite(largest)) std::frexp(largest, &exponent);
  return exponent;
}

}  // namespace

void wide_linear(const PackedLinear& w, const double* x, std::int64_t first, double* out,
                 const WideScratch& scratch) {
  const std::int64_t k = w.inputs();
  const std::int64_t ldq = w.k_pad() + 64;
  // |x| < 2**e, so |x| * 2**(48 - e) < 2**48, which seven digits of -64 .. 63 hold.
  constexpr int kFraction = kBits * kWideDigits - 1 - 1;
  const int exponent = exponent_above(x, k);
  const double unit = std::ldexp(1.0, kFraction - exponent);
  std::memset(scratch.digits, 0, static_cast<std::size_t>(kRows * ldq));
  std::int32_t correction[kRows] = {};
  for (std::int64_t i = 0; i < k; ++i) {
    const double scaled = std::rint(x[i] * unit);
    std::int64_t rest = std::isfinite(scaled) ? static_cast<std::int64_t>(scaled) : 0;
    for (int d = 0; d < kWideDigits; ++d) {
      const std::int64_t digit = ((rest + 64) & 127) - 64;
      rest = (rest - digit) >> kBits;
      scratch.digits[d * ldq + i] = static_cast<std::int8_t>(digit);
      correction[d] += static_cast<std::int32_t>(digit);
    }
  }
  DotParams p;
  p.first_block = first / kBlockRows;
  p.last_block = w.num_blocks();
  p.q = scratch.digits;
  p.ldq = ldq;
  p.m = kRows;
  Sink sink;
  sink.correction = correction;
  sink.outputs = w.outputs();
  sink.sums = scratch.sums;
  sink.first_column = p.first_block * kBlockRows;
  sink.ld = w.num_blocks() * kBlockRows;
  w.dot(p, sink);
  const double back = std::ldexp(1.0, exponent - kFraction);
  for (std::int64_t j = first; j < w.outputs(); ++j) {
    std::int64_t total = 0;
    for (int d = kWideDigits - 1; d >= 0; --d) {
      total = total * 128 + scratch.sums[d * sink.ld + j - sink.first_column];
    }
    out[j - first] = static_cast<double>(total) * back;
  }
}

}  // namespace tinylm::cpu
