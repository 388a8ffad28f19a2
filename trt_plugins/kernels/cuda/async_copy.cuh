// Hopper's copies in bulk, the barriers in shared memory that count their bytes, those of some
// warps, clusters, and programmatic dependent launch. On older GPUs the launch's functions do
// nothing, the rest is absent.
#pragma once

#include <cstdint>

namespace tinylm::cuda {

/// Lets the next kernel on the stream begin, up to its wait_for_previous_kernel().
__device__ inline void launch_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until everything that the stream's earlier kernels wrote is there.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

namespace detail {
/// Asks L2 for the 128 bytes at p.
__device__ inline void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
/// What is at p in L2, now: past L1 and never merged with another load.
__device__ inline int load_newest(const std::int32_t* p) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
/// 16 bytes to shared memory, zeros unless they exist.
__device__ inline void copy_async(void* to, const void* from, bool exists) {
  const int bytes = exists ? 16 : 0;  // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Barriers in shared memory, mbarriers, by their addresses there.
__device__ inline void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives and announces so many bytes in this phase.
__device__ inline void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/// Waits until the phase of this parity is complete.
__device__ inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace detail

/// The address of the same place in the shared memory of the cluster's thread block `rank`.
__device__ inline std::uint32_t cluster_address(std::uint32_t shared, int rank) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}

/// Waits for every thread of every thread block of the cluster.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// A barrier of kThreads of a thread block's threads, whole warps. 0 is __syncthreads()'s.
template <int kThreads>
__device__ inline void named_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

/// A barrier in shared memory: a phase ends when all arrivals and announced bytes have come.
struct CopyBarrier {
  std::uint64_t state;

  __device__ void init(int arrivals) { detail::barrier_init(shared_address(this), arrivals); }
  /// Arrives and announces bytes of copies.
  __device__ void expect(int bytes) { detail::barrier_expect(shared_address(this), bytes); }
  __device__ void arrive() { detail::barrier_arrive(shared_address(this)); }
  /// Arrives when this thread's copy_async() so far have come.
  __device__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(this))
                 : "memory");
  }
  /// Waits for the end of the phase of this parity.
  __device__ void wait(int parity) { detail::barrier_wait(shared_address(this), parity); }
};

/// Makes what was stored to shared memory, barriers too, known to copies in bulk and to wgmma.
__device__ inline void fence_shared_memory() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Copies from global to shared memory; addresses and bytes are multiples of 16.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, CopyBarrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
}

/// 16 bytes of another thread block's shared memory.
__device__ inline uint4 load_cluster(std::uint32_t address) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace tinylm::cuda
