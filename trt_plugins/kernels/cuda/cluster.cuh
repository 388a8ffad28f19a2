// Thread block clusters of sm_90: their barrier, and stores to each other's shared memory that
// mbarriers count.
#pragma once

#include "async_copy.cuh"

namespace tinylm::cuda::detail {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline int cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ inline int cluster_size() {
  std::uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

/// Every thread of the cluster arrives, then waits. Orders mbarriers' initialisation only: a
/// release of everything would wait for global memory.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Stores to a thread block's shared memory and counts the bytes at its mbarrier.
__device__ inline void store_remote(std::uint32_t address, float4 v, std::uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::
          "r"(address),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
}

/// Makes initialised mbarriers known to the cluster, before cluster_arrive().
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
#endif

}  // namespace tinylm::cuda::detail
