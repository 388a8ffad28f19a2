/// @file product_plan.h
/// How a product of many rows is cut on Hopper: plain arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace tinylm::cuda {

/// One thread block computes a tile of outputs x rows over a part of K. The k_parts * sharers
/// thread blocks of a cluster are neighbours: parts of one tile, and tiles that share their rows.
struct ProductPlan {
  int fragments = 1;  ///< 64 outputs each, for both of the two warpgroups
  int rows = 128;     ///< of a tile
  int k_parts = 1;    ///< thread blocks that share a tile's K
  int sharers = 1;    ///< tiles of outputs whose activations are copied once for all

  int outputs() const { return 128 * fragments; }
  int cluster() const { return k_parts * sharers; }
};

inline bool operator==(const ProductPlan& a, const ProductPlan& b) {
  return a.fragments == b.fragments && a.rows == b.rows && a.k_parts == b.k_parts &&
         a.sharers == b.sharers;
}

/// The tiles that there are kernels for: fragments, rows.
inline constexpr int kPlanTiles[][2] = {{1, 64}, {1, 128}, {1, 256}, {2, 64}, {2, 128}};
/// Most thread blocks of a cluster.
inline constexpr int kMaxCluster = 8;

/// Whether there is a kernel for it, and each part of K has inputs.
inline bool valid_plan(const ProductPlan& plan, std::int64_t k) {
  const bool exists = std::any_of(std::begin(kPlanTiles), std::end(kPlanTiles), [&](auto& tile) {
    return tile[0] == plan.fragments && tile[1] == plan.rows;
  });
  return exists && plan.k_parts >= 1 && plan.sharers >= 1 && plan.cluster() <= kMaxCluster &&
         plan.k_parts <= (k + 127) / 128;
}

namespace detail {

/// Estimated cycles of a product: see README.md. Constants were measured on an H100.
inline double plan_cycles(const ProductPlan& plan, std::int64_t m, std::int64_t n, std::int64_t k,
                          int num_sms) {
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  // Whole clusters fit into a group of 16 or 18 multiprocessors.
  const int at_once = num_sms / plan.cluster() - (plan.cluster() > 2 ? 1 : 0);
  const std::int64_t groups =
      ceil_div(m, plan.rows) * ceil_div(ceil_div(n, plan.outputs()), plan.sharers);
  const std::int64_t waves = ceil_div(groups, std::max(1, at_once));
  const double busy = static_cast<double>(std::min<std::int64_t>(groups, at_once)) * plan.cluster();
  const double blocks = static_cast<double>(ceil_div(ceil_div(k, 128), plan.k_parts));
  // A block of 128 inputs: tensor cores, the way from L2 into one multiprocessor, and L2's own.
  const double products = 4.0 * plan.outputs() / 64 * plan.rows / 2;
  const double activations = plan.rows * 128.0, weights = plan.outputs() * 32.0;
  const double arriving = (activations + weights) / 48;
  const double read = (activations / plan.sharers + weights) * busy / 2700;
  const double block = std::max({products * 1.1, arriving, read});
  const double finish = 600 + plan.outputs() * plan.rows / 16.0 + (plan.k_parts > 1 ? 1500 : 0) +
                        (plan.sharers > 1 ? 200 : 0);
  return static_cast<double>(waves) * (blocks * block + finish) + 1000;
}

}  // namespace detail

/// The plan for m rows, n outputs and k inputs on a GPU of num_sms multiprocessors.
inline ProductPlan plan_product(std::int64_t m, std::int64_t n, std::int64_t k, int num_sms) {
  ProductPlan best;
  double least = 0.0;
  for (const auto& tile : kPlanTiles) {
    for (int k_parts = 1; k_parts <= kMaxCluster; k_parts *= 2) {
      for (int sharers = 1; k_parts * sharers <= kMaxCluster; sharers *= 2) {
        const ProductPlan plan{tile[0], tile[1], k_parts, sharers};
        if (!valid_plan(plan, k)) continue;
        // Parts of K are not worked on in turns: their tiles must fit at once.
        const std::int64_t tiles =
            (m + plan.rows - 1) / plan.rows * ((n + plan.outputs() - 1) / plan.outputs());
        if (k_parts > 1 && tiles * k_parts > num_sms) continue;
        if (sharers > 1 && n <= static_cast<std::int64_t>(plan.outputs()) * (sharers / 2)) continue;
        const double cycles = detail::plan_cycles(plan, m, n, k, num_sms);
        if (least == 0.0 || cycles < least) {
          least = cycles;
          best = plan;
        }
      }
    }
  }
  return best;
}

}  // namespace tinylm::cuda
