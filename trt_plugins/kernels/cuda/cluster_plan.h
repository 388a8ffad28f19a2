/// @file cluster_plan.h
/// How attention over the cache is spread over a GPU with thread block clusters. Plain C++.
#pragma once

#include <cstdint>

#include "latent_attention.h"

namespace tinylm::cuda {

inline constexpr int kClusterHeads = 16;    // of one thread block: the rows of mma.m16n8k16
inline constexpr int kClusterTokens = 128;  // of one tile: 16 a warp
inline constexpr int kMinCluster = 2;       // a cluster of one has no remote stores
inline constexpr int kMaxCluster = 16;      // more than 8 needs the kernel's and the GPU's consent
inline constexpr int kPortableCluster = 8;

/// Whether latent_cluster() is built for these widths.
inline bool cluster_takes(const LatentAttentionShape& s) {
  const bool rank = s.latent_rank == 64 || s.latent_rank == 128 || s.latent_rank == 192 ||
                    s.latent_rank == 256 || s.latent_rank == 384 || s.latent_rank == 512;
  const bool rope = s.rope_dim == 16 || s.rope_dim == 32 || s.rope_dim == 64;
  return rank && rope && s.nope_dim % 16 == 0 && s.nope_dim <= 128 && s.value_dim % 16 == 0;
}

/// Thread blocks of one row and 16 heads: as many as the GPU takes at once, a power of two, two at
/// least. They share the tokens; where these are few, what comes before and after attention.
/// @param rows Batch rows times groups of 16 heads.
/// @param resident Thread blocks that the GPU holds at once.
/// @param most Of a cluster.
inline int cluster_blocks(std::int64_t rows, std::int64_t resident, int most = kMaxCluster) {
  int blocks = kMinCluster;
  while (2 * blocks <= most && 2 * blocks * rows <= resident) blocks *= 2;
  return blocks;
}

/// Thread blocks on a multiprocessor, by shared memory: two tiles of tokens take most of it.
inline int cluster_blocks_each(std::int64_t latent_rank, std::int64_t rope_dim) {
  return round_up(latent_rank, 128) + 2 * rope_dim <= 320 ? 2 : 1;
}

}  // namespace tinylm::cuda
