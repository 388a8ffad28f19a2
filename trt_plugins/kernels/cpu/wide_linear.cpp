#include "wide_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace tinylm::cpu {
namespace {

constexpr int kRows = 8;  // the digits and one row of zeros: the kernels take eight rows best

}  // namespace

FixedPoint fixed_point(double largest) {
  // Seven digits of -64 .. 63 hold 0.99 * 2**48.
  constexpr int kFraction = 7 * kWideDigits - 2;
  if (!std::isfinite(largest)) return {0.0, std::numeric_limits<double>::quiet_NaN()};
  int exponent = 0;
  std::frexp(largest, &exponent);
  exponent = std::max(exponent, -900);  // so that both powers of two are finite
  return {std::ldexp(1.0, kFraction - exponent), std::ldexp(1.0, exponent - kFraction)};
}

void wide_linear(const PackedLinear& w, const double* x, std::int64_t first, double* out,
                 const WideScratch& scratch) {
  const std::int64_t k = w.inputs();
  const std::int64_t ldq = w.k_pad() + 64;
  const KernelTable& kernels = w.kernels();
  const FixedPoint point = fixed_point(kernels.largest_magnitude(x, k));
  std::memset(scratch.digits, 0, static_cast<std::size_t>(kRows * ldq));
  std::int32_t correction[kRows] = {};
  kernels.to_digits(x, k, point.steps, scratch.digits, ldq, correction);
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
  kernels.from_digits(scratch.sums + first - sink.first_column, sink.ld, w.outputs() - first,
                      point.unit, out);
}

}  // namespace tinylm::cpu
