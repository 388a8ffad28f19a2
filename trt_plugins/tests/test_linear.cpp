/// @file test_linear.cpp
/// Random layers against the reference, for every kernel family.
#include <gtest/gtest.h>

#include <string>

#include "comparator.h"
#include "generator.h"
#include "isa_fixture.h"
#include "linear_helpers.h"
#include "thread_pool.h"

namespace tinylm::testing {
namespace {

using cpu::Activation;
using cpu::FloatType;
using reference::FloatTensor;
using reference::LinearCase;

std::string describe(const LinearCase& c, int number) {
  return "case " + std::to_string(number) + ": m " + std::to_string(c.m) + ", n " +
         std::to_string(c.n) + ", k " + std::to_string(c.k) +
         (c.norm() == nullptr ? "" : ", with norm");
}

std::unique_ptr<cpu::LinearWeights> pack_case(const LinearCase& c, bool ternary) {
  if (ternary) return pack_ternary(c.weight, c.scale, c.n, c.k);
  return cpu::LinearWeights::pack_int8(c.weight.data(), c.scale.data(), c.n, c.k);
}

class Linear : public IsaTest {
 protected:
  /// The exact integer sums of random layers.
  void check_sums(bool ternary) {
    Random random(ternary ? 1 : 2);
    for (int number = 0; number < num_cases(1000); ++number) {
      const auto [m, n, k] = random_sizes(random);
      const auto weight = ternary ? code_pattern(random, n, k) : int8_pattern(random, n, k, -127);
      const std::vector<float> scale(static_cast<std::size_t>(n), 1.0F);
      const auto q = int8_pattern(random, m, k, -128);
      const auto weights = ternary
                               ? pack_ternary(weight, scale, n, k)
                               : cpu::LinearWeights::pack_int8(weight.data(), scale.data(), n, k);
      ASSERT_EQ(weights->outputs(), n);
      ASSERT_EQ(weights->inputs(), k);
      ASSERT_GT(weights->num_bytes(), 0);
      const auto sums = run_accumulate(*weights, q, m);
      for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          const std::int64_t expected = reference::dot(&q[static_cast<std::size_t>(i * k)],
                                                       &weight[static_cast<std::size_t>(j * k)], k);
          ASSERT_EQ(sums[static_cast<std::size_t>(i * n + j)], expected)
              << "case " << number << ": m " << m << ", n " << n << ", k " << k << " at row " << i
              << ", column " << j;
        }
      }
    }
  }

  /// y of random layers with int8 activations: q may be off by a step once in a million (where the
  /// norm's factor rounds the other way), and y must then follow from that very q.
  void check_int8(bool ternary) {
    Random random(ternary ? 3 : 4);
    Differences steps;
    for (int number = 0; number < num_cases(1000); ++number) {
      const auto type =
          random.choose({FloatType::kFloat, FloatType::kFloat16, FloatType::kBFloat16});
      const LinearCase c = random_linear_case(random, type, Activation::kInt8, ternary);
      const auto weights = pack_case(c, ternary);
      std::vector<std::int8_t> q(static_cast<std::size_t>(c.m * c.k));
      std::vector<float> s(static_cast<std::size_t>(c.m));
      cpu::quantize_int8(params_of(c), c.k, q.data(), s.data());
      const FloatTensor y = run_linear(*weights, c);
      FloatTensor expected(type, c.m * c.n);
      for (std::int64_t i = 0; i < c.m; ++i) {
        reference::Quantized row = quantize_row(c, i);
        for (std::int64_t j = 0; j < c.k; ++j) {
          const std::int8_t found = q[static_cast<std::size_t>(i * c.k + j)];
          steps.add(found, row.q[static_cast<std::size_t>(j)], 1.0);
          row.q[static_cast<std::size_t>(j)] = found;
        }
        const float multiplier = s[static_cast<std::size_t>(i)];
        ASSERT_NEAR(multiplier, row.s, 1.2e-7 * row.s) << describe(c, number) << ", row " << i;
        row.s = multiplier;
        linear_row(c, i, row, expected);
      }
      ASSERT_TRUE(tensors_equal(y, expected, c.n)) << describe(c, number);
    }
    EXPECT_TRUE(steps.within(1e-6, 1.0));
  }
};
TINYLM_FOR_EVERY_ISA(Linear);

