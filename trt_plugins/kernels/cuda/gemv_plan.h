/// @file gemv_plan.h
/// How a product of few rows is spread over a GPU: plain arithmetic, tested without one. The limits
/// are those of an H200 (132 multiprocessors), see README.md.
#pragma once

#include <algorithm>
#include <cstdint>

#include "product_plan.h"

namespace tinylm::cuda {

/// What a thread block of ternary_gemv has, and how many of them there are.
struct GemvPlan {
  int row_tiles = 1;     ///< of 8 rows
  int output_tiles = 1;  ///< of 16 outputs, at most
  int warps = 8;         ///< that share K
  int row_blocks = 1;    ///< groups of row_tiles
  int parts = 1;         ///< of the outputs, equal but for a tile
  int together = 1;      ///< thread blocks of a multiprocessor
};

namespace detail {

/// Thread blocks of 2 tiles of rows and 2 of outputs.
inline std::int64_t usual_gemv_blocks(std::int64_t m, std::int64_t n) {
  return ceil_div(m, 16) * ceil_div(n, 32);
}

/// The first three members. Larger tiles read less from L2; smaller ones keep more multiprocessors
/// busy, as long as all thread blocks run at once.
/// @param digits Whether activations are digits, which take the registers of four tiles of rows.
inline GemvPlan gemv_tiles(std::int64_t m, std::int64_t n, std::int64_t k, bool digits,
                           int num_sms) {
  const std::int64_t rows = ceil_div(m, 8), least = rows * ceil_div(n, 16);
  if (least <= num_sms && k >= 2048) return {1, 1, 16};
  if (least <= (rows == 1 ? 3 : 2) * num_sms) return {1, 1};
  if (rows == 1) return {1, 2};
  const bool large_fit = ceil_div(m, 32) * ceil_div(n, 32) <= 2 * num_sms;
  if (!digits && large_fit && usual_gemv_blocks(m, n) > 3 * num_sms) return {4, 2};
  return {2, 2};
}

}  // namespace detail

/// The plan for m rows, n outputs and k inputs on a GPU of num_sms multiprocessors.
inline GemvPlan plan_gemv(std::int64_t m, std::int64_t n, std::int64_t k, bool digits,
                          int num_sms) {
  constexpr std::int64_t kManyInputs = 4096;
  GemvPlan plan = detail::gemv_tiles(m, n, k, digits, num_sms);
  const auto tiles = static_cast<int>(detail::ceil_div(n, 16));
  plan.row_blocks = static_cast<int>(detail::ceil_div(m, 8 * plan.row_tiles));
  plan.parts = static_cast<int>(detail::ceil_div(tiles, plan.output_tiles));
  plan.together =
      static_cast<int>(detail::ceil_div(std::int64_t{plan.parts} * plan.row_blocks, num_sms));
  // No multiprocessor without work; with many inputs fewer thread blocks were faster.
  if (k <= kManyInputs) plan.parts = std::min(plan.together * num_sms / plan.row_blocks, tiles);
  return plan;
}

/// Whether ternary_gemv is faster on Hopper than ternary_wgmma is with more than 32 rows.
inline bool gemv_beats_wgmma(std::int64_t m, std::int64_t n, bool digits, int num_sms) {
  return detail::usual_gemv_blocks(m, n) <= (digits ? 2 : 5) * num_sms;
}

}  // namespace tinylm::cuda
