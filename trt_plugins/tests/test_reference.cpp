/// @file test_reference.cpp
/// The reference itself: known values of the formats, and its two ways of attending.
#include <gtest/gtest.h>

#include "comparator.h"
#include "generator.h"

namespace tinylm::testing {
namespace {

using reference::from_bits;
using reference::kBFloat16;
using reference::kE4m3;
using reference::kHalf;
using reference::round_to;
using reference::to_bits;

TEST(Reference, HalfIsIeee754) {
  EXPECT_EQ(to_bits(1.0F, kHalf), 0x3C00);
  EXPECT_EQ(to_bits(-2.0F, kHalf), 0xC000);
  EXPECT_EQ(to_bits(65504.0F, kHalf), 0x7BFF);
  EXPECT_EQ(to_bits(65519.0F, kHalf), 0x7BFF);
  EXPECT_EQ(to_bits(65520.0F, kHalf), 0x7C00);  // the middle goes to infinity
  EXPECT_EQ(to_bits(5.9604645e-8F, kHalf), 0x0001);
  EXPECT_EQ(to_bits(2.9802322e-8F, kHalf), 0x0000);  // half of the smallest goes to even
  EXPECT_EQ(to_bits(6.1035156e-5F, kHalf), 0x0400);
  EXPECT_EQ(to_bits(-0.0F, kHalf), 0x8000);
  EXPECT_EQ(to_bits(1.00048828125F, kHalf), 0x3C00);  // middle, to even
  EXPECT_EQ(to_bits(1.00146484375F, kHalf), 0x3C02);  // middle, to even
  EXPECT_EQ(to_bits(INFINITY, kHalf), 0x7C00);
  EXPECT_TRUE(std::isnan(from_bits(to_bits(NAN, kHalf), kHalf)));
}

TEST(Reference, BFloat16IsTheTopOfFloat32) {
  for (unsigned bits = 0; bits < 0x10000U; ++bits) {
    const std::uint32_t word = bits << 16;
    float value = 0.0F;
    std::memcpy(&value, &word, sizeof(value));
    ASSERT_TRUE(equal(from_bits(static_cast<std::uint16_t>(bits), kBFloat16), value)) << bits;
  }
}

TEST(Reference, ShortFloatsSurviveARoundTrip) {
  for (const auto& format : {kHalf, kBFloat16}) {
    for (unsigned bits = 0; bits < 0x10000U; ++bits) {
      const float value = from_bits(static_cast<std::uint16_t>(bits), format);
      if (!std::isnan(value)) {
        ASSERT_EQ(to_bits(value, format), bits);
      }
    }
  }
}

TEST(Reference, E4m3HasItsSteps) {
  EXPECT_EQ(round_to(448.0, kE4m3), 448.0);
  EXPECT_EQ(round_to(17.0, kE4m3), 16.0);  // middle of 16 and 18, to even
  EXPECT_EQ(round_to(19.0, kE4m3), 20.0);
  EXPECT_EQ(round_to(0.001953125, kE4m3), 0.001953125);
  EXPECT_EQ(round_to(0.0009765625, kE4m3), 0.0);
  EXPECT_EQ(round_to(0.0029296875, kE4m3), 0.00390625);
  EXPECT_EQ(round_to(-0.3, kE4m3), -0.3125);
}

TEST(Reference, AbsorbedEqualsExpanded) {
  Random random(61);
  Differences differences;
  for (int number = 0; number < num_cases(50); ++number) {
    auto c = random_attention_case(random, cpu::FloatType::kFloat, random.integer(1, 12), false);
    append(c);
    const auto absorbed = reference::attend<reference::Absorbed>(c);
    const auto expanded = reference::attend<reference::Expanded>(c);
    for (std::int64_t i = 0; i < absorbed.size(); ++i) {
      const double want = expanded.get(i);
      differences.add_rounded_sum(absorbed.get(i), want);
    }
  }
  EXPECT_TRUE(differences.within(1e-4, 1e-6));
}

}  // namespace
}  // namespace tinylm::testing
