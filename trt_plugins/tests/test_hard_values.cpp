/// @file test_hard_values.cpp
/// Values that are not finite must not turn into plausible ones, and values of very different size
/// must not lose their digits.
#include <gtest/gtest.h>

#include <limits>

#include "attention_helpers.h"
#include "comparator.h"
#include "isa_fixture.h"
#include "linear_helpers.h"

namespace tinylm::testing {
namespace {

using cpu::Activation;
using cpu::FloatType;
using reference::AttentionCase;
using reference::FloatTensor;
using reference::LinearCase;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr cpu::LatentAttentionShape kSmall{3, 5, 6, 7, 12, 5000.0F, 1e-5F, 0.37F};

class HardValues : public IsaTest {
 protected:
  /// A row with a bad value gives no finite value, as in PyTorch; the rows beside it don't notice.
  static void check_linear(FloatType type, Activation activation, bool norm) {
    Random random(71);
    LinearCase c;
    c.m = 3;
    c.n = 5;
    c.k = 132;
    c.activation = activation;
    c.x = FloatTensor(type, c.m * c.k);
    for (std::int64_t i = 0; i < c.x.size(); ++i) c.x.set(i, random.normal());
    c.weight = random.int8s(c.n * c.k, -1, 1);
    c.scale = random.floats(c.n, 0.1, 1.0);
    if (norm) c.norm_weight = random.floats(c.k, 0.5, 1.5);
    const auto weights = pack_ternary(c.weight, c.scale, c.n, c.k);
    const FloatTensor good = run_linear(*weights, c);
    for (const float bad : {kNan, kInfinity, -kInfinity}) {
      for (const std::int64_t column : {0, 17, 127, 131}) {
        LinearCase spoiled = c;
        spoiled.x.set(c.k + column, bad);
        const FloatTensor y = run_linear(*weights, spoiled);
        for (std::int64_t i = 0; i < y.size(); ++i) {
          if (i / c.n == 1) {
            EXPECT_FALSE(std::isfinite(y.get(i)))
                << bad << " in column " << column << " gave " << y.get(i);
          } else {
            EXPECT_EQ(y.get(i), good.get(i)) << "row " << i / c.n;
          }
        }
      }
    }
  }

  /// Draws of e to the power of a normal, times a sign.
  static double spread(Random& random, double width) {
    return random.normal() * std::exp(width * random.normal());
  }
};
TINYLM_FOR_EVERY_ISA(HardValues);

TEST_P(HardValues, LinearShowsWhatIsNotFinite) {
  for (const auto type : {FloatType::kFloat, FloatType::kFloat16, FloatType::kBFloat16}) {
    for (const auto activation : {Activation::kInt8, Activation::kFp8E4m3}) {
      for (const bool norm : {false, true}) {
        SCOPED_TRACE(::testing::Message()
                     << (activation == Activation::kInt8 ? "int8" : "fp8") << (norm ? ", norm" : "")
                     << ", bytes of a value " << cpu::float_size(type));
        check_linear(type, activation, norm);
      }
    }
  }
}

/// A bad query spoils its own head; a bad latent all that see it, and its cached scale.
TEST_P(HardValues, AttentionShowsWhatIsNotFinite) {
  Random random(72);
  const std::int64_t q_width = kSmall.nope_dim + kSmall.rope_dim;
  for (const std::int64_t length : {1, 3}) {
    const AttentionCase c =
        make_case(random, kSmall, length, 12, {5, 4}, {static_cast<std::int32_t>(length), 1});
    AttentionCase copy = c;
    const FloatTensor good = run_kernel(copy);
    const std::int64_t y_width = kSmall.value_dim;
    for (const float bad : {kNan, kInfinity}) {
      for (const std::int64_t dim : {std::int64_t{1}, kSmall.nope_dim}) {  // nope and rope
        AttentionCase spoiled = c;
        spoiled.q.set(q_width + dim, bad);  // row 0, step 0, head 1
        const FloatTensor y = run_kernel(spoiled);
        for (std::int64_t i = 0; i < y.size(); ++i) {
          if (i / y_width == 1) {
            EXPECT_FALSE(std::isfinite(y.get(i))) << bad << " in q, dimension " << dim;
          } else {
            EXPECT_EQ(y.get(i), good.get(i)) << "value " << i;
          }
        }
      }
      AttentionCase spoiled = c;
      spoiled.kv.set(2, bad);  // row 0, step 0
      const FloatTensor y = run_kernel(spoiled);
      const std::int64_t row_width = length * kSmall.num_heads * y_width;
      for (std::int64_t i = 0; i < row_width; ++i) {
        EXPECT_FALSE(std::isfinite(y.get(i))) << bad << " in the latent, value " << i;
      }
      for (std::int64_t i = row_width; i < y.size(); ++i) EXPECT_EQ(y.get(i), good.get(i));
    }
  }
}

/// Outliers in the query, the latent, the weights' scales and the cache's.
TEST_P(HardValues, AttentionKeepsTheDigitsBesideOutliers) {
  Random random(73);
  Differences differences;
  for (int number = 0; number < num_cases(60); ++number) {
    const std::int64_t length = number % 2 == 0 ? 1 : random.integer(2, 9);
    AttentionCase c = random_attention_case(random, FloatType::kFloat, length, false);
    SCOPED_TRACE(describe(c, number));
    for (std::int64_t i = 0; i < c.q.size(); ++i) c.q.set(i, spread(random, 2.0));
    for (std::int64_t i = 0; i < c.kv.size(); ++i) c.kv.set(i, spread(random, 2.0));
    for (float& scale : c.kv_b_scale) scale = static_cast<float>(std::exp(2.0 * random.normal()));
    for (std::int64_t b = 0; b < c.batch; ++b) {
      for (std::int64_t t = 0; t < c.past(b); ++t) {
        c.scale[static_cast<std::size_t>(b * c.capacity + t)] =
            static_cast<float>(30.0 * std::exp(2.0 * random.normal()));
      }
    }
    c.shape.softmax_scale *= number % 3 == 0 ? 1.0F : 1e-3F;  // peaked, and spread
    const FloatTensor y = run_kernel(c);
    const FloatTensor expected = length == 1 ? reference::attend<reference::Absorbed>(c)
                                             : reference::attend<reference::Expanded>(c);
    double largest = 100.0;
    for (std::int64_t i = 0; i < y.size(); ++i) {
      largest = std::max(largest, std::fabs(static_cast<double>(expected.get(i))));
    }
    for (std::int64_t i = 0; i < y.size(); ++i) {
      differences.add_rounded_sum(y.get(i), expected.get(i), largest);
    }
  }
  EXPECT_TRUE(differences.within(1e-4, 1e-6));
}

}  // namespace
}  // namespace tinylm::testing
