/// @file generator.h
/// Random shapes and values, the same on every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "reference_attention.h"

namespace tinylm::testing {

/// How many of `full` cases to run: all, or the share that TINYLM_TEST_SHARE (0 .. 1] names, for
/// slow machines and emulators.
inline int num_cases(int full) {
  const char* share = std::getenv("TINYLM_TEST_SHARE");
  return share == nullptr ? full : std::max(1, static_cast<int>(full * std::stod(share)));
}

/// Draws numbers; not by std::*_distribution, whose results differ between libraries.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  /// Uniform in [low, high].
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    const auto span = static_cast<std::uint64_t>(high - low + 1);
    return low + static_cast<std::int64_t>(engine_() % span);
  }
  /// Uniform in [low, high).
  double real(double low = 0.0, double high = 1.0) {
    return low + (high - low) * std::ldexp(static_cast<double>(engine_() >> 11), -53);
  }
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - real()));
    return radius * std::cos(6.283185307179586 * real());
  }
  bool one_in(std::int64_t n) { return integer(1, n) == 1; }
  template <typename T>
  T choose(std::initializer_list<T> values) {
    return values.begin()[integer(0, static_cast<std::int64_t>(values.size()) - 1)];
  }
  /// int8 in [low, high].
  std::vector<std::int8_t> int8s(std::int64_t count, int low, int high) {
    std::vector<std::int8_t> values(static_cast<std::size_t>(count));
    for (auto& v : values) v = static_cast<std::int8_t>(integer(low, high));
    return values;
  }
  std::vector<float> floats(std::int64_t count, double low, double high) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (auto& v : values) v = static_cast<float>(real(low, high));
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

/// int8 vectors of the patterns that break kernels: random, extremes, alternating.
inline std::vector<std::int8_t> int8_pattern(Random& random, std::int64_t rows, std::int64_t k,
                                             int low) {
  std::vector<std::int8_t> values;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t kind = random.integer(0, 9);
    for (std::int64_t j = 0; j < k; ++j) {
      std::int64_t v = random.integer(low, 127);
      if (kind == 0) v = 0;
      if (kind == 1) v = low;
      if (kind == 2) v = 127;
      if (kind == 3) v = j % 2 == 0 ? low : 127;
      values.push_back(static_cast<std::int8_t>(v));
    }
  }
  return values;
}

/// Ternary codes of whole rows: random, or all alike.
inline std::vector<std::int8_t> code_pattern(Random& random, std::int64_t rows, std::int64_t k) {
  std::vector<std::int8_t> codes;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t kind = random.integer(-1, 9);  // -1, 0 and 1 are the code of all columns
    for (std::int64_t j = 0; j < k; ++j) {
      codes.push_back(static_cast<std::int8_t>(kind <= 1 ? kind : random.integer(-1, 1)));
    }
  }
  return codes;
}

/// One row of activations, of a magnitude of its own.
inline void fill_row(Random& random, reference::FloatTensor& x, std::int64_t row, std::int64_t k) {
  const bool wide = x.type() != cpu::FloatType::kFloat16;
  const std::int64_t kind = random.integer(0, 11);
  double magnitude = std::exp(random.normal());
  if (kind == 1) magnitude = wide ? 1e18 : 1e4;
  if (kind == 2) magnitude = wide ? 1e-38 : 1e-7;  // smaller than the quantiser's least scale
  if (kind == 3) magnitude = 1e-5;
  for (std::int64_t j = 0; j < k; ++j) {
    double v = random.normal() * magnitude;
    if (kind == 0) v = 0.0;
    if (kind == 4) v = j % 2 == 0 ? magnitude : -magnitude;
    if (kind == 5) v = j == k - 1 ? magnitude : 0.0;
    if (kind == 6) v = random.integer(-254, 254) / 2.0;  // halves, which round to even
    x.set(row * k + j, wide ? v : std::min(std::max(v, -6e4), 6e4));
  }
}

/// Sizes of a linear layer, odd ones preferred.
struct Sizes {
  std::int64_t m, n, k;
};
inline Sizes random_sizes(Random& random) {
  const std::int64_t m = random.one_in(2) ? random.integer(0, 5) : random.integer(1, 70);
  const std::int64_t n = random.one_in(3) ? random.integer(1, 20) : random.integer(1, 130);
  const std::int64_t k = random.one_in(3) ? 4 * random.integer(1, 140)
                                          : random.choose({4, 12, 60, 64, 68, 100, 124, 128, 132,
                                                           192, 252, 256, 260, 508, 516, 1028});
  return {m, n, k};
}

