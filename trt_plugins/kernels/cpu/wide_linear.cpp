#include "wide_linear.h"

#include <cmath>
#include <cstring>

namespace tinylm::cpu {
namespace {

constexpr int kBits = 7;
constexpr int kRows = 8;  // the digits and one row of zeros: the kernels take eight rows best

}  // namespace

void wide_linear(const PackedLinear& w, const double* x, std::int64_t first, double* out,
                 const WideScratch& scratch) {
  const std::int64_t k = w.inputs();
  const std::int64_t ldq = w.k_pad() + 64;
  // |x| < 2**e, so |x| * 2**(47 - e) < 2**47; seven digits of -64 .. 63 hold 0.99 * 2**48.
  constexpr int kFraction = kBits * kWideDigits - 2;
  const KernelTable& kernels = w.kernels();
  const double largest = kernels.largest_magnitude(x, k);
  int exponent = 0;
  if (largest > 0.0 && std::isfinite(largest)) std::frexp(largest, &exponent);
  std::memset(scratch.digits, 0, static_cast<std::size_t>(kRows * ldq));
  std::int32_t correction[kRows] = {};
  kernels.to_digits(x, k, std::ldexp(1.0, kFraction - exponent), scratch.digits, ldq, correction);
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
                      std::ldexp(1.0, exponent - kFraction), out);
}

}  // namespace tinylm::cpu
