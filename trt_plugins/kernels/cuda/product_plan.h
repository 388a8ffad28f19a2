/// @file product_plan.h
/// How a product of many rows is cut on Hopper: plain arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace tinylm::cuda {

/// One thread block computes a tile of outputs x rows over a part of K; those of a cluster have the
/// parts of one tile.
struct ProductPlan {
  int fragments = 1;  ///< 64 outputs each, for both of the two warpgroups
  int rows = 128;     ///< of a tile
  int k_parts = 1;    ///< thread blocks that share a tile's K

  int outputs() const { return 128 * fragments; }
};

inline bool operator==(const ProductPlan& a, const ProductPlan& b) {
  return a.fragments == b.fragments && a.rows == b.rows && a.k_parts == b.k_parts;
}

/// The tiles that there are kernels for: fragments, rows.
inline constexpr int kPlanTiles[][2] = {{1, 64}, {1, 128}, {1, 256}, {2, 64}, {2, 128}};
/// Most thread blocks of a cluster.
inline constexpr int kMaxParts = 8;

/// Whether there is a kernel for it, and each part of K has inputs.
inline bool valid_plan(const ProductPlan& plan, std::int64_t k) {
  const bool exists = std::any_of(std::begin(kPlanTiles), std::end(kPlanTiles), [&](auto& tile) {
    return tile[0] == plan.fragments && tile[1] == plan.rows;
  });
  return exists && plan.k_parts >= 1 && plan.k_parts <= kMaxParts &&
         plan.k_parts <= (k + 127) / 128;
}

namespace detail {

/// Estimated cycles of a product: see README.md. Constants were measured on an H100.
inline double plan_cycles(const ProductPlan& plan, std::int64_t m, std::int64_t n, std::int64_t k,
                          int num_sms) {
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t tiles = ceil_div(m, plan.rows) * ceil_div(n, plan.outputs());
  const double waves = static_cast<double>(ceil_div(tiles * plan.k_parts, num_sms));
  const double blocks = static_cast<double>(ceil_div(ceil_div(k, 128), plan.k_parts));
  // A block of 128 inputs: tensor cores, and the way from L2 into one multiprocessor.
  const double products = 8.0 * plan.fragments * plan.rows / 2;
  const double arriving = (plan.rows * 128.0 + plan.outputs() * 32.0) / 40;
  const double finish = 500 + plan.outputs() * plan.rows / 16.0 + (plan.k_parts > 1 ? 1500 : 0);
  return waves * (blocks * std::max({products, arriving, 250.0}) + finish);
}

}  // namespace detail

/// The plan for m rows, n outputs and k inputs on a GPU of num_sms multiprocessors.
inline ProductPlan plan_product(std::int64_t m, std::int64_t n, std::int64_t k, int num_sms) {
  ProductPlan best;
  double least = 0.0;
  for (const auto& tile : kPlanTiles) {
    for (int k_parts = 1; k_parts <= kMaxParts; k_parts *= 2) {
      const ProductPlan plan{tile[0], tile[1], k_parts};
      if (!valid_plan(plan, k)) continue;
      const double cycles = detail::plan_cycles(plan, m, n, k, num_sms);
      if (least == 0.0 || cycles < least) {
        least = cycles;
        best = plan;
      }
    }
  }
  return best;
}

}  // namespace tinylm::cuda
