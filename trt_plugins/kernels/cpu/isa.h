/// @file isa.h
/// Which instruction set the CPU kernels use, chosen once when the process first asks.
#pragma once

namespace tinylm::cpu {

/// Kernel families, slowest first. Each needs what the ones of its kind before it need.
enum class Isa {
  kPortable = 0,    ///< plain C++, any machine
  kAvx2 = 1,        ///< AVX2 and FMA
  kAvxVnni = 2,     ///< AVX2 with the 256-bit dot product (AVX-VNNI)
  kAvx512Vnni = 3,  ///< AVX-512 F, BW, DQ, VL and VNNI
  kAmxInt8 = 4,     ///< kAvx512Vnni with VBMI and int8 tiles
};
inline constexpr int kNumIsas = 5;

/// Returns "portable", "avx2", "avx-vnni", "avx512-vnni" or "amx-int8".
const char* isa_name(Isa isa);

/// Whether this processor and operating system run the family (and the library was built with it).
bool isa_supported(Isa isa);

/// Returns the fastest supported family, or the one that the environment variable TINYLM_CPU_ISA
/// names. The answer never changes within a process, unless force_isa() is called.
/// @throws std::runtime_error TINYLM_CPU_ISA names no family, or one that can't run here.
Isa active_isa();

/// Makes active_isa() return `isa`; for tests and benchmarks, before any weights are packed.
/// @throws std::runtime_error The family can't run here.
void force_isa(Isa isa);

}  // namespace tinylm::cpu
