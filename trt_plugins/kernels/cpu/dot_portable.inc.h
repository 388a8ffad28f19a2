// Integer products in plain C++.
#pragma once

#include "kernel_table.h"
#include "sink.inc.h"

namespace tinylm::cpu {
namespace {

/// Adds 16 rows x 4 inputs to the sums of one activation row.
TINYLM_INLINE i32x16 add_products(i32x16 total, const int32_t* weights, const int8_t* x) {
  for (int row = 0; row < 16; ++row) {
    const int32_t* w = weights + 4 * row;
    total[row] += w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
  }
  return total;
}

constexpr int kPortableRows = 4;

template <bool kTernary>
TINYLM_INLINE void dot(const DotParams& p, const Sink& sink) {
  const int64_t lanes = kTernary ? 4 : 1;
  const int64_t groups = p.k_pad / (4 * lanes);
  for (int64_t block = p.first_block; block < p.last_block; ++block) {
    const uint8_t* base = p.weights + block * groups * kGroupBytes;
    for (int64_t row = 0; row < p.m; row += kPortableRows) {
      const int64_t rows = p.m - row < kPortableRows ? p.m - row : kPortableRows;
      i32x16 total[kPortableRows] = {};
      for (int64_t group = 0; group < groups; ++group) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
          int32_t weights[kGroupBytes];
          for (int i = 0; i < kGroupBytes; ++i) {
            const int32_t byte = base[group * kGroupBytes + i];
            weights[i] = kTernary ? byte >> (2 * lane) & 3 : byte;
          }
          const int8_t* x = p.q + row * p.ldq + 4 * (lanes * group + lane);
          for (int64_t r = 0; r < rows; ++r) {
            total[r] = add_products(total[r], weights, x + r * p.ldq);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) emit(sink, row + r, block, total[r]);
    }
  }
}

void dot_ternary(const DotParams& p, const Sink& sink) { dot<true>(p, sink); }
void dot_int8(const DotParams& p, const Sink& sink) { dot<false>(p, sink); }

}  // namespace
}  // namespace tinylm::cpu
