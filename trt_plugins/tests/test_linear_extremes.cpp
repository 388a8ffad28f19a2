/// @file test_linear_extremes.cpp
/// The largest sums, every 16-bit float, and the edges of the quantisers.
#include <gtest/gtest.h>

#include <limits>

#include "comparator.h"
#include "generator.h"
#include "isa_fixture.h"
#include "linear_helpers.h"

namespace tinylm::testing {
namespace {

using cpu::Activation;
using cpu::FloatType;
using cpu::kMaxInputs;
using reference::FloatTensor;
using reference::LinearCase;

/// Three rows of length kMaxInputs: all low, all high, alternating.
std::vector<std::int8_t> extreme_rows(int low, int high) {
  std::vector<std::int8_t> values;
  for (int row = 0; row < 3; ++row) {
    for (std::int64_t j = 0; j < kMaxInputs; ++j) {
      const bool is_low = row == 0 || (row == 2 && j % 2 == 0);
      values.push_back(static_cast<std::int8_t>(is_low ? low : high));
    }
  }
  return values;
}

class LinearExtremes : public IsaTest {
 protected:
  static void expect_sums(const cpu::LinearWeights& weights, const std::vector<std::int8_t>& q,
                          const std::vector<std::int8_t>& weight) {
    const auto sums = run_accumulate(weights, q, 3);
    for (std::int64_t i = 0; i < 3; ++i) {
      for (std::int64_t j = 0; j < 3; ++j) {
        EXPECT_EQ(sums[static_cast<std::size_t>(i * 3 + j)],
                  reference::dot(&q[static_cast<std::size_t>(i * kMaxInputs)],
                                 &weight[static_cast<std::size_t>(j * kMaxInputs)], kMaxInputs))
            << "row " << i << ", column " << j;
      }
    }
  }

