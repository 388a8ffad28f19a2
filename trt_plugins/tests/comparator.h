/// @file comparator.h
/// Counts how values differ, so that a test can bound a share and a worst case.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <ostream>

#include "float_tensor.h"

namespace tinylm::testing {

/// Whether two values are equal; every NaN equals every other, and 0 equals -0.
inline bool equal(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

/// What is left in float64 where terms of magnitude 100 cancel: no difference
/// (tests/tolerances.py).
inline constexpr double kCancelled = 1e-12;

/// Differences over any number of values.
struct Differences {
  std::int64_t total = 0;
  std::int64_t different = 0;
  double worst = 0.0;  ///< largest difference, in the unit that the caller passes

  /// @param unit What the difference is measured in, such as one step of the format.
  void add(double found, double expected, double unit) {
    ++total;
    if (equal(found, expected)) return;
    ++different;
    const double size = std::fabs(found - expected) / unit;
    worst = std::isnan(size) ? INFINITY : std::max(worst, size);
  }
  /// Counts sums that were carried in float64 and rounded once; worst is relative.
  /// @param magnitude Of the sums' terms.
  void add_rounded_sum(double found, double expected, double magnitude = 100.0) {
    const bool same = std::fabs(found - expected) <= kCancelled * magnitude;
    add(same ? expected : found, expected, std::fabs(expected));
  }
  /// Whether at most `share` of the values differ, one in any case, by at most `limit` units.
  ::testing::AssertionResult within(double share, double limit) const {
    const double allowed = std::ceil(share * static_cast<double>(total));
    if (static_cast<double>(different) <= allowed && worst <= limit) {
      return ::testing::AssertionSuccess();
    }
    return ::testing::AssertionFailure()
           << different << " of " << total << " values differ, " << allowed << " may; the worst by "
           << worst << " units, limit " << limit;
  }
};

/// Compares tensors value by value and names the first that differs.
inline ::testing::AssertionResult tensors_equal(const reference::FloatTensor& found,
                                                const reference::FloatTensor& expected,
                                                std::int64_t width) {
  for (std::int64_t i = 0; i < expected.size(); ++i) {
    if (equal(found.get(i), expected.get(i))) continue;
    return ::testing::AssertionFailure()
           << "row " << i / width << ", column " << i % width << ": found " << found.get(i)
           << ", expected " << expected.get(i);
  }
  return ::testing::AssertionSuccess();
}

}  // namespace tinylm::testing
