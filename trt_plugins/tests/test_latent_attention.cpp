/// @file test_latent_attention.cpp
/// FlashMLA against float64, for every kernel family.
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "attention_helpers.h"
#include "comparator.h"
#include "generator.h"
#include "isa_fixture.h"
#include "latent_attention.h"
#include "thread_pool.h"

namespace tinylm::testing {
namespace {

using cpu::FloatType;
using reference::Absorbed;
using reference::AttentionCase;
using reference::Expanded;
using reference::FloatTensor;

/// What differs between a kernel and the reference, over many cases.
struct Result {
  Differences latent;  ///< in quantiser steps
  Differences scale;   ///< relative
  Differences rope;    ///< relative to the largest value
  Differences y;       ///< relative
};

/// Compares the slots of new tokens; every other slot must hold the bits that it held.
void compare_cache(const AttentionCase& found, const AttentionCase& expected, Result& result) {
  const std::int64_t rank = found.shape.latent_rank;
  const std::int64_t width = found.shape.rope_dim;
  for (std::int64_t b = 0; b < found.batch; ++b) {
    for (std::int64_t t = 0; t < found.capacity; ++t) {
      const std::int64_t slot = b * found.capacity + t;
      const auto at = static_cast<std::size_t>(slot);
      const bool is_new = t >= found.past(b) && t < found.past(b) + found.fresh(b);
      if (is_new) {
        result.scale.add(found.scale[at], expected.scale[at], expected.scale[at]);
        for (std::int64_t j = slot * rank; j < (slot + 1) * rank; ++j) {
          const auto i = static_cast<std::size_t>(j);
          result.latent.add(found.latent[i], expected.latent[i], 1.0);
        }
        for (std::int64_t j = slot * width; j < (slot + 1) * width; ++j) {
          result.rope.add(found.rope.get(j), expected.rope.get(j), 1.0);
        }
        continue;
      }
      ASSERT_EQ(std::memcmp(&found.scale[at], &expected.scale[at], sizeof(float)), 0)
          << "scale of row " << b << ", slot " << t << " was touched";
      for (std::int64_t j = slot * rank; j < (slot + 1) * rank; ++j) {
        const auto i = static_cast<std::size_t>(j);
        ASSERT_EQ(found.latent[i], expected.latent[i])
            << "latent of row " << b << ", slot " << t << " was touched";
      }
      for (std::int64_t j = slot * width; j < (slot + 1) * width; ++j) {
        ASSERT_TRUE(found.rope.same_bits(expected.rope, j))
            << "rope of row " << b << ", slot " << t << " was touched";
      }
    }
  }
}

/// Compares y with what the kernel's own cache gives in float64, so that a flip in the cache counts
/// once and there.
void compare_y(const AttentionCase& c, const FloatTensor& found, Result& result) {
  const FloatTensor expected =
      c.length == 1 ? reference::attend<Absorbed>(c) : reference::attend<Expanded>(c);
  const std::int64_t width = c.shape.num_heads * c.shape.value_dim;
  for (std::int64_t i = 0; i < found.size(); ++i) {
    const double want = expected.get(i);
    if (i / width % c.length >= c.fresh(i / width / c.length)) {
      ASSERT_EQ(found.get(i), 0.0F) << "padding at " << i << " is not zero";
    } else {
      result.y.add_rounded_sum(found.get(i), want);
    }
  }
}

void run_and_compare(AttentionCase& c, Result& result) {
  AttentionCase expected = c;
  append(expected);
  const FloatTensor y = run_kernel(c);
  ASSERT_NO_FATAL_FAILURE(compare_cache(c, expected, result));
  ASSERT_NO_FATAL_FAILURE(compare_y(c, y, result));
}

class LatentAttention : public IsaTest {
 protected:
  /// @param one Whether every case has one new token a row.
  static void check(FloatType type, bool one, std::uint64_t seed) {
    Random random(seed);
    Result result;
    for (int number = 0; number < num_cases(type == FloatType::kFloat ? 100 : 30); ++number) {
      const std::int64_t length = one ? 1 : random.integer(2, 40);
      AttentionCase c = random_attention_case(random, type, length, number % 10 == 9);
      SCOPED_TRACE(describe(c, number));
      ASSERT_NO_FATAL_FAILURE(run_and_compare(c, result));
    }
    EXPECT_TRUE(result.latent.within(1e-6, 1.0)) << "latent";
    EXPECT_TRUE(result.scale.within(1e-6, 1.2e-7)) << "scale";
    if (type == FloatType::kFloat) {
      EXPECT_TRUE(result.rope.within(1e-6, 1e-6)) << "rope";
      EXPECT_TRUE(result.y.within(1e-4, 1e-6)) << "y";
    } else {
      // A value in the middle between two short floats may go either way: 2^-14 of all at most if
      // the kernel does not pass by float32. One step is 2^-7 of a bfloat16.
      EXPECT_TRUE(result.rope.within(1e-3, 0.04)) << "rope";
      EXPECT_TRUE(result.y.within(1e-3, 0.008)) << "y";
    }
  }
};
TINYLM_FOR_EVERY_ISA(LatentAttention);

TEST_P(LatentAttention, OneTokenInFloat32) { check(FloatType::kFloat, true, 41); }
TEST_P(LatentAttention, ManyTokensInFloat32) { check(FloatType::kFloat, false, 42); }
TEST_P(LatentAttention, OneTokenInFloat16) { check(FloatType::kFloat16, true, 43); }
TEST_P(LatentAttention, ManyTokensInFloat16) { check(FloatType::kFloat16, false, 44); }
TEST_P(LatentAttention, OneTokenInBFloat16) { check(FloatType::kBFloat16, true, 45); }
TEST_P(LatentAttention, ManyTokensInBFloat16) { check(FloatType::kBFloat16, false, 46); }

constexpr cpu::LatentAttentionShape kFullSize{16, 32, 32, 64, 256, 10000.0F, 1e-5F, 0.125F};
constexpr cpu::LatentAttentionShape kSmall{3, 5, 6, 7, 12, 5000.0F, 1e-5F, 0.37F};

TEST_P(LatentAttention, FullSizedLayer) {
  Random random(47);
  Result result;
  for (const std::int64_t length : {1, 9}) {
    AttentionCase c =
        make_case(random, kFullSize, length, 400, {333, 2}, {static_cast<std::int32_t>(length), 1});
    ASSERT_NO_FATAL_FAILURE(run_and_compare(c, result));
  }
  EXPECT_TRUE(result.latent.within(1e-6, 1.0));
  EXPECT_TRUE(result.scale.within(0.0, 0.0));
  EXPECT_TRUE(result.y.within(1e-4, 1e-6));
}

/// One new token takes the absorbed way; with a padded step behind it, the expanded one.
TEST_P(LatentAttention, AbsorbedEqualsExpanded) {
  Random random(48);
  Differences differences;
  for (int number = 0; number < num_cases(100); ++number) {
    AttentionCase one = random_attention_case(random, FloatType::kFloat, 1, number % 10 == 9);
    SCOPED_TRACE(describe(one, number));
    AttentionCase two = one;
    two.length = 2;
    const std::int64_t q_width = one.q.size() / one.batch;
    const std::int64_t kv_width = one.kv.size() / one.batch;
    two.q = FloatTensor(FloatType::kFloat, 2 * one.q.size());
    two.kv = FloatTensor(FloatType::kFloat, 2 * one.kv.size());
    for (std::int64_t i = 0; i < two.q.size(); ++i) two.q.set(i, std::nanf(""));
    for (std::int64_t i = 0; i < two.kv.size(); ++i) two.kv.set(i, std::nanf(""));
    for (std::int64_t b = 0; b < one.batch; ++b) {
      for (std::int64_t j = 0; j < q_width; ++j) {
        two.q.set(2 * b * q_width + j, one.q.get(b * q_width + j));
      }
      for (std::int64_t j = 0; j < kv_width; ++j) {
        two.kv.set(2 * b * kv_width + j, one.kv.get(b * kv_width + j));
      }
    }
    const FloatTensor absorbed = run_kernel(one);
    const FloatTensor expanded = run_kernel(two);
    ASSERT_EQ(one.latent, two.latent);
    ASSERT_EQ(std::memcmp(one.scale.data(), two.scale.data(), one.scale.size() * sizeof(float)), 0);
    ASSERT_EQ(one.rope, two.rope);
    const std::int64_t width = one.shape.num_heads * one.shape.value_dim;
    for (std::int64_t b = 0; b < one.batch; ++b) {
      for (std::int64_t j = 0; j < width; ++j) {
        const double want = absorbed.get(b * width + j);
        differences.add_rounded_sum(expanded.get(2 * b * width + j), want);
        ASSERT_EQ(expanded.get((2 * b + 1) * width + j), 0.0F) << "padding";
      }
    }
  }
  EXPECT_TRUE(differences.within(1e-4, 1e-6));
}

/// A prompt in one piece, in chunks and token by token gives the same cache and the same y.
TEST_P(LatentAttention, ChunksGiveWhatOnePieceGives) {
  Random random(49);
  constexpr std::int64_t kTokens = 12;
  const AttentionCase whole = make_case(random, kSmall, kTokens, kTokens, {0}, {kTokens});
  AttentionCase piece = whole;
  const FloatTensor expected = run_kernel(piece);
  const std::int64_t y_width = kSmall.num_heads * kSmall.value_dim;
  for (const std::int64_t chunk : {1, 3, 4}) {
    AttentionCase c = whole;
    Differences differences;
    const std::int64_t q_width = whole.q.size() / kTokens;
    const std::int64_t kv_width = whole.kv.size() / kTokens;
    for (std::int64_t start = 0; start < kTokens; start += chunk) {
      c.length = chunk;
      c.past_lens = {static_cast<std::int32_t>(start)};
      c.seq_lens = {static_cast<std::int32_t>(chunk)};
      c.q = FloatTensor(FloatType::kFloat, chunk * q_width);
      c.kv = FloatTensor(FloatType::kFloat, chunk * kv_width);
      for (std::int64_t i = 0; i < c.q.size(); ++i) c.q.set(i, whole.q.get(start * q_width + i));
      for (std::int64_t i = 0; i < c.kv.size(); ++i)
        c.kv.set(i, whole.kv.get(start * kv_width + i));
      const FloatTensor y = run_kernel(c);
      for (std::int64_t i = 0; i < y.size(); ++i) {
        const double want = expected.get(start * y_width + i);
        differences.add_rounded_sum(y.get(i), want);
      }
    }
    EXPECT_EQ(c.latent, piece.latent) << chunk;
    EXPECT_EQ(c.scale, piece.scale) << chunk;
    EXPECT_EQ(c.rope, piece.rope) << chunk;
    EXPECT_TRUE(differences.within(1e-4, 1e-6)) << chunk;
  }
}

TEST_P(LatentAttention, RowsWithoutNewTokensKeepTheirCache) {
  Random random(50);
  for (const std::int64_t length : {1, 3}) {
    AttentionCase c = make_case(random, kSmall, length, 5, {5, 2, 0, 1}, {0, 0, 0, 1});
    Result result;
    ASSERT_NO_FATAL_FAILURE(run_and_compare(c, result));
    AttentionCase empty = make_case(random, kSmall, length, 3, {0, 0}, {0, 0});
    ASSERT_NO_FATAL_FAILURE(run_and_compare(empty, result));
    EXPECT_TRUE(result.y.within(0.0, 1e-6));
  }
}

TEST_P(LatentAttention, EmptyTensorsAreFine) {
  Random random(51);
  AttentionCase no_rows = make_case(random, kSmall, 3, 4, {}, {});
  run_kernel(no_rows);
  AttentionCase no_steps = make_case(random, kSmall, 0, 4, {2}, {0});
  run_kernel(no_steps);
}

TEST_P(LatentAttention, ThreadsGiveTheSameBits) {
  Random random(52);
  ThreadPool pool(3);
  for (int number = 0; number < num_cases(40); ++number) {
    const std::int64_t length = random.one_in(2) ? 1 : random.integer(2, 30);
    AttentionCase serial =
        random_attention_case(random, FloatType::kFloat, length, number % 10 == 9);
    SCOPED_TRACE(describe(serial, number));
    AttentionCase parallel = serial;
    const FloatTensor expected = run_kernel(serial);
    ASSERT_EQ(run_kernel(parallel, pool.parallel()), expected);
    ASSERT_EQ(parallel.latent, serial.latent);
    ASSERT_EQ(parallel.rope, serial.rope);
  }
  EXPECT_GT(pool.num_calls(), 0) << "no call used the threads that it was given";
}

TEST_P(LatentAttention, PackRefusesWhatDoesNotFit) {
  Random random(53);
  const AttentionCase c = make_case(random, kSmall, 1, 2, {0}, {1});
  const auto refuse = [&](auto change) {
    AttentionCase wrong = c;
    change(wrong.shape);
    EXPECT_THROW(pack_weights(wrong), std::invalid_argument);
  };
  refuse([](auto& shape) { shape.num_heads = 0; });
  refuse([](auto& shape) { shape.nope_dim = -1; });
  refuse([](auto& shape) { shape.rope_dim = 5; });
  refuse([](auto& shape) { shape.rope_dim = 0; });
  refuse([](auto& shape) { shape.value_dim = 0; });
  refuse([](auto& shape) { shape.latent_rank = 10; });
  refuse([](auto& shape) { shape.latent_rank = 0; });
  auto packed = reference::pack(c.codes);
  packed[3 * 12 / 4 + 1] = 0x30;  // row 3, column 6
  try {
    cpu::LatentAttentionWeights::pack(c.shape, packed.data(), c.kv_b_scale.data(),
                                      c.norm_weight.data());
    ADD_FAILURE() << "code 3 was accepted";
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("row 3"), std::string::npos) << message;
    EXPECT_NE(message.find("column 6"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace tinylm::testing
