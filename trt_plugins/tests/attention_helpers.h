/// @file attention_helpers.h
/// Calls of the attention kernel with the tests' containers.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "generator.h"
#include "latent_attention.h"

namespace tinylm::testing {

inline std::unique_ptr<cpu::LatentAttentionWeights> pack_weights(
    const reference::AttentionCase& c) {
  return cpu::LatentAttentionWeights::pack(c.shape, reference::pack(c.codes).data(),
                                           c.kv_b_scale.data(), c.norm_weight.data());
}

/// Runs the kernel on the case's own cache. y starts as NaN, so that what is not written shows.
inline reference::FloatTensor run_kernel(reference::AttentionCase& c,
                                         const cpu::Parallel& parallel = {}) {
  const std::int64_t width = c.shape.num_heads * c.shape.value_dim;
  reference::FloatTensor y(c.q.type(), c.batch * c.length * width);
  for (std::int64_t i = 0; i < y.size(); ++i) y.set(i, std::nanf(""));
  cpu::LatentAttentionParams params;
  params.batch = c.batch;
  params.length = c.length;
  params.capacity = c.capacity;
  params.type = c.q.type();
  params.q = c.q.data();
  params.kv = c.kv.data();
  params.past_lens = c.past_lens.data();
  params.seq_lens = c.seq_lens.data();
  params.latent = c.latent.data();
  params.scale = c.scale.data();
  params.rope = c.rope.data();
  params.y = y.data();
  const auto weights = pack_weights(c);
  EXPECT_GT(weights->num_bytes(), 0);
  cpu::latent_attention(*weights, params, parallel);
  return y;
}

inline std::string describe(const reference::AttentionCase& c, int number) {
  std::string text =
      "case " + std::to_string(number) + ": heads " + std::to_string(c.shape.num_heads) +
      ", nope " + std::to_string(c.shape.nope_dim) + ", rope " + std::to_string(c.shape.rope_dim) +
      ", value " + std::to_string(c.shape.value_dim) + ", rank " +
      std::to_string(c.shape.latent_rank) + ", length " + std::to_string(c.length) + ", capacity " +
      std::to_string(c.capacity) + ", past+new";
  for (std::int64_t b = 0; b < c.batch; ++b) {
    text += " " + std::to_string(c.past(b)) + "+" + std::to_string(c.fresh(b));
  }
  return text;
}

/// A case with given sizes and lengths.
inline reference::AttentionCase make_case(Random& random, cpu::LatentAttentionShape shape,
                                          std::int64_t length, std::int64_t capacity,
                                          std::vector<std::int32_t> past_lens,
                                          std::vector<std::int32_t> seq_lens) {
  reference::AttentionCase c;
  c.shape = shape;
  c.batch = static_cast<std::int64_t>(past_lens.size());
  c.length = length;
  c.capacity = capacity;
  c.past_lens = std::move(past_lens);
  c.seq_lens = std::move(seq_lens);
  fill_attention_case(random, c, cpu::FloatType::kFloat);
  return c;
}

}  // namespace tinylm::testing
