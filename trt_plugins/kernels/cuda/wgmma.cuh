// The warpgroup's product of sm_90a, wgmma m64nNk32: A (64 outputs x 32 inputs, unsigned codes or
// e4m3) from registers, B (N rows x 32 inputs of activations) from shared memory, K-major with the
// 128-byte swizzle. Register i of A is register i of mma.m16n8k32's, each warp having 16 outputs;
// d[4 j + i] is register i of mma.m16n8k32's accumulator for rows 8 j ... 8 j + 7.
#pragma once

#include <cstdint>

namespace tinylm::cuda {

// Whether this pass of the compiler knows wgmma, setmaxnreg and the like.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TINYLM_HOPPER 1
#endif

/// Describes 8 N rows of 128 bytes to wgmma, which start at a multiple of 1024 bytes.
__device__ inline std::uint64_t swizzled_rows(const void* shared) {
  constexpr std::uint64_t kSwizzle128 = 1ULL << 62;
  constexpr std::uint64_t kRowBlockStride = 1024 / 16;
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  return kSwizzle128 | kRowBlockStride << 32 | 1ULL << 16 | (address & 0x3ffff) >> 4;
}

#ifdef TINYLM_HOPPER

/// Orders earlier accesses to registers before the next wgmma.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Has the registers written here, not between wgmma instructions, which would wait for each other.
__device__ inline void settle(std::uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending groups run.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// How many registers a thread of the warpgroup has from here on: more, or fewer.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// An accumulator's registers in an instruction: their names, from 0 on, and what they are bound to.
#define TINYLM_NAMES_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TINYLM_NAMES_64                                                              \
  TINYLM_NAMES_32                                                                    \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TINYLM_NAMES_128                                                                       \
  TINYLM_NAMES_64                                                                              \
  ", "                                                                                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
  "%111, "                                                                                     \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define TINYLM_BIND_8(kind, d, i)                                                       \
  kind((d)[i]), kind((d)[i + 1]), kind((d)[i + 2]), kind((d)[i + 3]), kind((d)[i + 4]), \
      kind((d)[i + 5]), kind((d)[i + 6]), kind((d)[i + 7])
#define TINYLM_BIND_32(kind, d, i)                                                          \
  TINYLM_BIND_8(kind, d, i), TINYLM_BIND_8(kind, d, i + 8), TINYLM_BIND_8(kind, d, i + 16), \
      TINYLM_BIND_8(kind, d, i + 24)
#define TINYLM_BIND_64(kind, d, i) TINYLM_BIND_32(kind, d, i), TINYLM_BIND_32(kind, d, i + 32)
#define TINYLM_BIND_128(kind, d, i) TINYLM_BIND_64(kind, d, i), TINYLM_BIND_64(kind, d, i + 64)

/// d = A . B, or d += A . B if `add`. The numbers are those of the operands after d.
#define TINYLM_WGMMA(Sum, count, kind, instruction, flags, a0, a1, a2, a3, b0, add0)         \
  __device__ inline void wgmma(Sum(&d)[count], const std::uint32_t (&a)[4], std::uint64_t b, \
                               int add) {                                                    \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add0                                    \
                 ", 0; "                                                                     \
                 "wgmma.mma_async.sync.aligned." instruction " {" TINYLM_NAMES_##count       \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", p" flags "; }"      \
                 : TINYLM_BIND_##count(kind, d, 0)                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));            \
  }
TINYLM_WGMMA(int, 32, "+r", "m64n64k32.s32.u8.s8", "", 32, 33, 34, 35, 36, 37)
TINYLM_WGMMA(float, 32, "+f", "m64n64k32.f32.e4m3.e4m3", ", 1, 1", 32, 33, 34, 35, 36, 37)
TINYLM_WGMMA(int, 64, "+r", "m64n128k32.s32.u8.s8", "", 64, 65, 66, 67, 68, 69)
TINYLM_WGMMA(float, 64, "+f", "m64n128k32.f32.e4m3.e4m3", ", 1, 1", 64, 65, 66, 67, 68, 69)
TINYLM_WGMMA(int, 128, "+r", "m64n256k32.s32.u8.s8", "", 128, 129, 130, 131, 132, 133)
TINYLM_WGMMA(float, 128, "+f", "m64n256k32.f32.e4m3.e4m3", ", 1, 1", 128, 129, 130, 131, 132, 133)
#undef TINYLM_WGMMA

#endif  // TINYLM_HOPPER

}  // namespace tinylm::cuda
