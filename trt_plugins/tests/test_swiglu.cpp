/// @file test_swiglu.cpp
/// silu(gate) * up against float64.
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "comparator.h"
#include "generator.h"
#include "isa_fixture.h"
#include "swiglu.h"
#include "thread_pool.h"

namespace tinylm::testing {
namespace {

using cpu::FloatType;
using reference::FloatTensor;

FloatTensor run_swiglu(const FloatTensor& gate, const FloatTensor& up,
                       const cpu::Parallel& parallel = {}) {
  FloatTensor y(gate.type(), gate.size());
  for (std::int64_t i = 0; i < y.size(); ++i) y.set(i, std::nanf(""));
  cpu::swiglu(gate.data(), up.data(), y.data(), gate.size(), gate.type(), parallel);
  return y;
}

/// Distance between neighbouring numbers of the type at v.
double step_of(FloatType type, double v) {
  constexpr reference::Format kSingle{23, -126, std::numeric_limits<float>::max()};
  return reference::step_at(v, type == FloatType::kFloat ? kSingle : reference::format_of(type));
}

class SwiGlu : public IsaTest {
 protected:
  /// @param limit Steps by which the worst value may differ.
  static void check(FloatType type, bool with_up, double limit) {
    Random random(31);
    const std::int64_t count = num_cases(1'000'000);
    FloatTensor gate(type, count);
    FloatTensor up(type, count);
    for (std::int64_t i = 0; i < count; ++i) {
      gate.set(i, random.one_in(3) ? random.real(-100.0, 100.0) : 8.0 * random.normal());
      up.set(i, with_up ? 8.0 * random.normal() : 1.0);
    }
    const FloatTensor y = run_swiglu(gate, up);
    const FloatTensor expected = reference::swiglu(gate, up);
    Differences steps;
    for (std::int64_t i = 0; i < count; ++i) {
      steps.add(y.get(i), expected.get(i), step_of(type, expected.get(i)));
    }
    EXPECT_TRUE(steps.within(1e-6, limit));
  }
};
TINYLM_FOR_EVERY_ISA(SwiGlu);

// With up = 1 the product rounds nothing: the result is silu itself.
TEST_P(SwiGlu, SiluInFloat32) { check(FloatType::kFloat, false, 1.0); }
TEST_P(SwiGlu, SiluInFloat16) { check(FloatType::kFloat16, false, 1.0); }
TEST_P(SwiGlu, SiluInBFloat16) { check(FloatType::kBFloat16, false, 1.0); }
// A step of silu is up to two steps of the product, whose leading digits may be smaller.
TEST_P(SwiGlu, ProductInFloat32) { check(FloatType::kFloat, true, 2.0); }
TEST_P(SwiGlu, ProductInFloat16) { check(FloatType::kFloat16, true, 2.0); }
TEST_P(SwiGlu, ProductInBFloat16) { check(FloatType::kBFloat16, true, 2.0); }

TEST_P(SwiGlu, SpecialValues) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float tiny = std::numeric_limits<float>::denorm_min();
  const float least = std::numeric_limits<float>::min();
  const float most = std::numeric_limits<float>::max();
  // silu(-inf) is NaN: -inf / (1 + inf), in PyTorch and in the ONNX body alike.
  const std::vector<float> gates = {
      0.0F,   -0.0F,   1.0F,    -1.0F,  20.0F,   -20.0F,  80.0F,   -80.0F,  -87.5F,  -88.0F, -90.0F,
      -95.0F, -100.0F, -104.0F, 500.0F, -500.0F, -709.0F, -710.0F, -744.0F, -746.0F, 1e30F,  -1e30F,
      most,   -most,   tiny,    -tiny,  least,   -least,  1e-40F,  -1e-40F, inf,     -inf,   nan};
  const std::vector<float> ups = {0.0F, 1.0F, -1.0F, 0.3F, 1e30F, 1e-30F, most, tiny, inf, nan};
  const auto count = static_cast<std::int64_t>(gates.size() * ups.size());
  FloatTensor gate(FloatType::kFloat, count);
  FloatTensor up(FloatType::kFloat, count);
  for (std::size_t i = 0; i < gates.size() * ups.size(); ++i) {
    gate.set(static_cast<std::int64_t>(i), gates[i / ups.size()]);
    up.set(static_cast<std::int64_t>(i), ups[i % ups.size()]);
  }
  const FloatTensor y = run_swiglu(gate, up);
  const FloatTensor expected = reference::swiglu(gate, up);
  for (std::int64_t i = 0; i < count; ++i) {
    EXPECT_TRUE(equal(y.get(i), expected.get(i)))
        << "silu(" << gate.get(i) << ") * " << up.get(i) << ": found " << y.get(i) << ", expected "
        << expected.get(i);
  }
}

TEST_P(SwiGlu, EveryCountIsWrittenAndNoMore) {
  Random random(32);
  for (const auto type : {FloatType::kFloat, FloatType::kFloat16, FloatType::kBFloat16}) {
    for (std::int64_t count = 0; count <= 70; ++count) {
      FloatTensor gate(type, count);
      FloatTensor up(type, count);
      for (std::int64_t i = 0; i < count; ++i) {
        gate.set(i, random.normal());
        up.set(i, random.normal());
      }
      FloatTensor y(type, count + 4);
      for (std::int64_t i = 0; i < y.size(); ++i) y.set(i, 7.0F);
      cpu::swiglu(gate.data(), up.data(), y.data(), count, type, {});
      const FloatTensor expected = reference::swiglu(gate, up);
      for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(y.get(i), expected.get(i)) << count;
      for (std::int64_t i = count; i < y.size(); ++i) ASSERT_EQ(y.get(i), 7.0F) << count;
    }
  }
}

TEST_P(SwiGlu, WorksInPlaceAndWithThreads) {
  Random random(33);
  for (const auto type : {FloatType::kFloat, FloatType::kFloat16, FloatType::kBFloat16}) {
    FloatTensor gate(type, 50'001);
    FloatTensor up(type, gate.size());
    for (std::int64_t i = 0; i < gate.size(); ++i) {
      gate.set(i, random.normal());
      up.set(i, random.normal());
    }
    const FloatTensor expected = run_swiglu(gate, up);
    ThreadPool pool(3);
    EXPECT_EQ(run_swiglu(gate, up, pool.parallel()), expected);
    FloatTensor over_gate = gate;
    cpu::swiglu(over_gate.data(), up.data(), over_gate.data(), gate.size(), type, {});
    EXPECT_EQ(over_gate, expected);
    cpu::swiglu(gate.data(), up.data(), up.data(), gate.size(), type, {});
    EXPECT_EQ(up, expected);
  }
}

}  // namespace
}  // namespace tinylm::testing