inline reference::LinearCase random_linear_case(Random& random, cpu::FloatType type,
                                                cpu::Activation activation, bool ternary) {
  const auto [m, n, k] = random_sizes(random);
  reference::LinearCase c;
  c.m = m;
  c.n = n;
  c.k = k;
  c.activation = activation;
  c.x = reference::FloatTensor(type, m * k);
  for (std::int64_t i = 0; i < m; ++i) fill_row(random, c.x, i, k);
  c.weight = ternary ? code_pattern(random, n, k) : int8_pattern(random, n, k, -127);
  c.scale = random.floats(n, 1e-3, 1.0);
  if (random.one_in(2)) c.norm_weight = random.floats(k, 0.5, 1.5);
  c.eps = random.choose({1e-5F, 1e-6F, 1e-3F});
  return c;
}

/// Fills a case whose sizes and lengths are set. Unused slots get what would spoil every sum.
inline void fill_attention_case(Random& random, reference::AttentionCase& c, cpu::FloatType type) {
  const auto& shape = c.shape;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::int64_t tokens = c.batch * c.length;
  c.q = reference::FloatTensor(type, tokens * shape.num_heads * (shape.nope_dim + shape.rope_dim));
  c.kv = reference::FloatTensor(type, tokens * (shape.latent_rank + shape.rope_dim));
  for (std::int64_t i = 0; i < c.q.size(); ++i) c.q.set(i, random.normal());
  for (std::int64_t i = 0; i < c.kv.size(); ++i) c.kv.set(i, random.normal());
  c.codes = random.int8s(c.rows() * shape.latent_rank, -1, 1);
  c.kv_b_scale = random.floats(c.rows(), 0.5, 1.5);
  c.norm_weight = random.floats(shape.latent_rank, 0.5, 1.5);
  c.latent = random.int8s(c.batch * c.capacity * shape.latent_rank, -127, 127);
  c.scale = random.floats(c.batch * c.capacity, 10.0, 70.0);
  c.rope = reference::FloatTensor(type, c.batch * c.capacity * shape.rope_dim);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t t = 0; t < c.capacity; ++t) {
      const bool held = t < c.past(b);
      const std::int64_t slot = b * c.capacity + t;
      for (std::int64_t j = 0; j < shape.rope_dim; ++j) {
        c.rope.set(slot * shape.rope_dim + j, held ? random.normal() : nan);
      }
      if (held) continue;
      c.scale[static_cast<std::size_t>(slot)] = random.one_in(2) ? nan : 0.0F;
      for (std::int64_t j = 0; j < shape.latent_rank; ++j) {
        c.latent[static_cast<std::size_t>(slot * shape.latent_rank + j)] = -128;
      }
    }
  }
}

/// @param length S; 1 is the absorbed case.
/// @param long_past Whether one row has more than 600 cached tokens.
inline reference::AttentionCase random_attention_case(Random& random, cpu::FloatType type,
                                                      std::int64_t length, bool long_past) {
  // The reference expands every token; a bound on its work keeps the whole run short.
  constexpr std::int64_t kMostWork = 3'000'000;
  while (true) {
    reference::AttentionCase c;
    auto& shape = c.shape;
    shape.num_heads = random.choose<std::int64_t>({1, 2, 3, 4, 5, 16});
    shape.nope_dim = random.integer(1, 33);
    shape.rope_dim = 2 * random.integer(1, 16);
    shape.value_dim = random.integer(1, 65);
    shape.latent_rank = random.choose<std::int64_t>({4, 12, 32, 64, 100, 256});
    shape.theta = random.choose({10000.0F, 5000.0F, 500000.0F});
    shape.eps = random.choose({1e-5F, 1e-6F});
    const auto width = static_cast<double>(shape.nope_dim + shape.rope_dim);
    shape.softmax_scale = static_cast<float>(1.0 / std::sqrt(width));
    c.batch = random.integer(1, 4);
    c.length = length;
    std::int64_t filled = 0;
    for (std::int64_t b = 0; b < c.batch; ++b) {
      const bool is_long = long_past && b == c.batch - 1;
      const std::int64_t past = is_long ? random.integer(600, 680) : random.integer(0, 40);
      const std::int64_t fresh = random.one_in(6) ? 0 : random.integer(1, length);
      c.past_lens.push_back(static_cast<std::int32_t>(random.one_in(4) && !is_long ? 0 : past));
      c.seq_lens.push_back(static_cast<std::int32_t>(fresh));
      filled = std::max(filled, c.past(b) + fresh);
    }
    c.capacity = std::max<std::int64_t>(1, filled + random.choose<std::int64_t>({0, 0, 1, 7}));
    if (c.batch * filled * c.rows() * shape.latent_rank > kMostWork) continue;
    fill_attention_case(random, c, type);
    return c;
  }
}

}  // namespace tinylm::testing
