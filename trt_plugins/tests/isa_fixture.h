/// @file isa_fixture.h
/// Runs a test once for each kernel family.
#pragma once

#include <gtest/gtest.h>

#include <ostream>
#include <string>

#include "isa.h"

namespace tinylm::cpu {

/// Lets failures name the family.
inline void PrintTo(Isa isa, std::ostream* out) { *out << isa_name(isa); }

}  // namespace tinylm::cpu

namespace tinylm::testing {

/// Forces one family; a test of a family that can't run here is reported as skipped.
class IsaTest : public ::testing::TestWithParam<cpu::Isa> {
 protected:
  void SetUp() override {
    if (!cpu::isa_supported(GetParam())) {
      GTEST_SKIP() << "NOT TESTED: this machine or build can't run " << cpu::isa_name(GetParam());
    }
    cpu::force_isa(GetParam());
  }
};

/// A test name holds letters and underscores only.
inline std::string isa_test_name(const ::testing::TestParamInfo<cpu::Isa>& info) {
  std::string name = cpu::isa_name(info.param);
  for (char& letter : name) {
    if (letter == '-') letter = '_';
  }
  return name;
}

}  // namespace tinylm::testing

/// Instantiates a suite derived from IsaTest for every family.
#define TINYLM_FOR_EVERY_ISA(Suite)                                                \
  INSTANTIATE_TEST_SUITE_P(                                                        \
      Isa, Suite,                                                                  \
      ::testing::Values(tinylm::cpu::Isa::kPortable, tinylm::cpu::Isa::kAvx2,      \
                        tinylm::cpu::Isa::kAvxVnni, tinylm::cpu::Isa::kAvx512Vnni, \
                        tinylm::cpu::Isa::kAmxInt8),                               \
      tinylm::testing::isa_test_name)
