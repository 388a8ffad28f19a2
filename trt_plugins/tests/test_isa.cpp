/// @file test_isa.cpp
/// How the kernel family is chosen. The choice is made once in a process, so each test of it asks
/// in a process of its own (a death test that exits with success).
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace tinylm::testing {
namespace {

using cpu::Isa;

constexpr const char* kVariable = "TINYLM_CPU_ISA";

/// Sets the variable, asks, prints the answer or the error, and ends the process.
[[noreturn]] void ask_and_exit(const char* value) {
  if (value == nullptr) {
    unsetenv(kVariable);
  } else {
    setenv(kVariable, value, 1);
  }
  int status = 0;
  try {
    std::fprintf(stderr, "answer: %s\n", cpu::isa_name(cpu::active_isa()));
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    status = 3;
  }
  std::exit(status);
}

class IsaDeathTest : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST(Isa, Names) {
  EXPECT_STREQ(cpu::isa_name(Isa::kPortable), "portable");
  EXPECT_STREQ(cpu::isa_name(Isa::kAvx2), "avx2");
  EXPECT_STREQ(cpu::isa_name(Isa::kAvxVnni), "avx-vnni");
  EXPECT_STREQ(cpu::isa_name(Isa::kAvx512Vnni), "avx512-vnni");
  EXPECT_STREQ(cpu::isa_name(Isa::kAmxInt8), "amx-int8");
}

TEST(Isa, PortableRunsEverywhere) { EXPECT_TRUE(cpu::isa_supported(Isa::kPortable)); }

TEST(Isa, FamiliesNeedTheirPredecessors) {
  EXPECT_TRUE(!cpu::isa_supported(Isa::kAvxVnni) || cpu::isa_supported(Isa::kAvx2));
  EXPECT_TRUE(!cpu::isa_supported(Isa::kAmxInt8) || cpu::isa_supported(Isa::kAvx512Vnni));
}

TEST(Isa, ForceReachesEverySupportedFamilyAndNoOther) {
  for (int i = 0; i < cpu::kNumIsas; ++i) {
    const auto isa = static_cast<Isa>(i);
    if (cpu::isa_supported(isa)) {
      cpu::force_isa(isa);
      EXPECT_EQ(cpu::active_isa(), isa);
    } else {
      const Isa before = cpu::active_isa();
      EXPECT_THROW(cpu::force_isa(isa), std::runtime_error) << cpu::isa_name(isa);
      EXPECT_EQ(cpu::active_isa(), before);
    }
  }
}

TEST_F(IsaDeathTest, TheFastestIsTheDefault) {
  Isa fastest = Isa::kPortable;
  for (int i = 0; i < cpu::kNumIsas; ++i) {
    if (cpu::isa_supported(static_cast<Isa>(i))) fastest = static_cast<Isa>(i);
  }
  EXPECT_EXIT(ask_and_exit(nullptr), ::testing::ExitedWithCode(0),
              std::string("answer: ") + cpu::isa_name(fastest) + "\n");
}

TEST_F(IsaDeathTest, TheVariableChooses) {
  for (int i = 0; i < cpu::kNumIsas; ++i) {
    const auto isa = static_cast<Isa>(i);
    const char* name = cpu::isa_name(isa);
    if (cpu::isa_supported(isa)) {
      EXPECT_EXIT(ask_and_exit(name), ::testing::ExitedWithCode(0),
                  std::string("answer: ") + name + "\n");
    } else {
      EXPECT_EXIT(ask_and_exit(name), ::testing::ExitedWithCode(3),
                  "error: .*" + std::string(name));
    }
  }
}

TEST_F(IsaDeathTest, AnUnknownNameIsAnErrorThatNamesIt) {
  EXPECT_EXIT(ask_and_exit("sse9"), ::testing::ExitedWithCode(3), "error: .*sse9");
  EXPECT_EXIT(ask_and_exit("AVX2 "), ::testing::ExitedWithCode(3), "error: .*TINYLM_CPU_ISA");
}

TEST_F(IsaDeathTest, TheAnswerNeverChanges) {
  const auto ask_twice = [] {
    setenv(kVariable, "portable", 1);
    const Isa first = cpu::active_isa();
    setenv(kVariable, "sse9", 1);
    std::exit(first == Isa::kPortable && cpu::active_isa() == first ? 0 : 1);
  };
  EXPECT_EXIT(ask_twice(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace tinylm::testing
