// Hopper's warpgroup products for half precision, and their operands' descriptors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "wgmma.cuh"

namespace tinylm::cuda::detail {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// Operand of 128 bytes a row in shared memory, aligned to 1024 bytes, whose pieces of 16 bytes lie
/// at piece ^ (row % 8): 8 rows are 1024 bytes. Adding to it moves by 16 bytes.
__device__ inline std::uint64_t wgmma_operand(std::uint32_t address) {
  constexpr std::uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (address & 0x3ffffU) >> 4 | kEightRows << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

/// Keeps the compiler from using registers before a wait, or after an issue.
template <int kCount>
__device__ inline void hold_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
/// d [64, 128] (+)= A [64, 16] . B [128, 16]^T, both from shared memory.
#define TINYLM_WGMMA_KEYS(T, instruction)                                             \
  __device__ inline void wgmma_keys(float (&d)[64], std::uint64_t a, std::uint64_t b, \
                                    int accumulate, T) {                              \
    asm volatile(                                                                     \
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; "                                     \
        "wgmma.mma_async.sync.aligned." instruction " {" TINYLM_NAMES_64              \
        "}, %64, %65, p, 1, 1, 0, 0; }"                                               \
        : TINYLM_BIND_64("+f", d, 0)                                                  \
        : "l"(a), "l"(b), "r"(accumulate));                                           \
  }
TINYLM_WGMMA_KEYS(__half, "m64n128k16.f32.f16.f16")
TINYLM_WGMMA_KEYS(__nv_bfloat16, "m64n128k16.f32.bf16.bf16")
#undef TINYLM_WGMMA_KEYS

/// d [64, 64] += A [64, 16], in registers, . B [16, 64], 16 rows in shared memory.
#define TINYLM_WGMMA_VALUES(T, instruction)                                        \
  __device__ inline void wgmma_values(float (&d)[32], const std::uint32_t (&a)[4], \
                                      std::uint64_t b, T) {                        \
    asm volatile(                                                                  \
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; "                                    \
        "wgmma.mma_async.sync.aligned." instruction " {" TINYLM_NAMES_32           \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"                              \
        : TINYLM_BIND_32("+f", d, 0)                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                     \
  }
TINYLM_WGMMA_VALUES(__half, "m64n64k16.f32.f16.f16")
TINYLM_WGMMA_VALUES(__nv_bfloat16, "m64n64k16.f32.bf16.bf16")
#undef TINYLM_WGMMA_VALUES

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace tinylm::cuda::detail