  /// One row of x against one row of weights, in float32.
  static LinearCase one_row(std::vector<float> x, std::vector<std::int8_t> weight,
                            Activation activation) {
    LinearCase c;
    c.m = 1;
    c.n = 1;
    c.k = static_cast<std::int64_t>(x.size());
    c.activation = activation;
    c.x = FloatTensor(FloatType::kFloat, c.k);
    for (std::int64_t j = 0; j < c.k; ++j) c.x.set(j, x[static_cast<std::size_t>(j)]);
    c.weight = std::move(weight);
    c.scale = {1.0F};
    return c;
  }
};
TINYLM_FOR_EVERY_ISA(LinearExtremes);

TEST_P(LinearExtremes, LargestSumsDoNotOverflow) {
  const std::vector<float> scale(3, 1.0F);
  const auto q = extreme_rows(-128, 127);
  const auto codes = extreme_rows(-1, 1);
  expect_sums(*pack_ternary(codes, scale, 3, kMaxInputs), q, codes);
  const auto weight = extreme_rows(-127, 127);
  expect_sums(*cpu::LinearWeights::pack_int8(weight.data(), scale.data(), 3, kMaxInputs), q,
              weight);
}

TEST_P(LinearExtremes, LargestFp8SumsAreRoundedOnce) {
  Random random(11);
  const float smallest = 0.001953125F;  // 2^-9
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<float> x(static_cast<std::size_t>(kMaxInputs), 448.0F);  // so s = 1
    std::vector<std::int8_t> weight(x.size(), 1);
    for (std::size_t j = 1; j < x.size(); ++j) {
      if (kind == 1 && j % 2 == 0) x[j] = smallest;
      if (kind == 2) x[j] = static_cast<float>(448.0 * random.real(-1.0, 1.0));
      if (kind == 3) x[j] = static_cast<float>(random.normal());
      if (kind >= 2) weight[j] = static_cast<std::int8_t>(random.integer(-1, 1));
    }
    const LinearCase c = one_row(x, weight, Activation::kFp8E4m3);
    const auto weights = pack_ternary(c.weight, c.scale, c.n, c.k);
    EXPECT_TRUE(tensors_equal(run_linear(*weights, c), reference::linear(c), 1)) << kind;
  }
}

TEST_P(LinearExtremes, Int8RoundsHalfToEven) {
  const std::vector<float> x = {127.0F, 0.5F, 1.5F, 2.5F, -0.5F, -1.5F, -2.5F, 126.5F};  // s = 1
  const LinearCase c = one_row(x, std::vector<std::int8_t>(8, 1), Activation::kInt8);
  std::vector<std::int8_t> q(8);
  float s = 0.0F;
  cpu::quantize_int8(params_of(c), 8, q.data(), &s);
  EXPECT_EQ(s, 1.0F);
  EXPECT_EQ(q, (std::vector<std::int8_t>{127, 0, 2, 2, 0, -2, -2, 126}));
}

/// An identity matrix shows each quantised value; every step of e4m3 and all middles are met.
TEST_P(LinearExtremes, Fp8RoundsHalfToEven) {
  constexpr std::int64_t kWidth = 512;
  std::vector<float> x;
  for (int exponent = -10; exponent <= 8; ++exponent) {
    for (int sixteenth = 16; sixteenth < 32 && x.size() < kWidth; ++sixteenth) {
      const double v = std::ldexp(sixteenth, exponent - 4);
      x.push_back(static_cast<float>(v <= 448.0 ? v : 448.0));
    }
  }
  while (x.size() < kWidth) {
    const float v = x[x.size() % 256];
    x.push_back(std::nextafterf(-v, x.size() % 2 == 0 ? 0.0F : -v * 1.01F));
  }
  x[0] = 448.0F;  // so s = 1
  LinearCase c = one_row(x, {}, Activation::kFp8E4m3);
  c.n = kWidth;
  c.scale.assign(kWidth, 1.0F);
  c.weight.assign(kWidth * kWidth, 0);
  for (std::size_t i = 0; i < kWidth; ++i) c.weight[i * kWidth + i] = 1;
  const auto weights = pack_ternary(c.weight, c.scale, c.n, c.k);
  EXPECT_TRUE(tensors_equal(run_linear(*weights, c), reference::linear(c), c.n));
}

TEST_P(LinearExtremes, Fp8NeverExceedsTheTop) {
  Random random(12);
  LinearCase c = one_row({}, std::vector<std::int8_t>(4, 1), Activation::kFp8E4m3);
  c.m = 3000;
  c.k = 4;
  c.x = FloatTensor(FloatType::kFloat, c.m * c.k);
  for (std::int64_t i = 0; i < c.x.size(); ++i) c.x.set(i, random.real(0.01, 1.0));
  const auto weights = pack_ternary(c.weight, c.scale, 1, 4);
  EXPECT_TRUE(tensors_equal(run_linear(*weights, c), reference::linear(c), 1));
}

/// Every finite 16-bit float goes in as a row of its own and comes out again.
TEST_P(LinearExtremes, ReadsEveryShortFloat) {
  for (const auto type : {FloatType::kFloat16, FloatType::kBFloat16}) {
    std::vector<float> finite;
    for (unsigned bits = 0; bits < 0x10000U; ++bits) {
      const float v =
          reference::from_bits(static_cast<std::uint16_t>(bits), reference::format_of(type));
      if (std::isfinite(v)) finite.push_back(v);
    }
    LinearCase c = one_row({}, {1, 0, 0, 0}, Activation::kInt8);
    c.m = static_cast<std::int64_t>(finite.size());
    c.k = 4;
    c.x = FloatTensor(type, c.m * c.k);
    for (std::size_t i = 0; i < finite.size(); ++i) {
      c.x.set(static_cast<std::int64_t>(4 * i), finite[i]);
    }
    const auto weights = pack_ternary(c.weight, c.scale, 1, 4);
    EXPECT_TRUE(tensors_equal(run_linear(*weights, c), reference::linear(c), 1));
  }
}

/// Sums of 128 make y = 128 * scale exactly, so y can be any float32: all middles between two
/// short floats and their neighbours, overflow and the smallest numbers included.
TEST_P(LinearExtremes, RoundsToShortFloatsHalfToEven) {
  for (const auto type : {FloatType::kFloat16, FloatType::kBFloat16}) {
    const reference::Format& format = reference::format_of(type);
    LinearCase c = one_row({}, {}, Activation::kInt8);
    for (unsigned bits = 0; bits < 0x7FFFU; bits += 3) {
      const double low = reference::from_bits(static_cast<std::uint16_t>(bits), format);
      if (!std::isfinite(low) || low > 1e38) continue;
      const auto middle = static_cast<float>(low + reference::step_at(low, format) / 2.0);
      for (const float y :
           {std::nextafterf(middle, 0.0F), middle, std::nextafterf(middle, 3e38F)}) {
        c.scale.push_back(y / 128.0F);
      }
    }
    c.n = static_cast<std::int64_t>(c.scale.size());
    c.k = 4;
    c.x = FloatTensor(type, 4);
    c.x.set(0, 127.0F);
    c.x.set(1, 1.0F);
    for (std::int64_t j = 0; j < c.n; ++j) c.weight.insert(c.weight.end(), {1, 1, 0, 0});
    const auto weights = pack_ternary(c.weight, c.scale, c.n, 4);
    EXPECT_TRUE(tensors_equal(run_linear(*weights, c), reference::linear(c), c.n));
  }
}

}  // namespace
}  // namespace tinylm::testing
