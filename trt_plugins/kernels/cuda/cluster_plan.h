/// @file cluster_plan.h
/// How attention over the cache is spread over a GPU with thread block clusters. Plain C++.
#pragma once

#include <cstdint>

#include "latent_attention.h"

namespace tinylm::cuda {

inline constexpr int kClusterHeads = 16;    // of one thread block: the rows of mma.m16n8k16
inline constexpr int kClusterTokens = 128;  // of one tile: 16 a warp

/// Thread blocks of a cluster. One has no remote stores; 16 needs the kernel's and the GPU's
/// consent.
inline constexpr int kNumClusterSizes = 4;
inline constexpr int kClusterSizes[kNumClusterSizes] = {2, 4, 8, 16};
inline constexpr int kMinCluster = kClusterSizes[0];
inline constexpr int kMaxCluster = kClusterSizes[kNumClusterSizes - 1];

/// How many clusters of each size a GPU holds at once, two thread blocks a multiprocessor: fewer
/// than multiprocessors suggest, since a cluster lies within a group of them. 0 where it takes
/// none.
struct ClusterCounts {
  int of_size[kNumClusterSizes];
};

/// Whether latent_cluster() is built for these widths.
inline bool cluster_takes(const LatentAttentionShape& s) {
  const bool rank = s.latent_rank == 64 || s.latent_rank == 128 || s.latent_rank == 192 ||
                    s.latent_rank == 256 || s.latent_rank == 384 || s.latent_rank == 512;
  const bool rope = s.rope_dim == 16 || s.rope_dim == 32 || s.rope_dim == 64;
  return rank && rope && s.nope_dim % 16 == 0 && s.nope_dim <= 128 && s.value_dim % 16 == 0;
}

namespace detail {

/// What `rows` take at once, as a part of what one thread block alone would take for a row: fitted
/// to the README's measurements.
inline double cluster_turn(std::int64_t rows, int count, int size) {
  constexpr double kFixed = 0.07;  // before and after a row's tokens
  constexpr double kShared = 1.6;  // two thread blocks of a multiprocessor, each
  return kFixed + (2 * rows > count ? kShared : 1.0) / size;
}

}  // namespace detail

/// Thread blocks of one row and 16 heads, so that all rows are done soonest. Rows that don't fit
/// wait for a turn of their own.
/// @param rows Batch rows times groups of 16 heads.
inline int cluster_blocks(std::int64_t rows, const ClusterCounts& counts) {
  int best = kMinCluster;
  double least = 0.0;
  for (int i = 0; i < kNumClusterSizes; ++i) {
    const int count = counts.of_size[i], size = kClusterSizes[i];
    if (count == 0) continue;
    double time = static_cast<double>(rows / count) * detail::cluster_turn(count, count, size);
    if (rows % count != 0) time += detail::cluster_turn(rows % count, count, size);
    if (least != 0.0 && time > least) continue;
    best = size;
    least = time;
  }
  return best;
}

}  // namespace tinylm::cuda
