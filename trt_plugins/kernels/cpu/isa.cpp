#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernel_table.h"

#if defined(TINYLM_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tinylm::cpu {
namespace {

constexpr const char* kNames[kNumIsas] = {"portable", "avx2", "avx-vnni", "avx512-vnni",
                                          "amx-int8"};

#if defined(TINYLM_X86)

std::uint64_t read_xcr0() {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

/// Linux hands out the 8 KiB of tile state only to a process that asks for them.
bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kReqXcompPerm = 0x1023;
  constexpr long kXtileData = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

bool bit(std::uint32_t word, int index) { return (word >> index & 1U) != 0; }

Isa detect() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27) || !bit(c, 12) || !bit(c, 29)) {
    return Isa::kPortable;  // no XSAVE, FMA or F16C
  }
  const std::uint64_t xcr0 = read_xcr0();
  constexpr std::uint64_t kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;
  if ((xcr0 & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(b, 5)) {
    return Isa::kPortable;
  }
  const std::uint32_t b7 = b, c7 = c, d7 = d;
  std::uint32_t a71 = 0;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  const bool avx512 = (xcr0 & kZmm) == kZmm && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) &&
                      bit(b7, 31) && bit(c7, 11);
  if (avx512) {
    const bool tiles = (xcr0 & kTiles) == kTiles && bit(d7, 24) && bit(d7, 25) && bit(c7, 1);
    return tiles && request_tiles() ? Isa::kAmxInt8 : Isa::kAvx512Vnni;
  }
  return bit(a71, 4) ? Isa::kAvxVnni : Isa::kAvx2;
}

bool has_avx_vnni() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 4);
}

#else

Isa detect() { return Isa::kPortable; }
bool has_avx_vnni() { return false; }

#endif

Isa fastest() {
  static const Isa isa = detect();
  return isa;
}

std::string supported_names() {
  std::string names;
  for (int i = 0; i < kNumIsas; ++i) {
    if (isa_supported(static_cast<Isa>(i)))
      names += (names.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  return names;
}

Isa require(Isa isa, const char* who) {
  if (isa_supported(isa)) return isa;
  throw std::runtime_error(std::string(who) + ": this machine does not run " + isa_name(isa) +
                           "; it runs " + supported_names() + ".");
}

Isa choose() {
  const char* wanted = std::getenv("TINYLM_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return fastest();
  for (int i = 0; i < kNumIsas; ++i) {
    if (std::string(wanted) == kNames[i]) return require(static_cast<Isa>(i), "TINYLM_CPU_ISA");
  }
  throw std::runtime_error("TINYLM_CPU_ISA must be one of " + supported_names() + ", found '" +
                           wanted + "'.");
}

Isa& chosen() {
  static Isa isa = choose();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) {
  // Every AVX-512 machine runs the families below, but AVX-VNNI is a feature of its own.
  if (isa == Isa::kAvxVnni) return fastest() >= Isa::kAvx2 && has_avx_vnni();
  return isa <= fastest();
}

Isa active_isa() { return chosen(); }

void force_isa(Isa isa) { chosen() = require(isa, "force_isa"); }

const KernelTable& kernel_table(Isa isa) {
#if defined(TINYLM_X86)
  switch (isa) {
    case Isa::kPortable:
      return portable_kernels();
    case Isa::kAvx2:
      return avx2_kernels();
    case Isa::kAvxVnni:
      return avxvnni_kernels();
    case Isa::kAvx512Vnni:
      return avx512vnni_kernels();
    case Isa::kAmxInt8:
      return amxint8_kernels();
  }
#else
  static_cast<void>(isa);
#endif
  return portable_kernels();
}

}  // namespace tinylm::cpu