TEST_P(Linear, SumsOfTernaryWeightsAreExact) { check_sums(true); }
TEST_P(Linear, SumsOfInt8WeightsAreExact) { check_sums(false); }
TEST_P(Linear, TernaryWithInt8Activations) { check_int8(true); }
TEST_P(Linear, Int8WithInt8Activations) { check_int8(false); }

TEST_P(Linear, TernaryWithFp8Activations) {
  Random random(5);
  for (int number = 0; number < num_cases(1000); ++number) {
    const auto type = random.choose({FloatType::kFloat, FloatType::kFloat16, FloatType::kBFloat16});
    const LinearCase c = random_linear_case(random, type, Activation::kFp8E4m3, true);
    const auto weights = pack_case(c, true);
    ASSERT_TRUE(tensors_equal(run_linear(*weights, c), reference::linear(c), c.n))
        << describe(c, number);
  }
}

TEST_P(Linear, LargeLayerMeetsEveryBlockSize) {
  Random random(6);
  for (const auto activation : {Activation::kInt8, Activation::kFp8E4m3}) {
    LinearCase c;
    c.m = 131;
    c.n = 517;
    c.k = 1300;
    c.activation = activation;
    c.x = FloatTensor(FloatType::kFloat, c.m * c.k);
    for (std::int64_t i = 0; i < c.m; ++i) fill_row(random, c.x, i, c.k);
    c.weight = code_pattern(random, c.n, c.k);
    c.scale = random.floats(c.n, 1e-3, 1.0);
    const auto weights = pack_case(c, true);
    EXPECT_TRUE(tensors_equal(run_linear(*weights, c), reference::linear(c), c.n));
  }
}

TEST_P(Linear, ThreadsGiveTheSameBits) {
  Random random(7);
  ThreadPool pool(3);
  for (int number = 0; number < num_cases(100); ++number) {
    const auto activation = random.choose({Activation::kInt8, Activation::kFp8E4m3});
    const bool ternary = activation == Activation::kFp8E4m3 || random.one_in(2);
    const LinearCase c = random_linear_case(random, FloatType::kFloat, activation, ternary);
    const auto weights = pack_case(c, ternary);
    ASSERT_EQ(run_linear(*weights, c, pool.parallel()), run_linear(*weights, c))
        << describe(c, number);
    const auto q = random.int8s(c.m * c.k, -128, 127);
    ASSERT_EQ(run_accumulate(*weights, q, c.m, pool.parallel()), run_accumulate(*weights, q, c.m))
        << describe(c, number);
  }
  EXPECT_GT(pool.num_calls(), 0) << "no call used the threads that it was given";
}

TEST_P(Linear, ThreadsShareWeights) {
  Random random(8);
  const LinearCase c = random_linear_case(random, FloatType::kFloat, Activation::kInt8, true);
  const auto weights = pack_case(c, true);
  const FloatTensor expected = run_linear(*weights, c);
  std::vector<FloatTensor> found(4);
  std::vector<std::thread> threads;
  for (FloatTensor& y : found) threads.emplace_back([&] { y = run_linear(*weights, c); });
  for (std::thread& thread : threads) thread.join();
  for (const FloatTensor& y : found) EXPECT_EQ(y, expected);
}

TEST_P(Linear, NoRowsTouchNothing) {
  const auto weights = pack_ternary(std::vector<std::int8_t>(8, 1), {1.0F, 1.0F}, 2, 4);
  cpu::linear(*weights, cpu::LinearParams{}, {});
  cpu::accumulate_int8(*weights, nullptr, 0, nullptr, {});
}

}  // namespace
}  // namespace tinylm::testing
