/// @file product_plan.h
/// How a product of many rows is cut on Hopper: plain arithmetic, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace tinylm::cuda {

/// What a warpgroup multiplies.
enum class Tiling : int {
  kThin,   ///< 64 outputs of a tile of 128, ternary_wgmma.cuh
  kWide,   ///< 128 outputs of a tile of 256, 128 rows, ternary_square.cuh
  kTurns,  ///< tiles of its own of 128 outputs, 128 rows, ternary_square.cuh
};

/// One thread block computes a tile of outputs x rows over a part of K; those of a cluster have the
/// parts of one tile.
struct ProductPlan {
  int rows = 128;   ///< of a tile
  int k_parts = 1;  ///< thread blocks that share a tile's K
  Tiling tiling = Tiling::kThin;
};

inline bool operator==(const ProductPlan& a, const ProductPlan& b) {
  return a.rows == b.rows && a.k_parts == b.k_parts && a.tiling == b.tiling;
}

/// Outputs of a tile.
inline constexpr int kPlanOutputs = 128;
/// Rows of the thin tiles that there are kernels for.
inline constexpr int kPlanRows[] = {64, 128, 256};
/// Most thread blocks of a cluster.
inline constexpr int kMaxParts = 4;

/// Whether there is a kernel for it, and each part of K has inputs.
inline bool valid_plan(const ProductPlan& plan, std::int64_t k) {
  const bool exists =
      std::find(std::begin(kPlanRows), std::end(kPlanRows), plan.rows) != std::end(kPlanRows);
  if (plan.tiling != Tiling::kThin) return plan.rows == 128 && plan.k_parts == 1;
  return exists && plan.k_parts >= 1 && plan.k_parts <= kMaxParts &&
         plan.k_parts <= (k + 127) / 128;
}

namespace detail {

/// Microseconds of an H100 for a block of 128 inputs, and for the rest of a tile: fitted to 95
/// measured products of 26 shapes, which they give within 7% (root mean square).
inline constexpr double kThinBlockMicros[] = {0.32, 0.36, 0.67};  // in the order of kPlanRows
inline constexpr double kThinFinishMicros = 3.0;                  // 128 x 128 outputs
inline constexpr double kJoinMicros = 1.6;                        // parts of K
inline constexpr double kWideBlockMicros = 0.62, kWideFinishMicros = 1.9;
inline constexpr double kTurnsBlockMicros = 0.35, kTurnsFinishMicros = 1.0;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// How often all multiprocessors work on a tile.
inline std::int64_t num_waves(const ProductPlan& plan, std::int64_t m, std::int64_t n,
                              int num_sms) {
  // Large clusters don't fill the groups of 16 or 18 multiprocessors.
  const int usable = plan.k_parts > 2 ? std::max(plan.k_parts, num_sms - 16) : num_sms;
  return ceil_div(ceil_div(m, plan.rows) * ceil_div(n, kPlanOutputs) * plan.k_parts, usable);
}

/// Estimated microseconds of a product, but for what all plans have in common.
inline double plan_micros(const ProductPlan& plan, double block_micros, std::int64_t m,
                          std::int64_t n, std::int64_t k, int num_sms) {
  const auto waves = static_cast<double>(num_waves(plan, m, n, num_sms));
  const auto blocks = static_cast<double>(ceil_div(ceil_div(k, 128), plan.k_parts));
  const double finish = kThinFinishMicros * plan.rows / 128;
  return waves * (blocks * block_micros + finish + (plan.k_parts > 1 ? kJoinMicros : 0.0));
}

/// The same for warpgroups of 128 outputs x 128 rows.
inline double square_micros(Tiling tiling, std::int64_t m, std::int64_t n, std::int64_t k,
                            int num_sms) {
  const auto blocks = static_cast<double>(ceil_div(k, 128));
  const bool turns = tiling == Tiling::kTurns;
  const std::int64_t tiles = ceil_div(m, 128) * ceil_div(n, turns ? 128 : 256);
  const auto waves = static_cast<double>(ceil_div(tiles, num_sms));
  if (!turns) return waves * (blocks * kWideBlockMicros + kWideFinishMicros);
  // One warpgroup multiplies while the other finishes.
  const double multiply = blocks * kTurnsBlockMicros, alone = multiply + kTurnsFinishMicros;
  return (waves - 1) * std::max(multiply, alone / 2) + alone;
}

}  // namespace detail

/// The plan for m rows, n outputs and k inputs on a GPU of num_sms multiprocessors.
inline ProductPlan plan_product(std::int64_t m, std::int64_t n, std::int64_t k, int num_sms) {
  ProductPlan best;
  double least = 0.0;
  const double* block_micros = detail::kThinBlockMicros;
  for (const int rows : kPlanRows) {
    for (int k_parts = 1; k_parts <= kMaxParts; k_parts *= 2) {
      const ProductPlan plan{rows, k_parts};
      if (!valid_plan(plan, k)) continue;
      // Parts of K are not worked on in turns.
      if (k_parts > 1 && detail::num_waves(plan, m, n, num_sms) > 1) continue;
      const double micros = detail::plan_micros(plan, *block_micros, m, n, k, num_sms);
      if (least == 0.0 || micros < least) {
        least = micros;
        best = plan;
      }
    }
    ++block_micros;
  }
  for (const Tiling tiling : {Tiling::kWide, Tiling::kTurns}) {
    const double micros = detail::square_micros(tiling, m, n, k, num_sms);
    if (micros < least) {
      least = micros;
      best = {128, 1, tiling};
    }
  }
  return best;
}

}  // namespace tinylm::cuda
