/// @file linear_helpers.h
/// Calls of the linear kernels with the tests' containers.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "bit_linear.h"
#include "reference.h"

namespace tinylm::testing {

inline std::unique_ptr<cpu::LinearWeights> pack_ternary(const std::vector<std::int8_t>& codes,
                                                        const std::vector<float>& scale,
                                                        std::int64_t n, std::int64_t k) {
  return cpu::LinearWeights::pack_ternary(reference::pack(codes).data(), scale.data(), n, k);
}

inline cpu::LinearParams params_of(const reference::LinearCase& c) {
  cpu::LinearParams params;
  params.x = c.x.data();
  params.type = c.x.type();
  params.m = c.m;
  params.norm_weight = c.norm();
  params.eps = c.eps;
  params.activation = c.activation;
  return params;
}

/// linear() of a case. y starts as NaN, so that what is not written shows.
inline reference::FloatTensor run_linear(const cpu::LinearWeights& weights,
                                         const reference::LinearCase& c,
                                         const cpu::Parallel& parallel = {}) {
  reference::FloatTensor y(c.x.type(), c.m * c.n);
  for (std::int64_t i = 0; i < y.size(); ++i) y.set(i, std::nanf(""));
  cpu::LinearParams params = params_of(c);
  params.y = y.data();
  cpu::linear(weights, params, parallel);
  return y;
}

inline std::vector<std::int32_t> run_accumulate(const cpu::LinearWeights& weights,
                                                const std::vector<std::int8_t>& q, std::int64_t m,
                                                const cpu::Parallel& parallel = {}) {
  std::vector<std::int32_t> sums(static_cast<std::size_t>(m * weights.outputs()),
                                 std::numeric_limits<std::int32_t>::min());
  cpu::accumulate_int8(weights, q.data(), m, sums.data(), parallel);
  return sums;
}

}  // namespace tinylm::testing
