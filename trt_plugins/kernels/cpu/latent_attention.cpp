#include "latent_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "latent_weights.h"
#include "workspace.h"

namespace tinylm::cpu {
namespace {

void check_shape(const LatentAttentionShape& s) {
  const auto require = [](bool good, const char* name, std::int64_t found, const char* expected) {
    if (!good) {
      throw std::invalid_argument(std::string(name) + " must be " + expected + ", found " +
                                  std::to_string(found) + ".");
    }
  };
  require(s.num_heads > 0, "num_heads", s.num_heads, "positive");
  require(s.nope_dim > 0, "nope_dim", s.nope_dim, "positive");
  require(s.rope_dim > 0 && s.rope_dim % 2 == 0, "rope_dim", s.rope_dim, "positive and even");
  require(s.value_dim > 0, "value_dim", s.value_dim, "positive");
  require(s.latent_rank > 0 && s.latent_rank % 4 == 0, "the latent rank", s.latent_rank,
          "a positive multiple of 4");
}

/// Norms, quantises and rotates one new token into its slot of the cache.
void append_token(const PackedLatentAttention& weights, const LatentAttentionParams& p,
                  const float* angles, std::int64_t row, std::int64_t step) {
  const LatentAttentionShape& s = weights.shape();
  const std::int64_t rank = s.latent_rank;
  const std::int64_t size = float_size(p.type);
  const std::int64_t slot = row * p.capacity + p.past_lens[row] + step;
  const void* kv = offset(p.kv, (row * p.length + step) * (rank + s.rope_dim) * size);
  RowParams r;
  r.x = kv;
  r.type = p.type;
  r.k = rank;
  r.k_pad = round_up(rank, 16);
  r.norm_weight = weights.norm_weight();
  r.eps = s.eps;
  // Scratch for the row, its quantised form with padding, and the key.
  auto* memory = static_cast<char*>(
      scratch(Scratch::kNormed, static_cast<std::size_t>(5 * r.k_pad + 16 * s.rope_dim + 64)));
  r.normed = reinterpret_cast<float*>(memory);
  auto* key = reinterpret_cast<double*>(memory + round_up(4 * r.k_pad, 64));
  double* rotated = key + s.rope_dim;
  auto* q = reinterpret_cast<std::int8_t*>(rotated + s.rope_dim);
  const KernelTable& kernels = weights.kernels();
  std::int32_t sum = 0;
  p.scale[slot] = kernels.quantize_int8(r, q, &sum);
  std::memcpy(p.latent + slot * rank, q, static_cast<std::size_t>(rank));
  kernels.widen(offset(kv, rank * size), p.type, key, s.rope_dim);
  rotate(key, angles + (p.past_lens[row] + step) * s.rope_dim, s.rope_dim, rotated);
  kernels.narrow(rotated, p.type, offset(p.rope, slot * s.rope_dim * size), s.rope_dim);
}

void append(const PackedLatentAttention& weights, const LatentAttentionParams& p,
            const float* angles, const Parallel& parallel) {
  constexpr std::int64_t kTokensATask = 32;
  const std::int64_t tokens = p.batch * p.length;
  const std::int64_t tasks = (tokens + kTokensATask - 1) / kTokensATask;
  parallel(static_cast<std::size_t>(tasks), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * kTokensATask;
    for (std::int64_t i = first; i < std::min(tokens, first + kTokensATask); ++i) {
      const std::int64_t row = i / p.length;
      const std::int64_t step = i % p.length;
      if (step < p.seq_lens[row]) append_token(weights, p, angles, row, step);
    }
  });
}

}  // namespace

PackedLatentAttention::PackedLatentAttention(const LatentAttentionShape& shape,
                                             const std::uint8_t* kv_b, const float* kv_b_scale,
                                             const float* norm_weight)
    : shape_(shape),
      norm_weight_(norm_weight, norm_weight + shape.latent_rank),
      rotary_(RotaryTable::shared(shape.theta, shape.rope_dim)) {
  const std::int64_t rank = shape.latent_rank;
  const std::int64_t rows = shape.nope_dim + shape.value_dim;
  const std::vector<float> ones(static_cast<std::size_t>(rank), 1.0F);
  for (std::int64_t head = 0; head < shape.num_heads; ++head) {
    const std::uint8_t* packed = kv_b + head * rows * (rank / 4);
    expand_.push_back(LinearWeights::pack_ternary(packed, kv_b_scale + head * rows, rows, rank));
    auto absorb = std::make_unique<PackedLinear>(rank, shape.nope_dim, true, ones.data());
    for (std::int64_t row = 0; row < shape.nope_dim; ++row) {
      for (std::int64_t r = 0; r < rank; ++r) {
        absorb->set_code(r, row, packed[row * (rank / 4) + r / 4] >> (2 * (r % 4)) & 3U);
      }
    }
    absorb_.push_back(std::move(absorb));
  }
}

std::int64_t PackedLatentAttention::num_bytes() const {
  std::int64_t bytes = 0;
  for (const auto& weights : expand_) bytes += weights->num_bytes();
  for (const auto& weights : absorb_) bytes += weights->num_bytes();
  return bytes;
}

std::unique_ptr<LatentAttentionWeights> LatentAttentionWeights::pack(
    const LatentAttentionShape& shape, const std::uint8_t* kv_b, const float* kv_b_scale,
    const float* norm_weight) {
  check_shape(shape);
  const std::int64_t rows = shape.num_heads * (shape.nope_dim + shape.value_dim);
  const InvalidCode invalid = find_invalid_code(kv_b, rows, shape.latent_rank);
  if (invalid.found) {
    throw std::invalid_argument("kv_b: code 3 at row " + std::to_string(invalid.row) + ", column " +
                                std::to_string(invalid.column) +
                                "; codes are 0, 1 or 2. The file is damaged or was packed by "
                                "something else: export the model again.");
  }
  return std::make_unique<PackedLatentAttention>(shape, kv_b, kv_b_scale, norm_weight);
}

void rotate(const double* x, const float* angles, std::int64_t dim, double* out) {
  const std::int64_t half = dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const double cosine = angles[i];
    const double sine = angles[half + i];
    out[i] = x[i] * cosine - x[half + i] * sine;
    out[half + i] = x[half + i] * cosine + x[i] * sine;
  }
}

void rotate_query(const PackedLatentAttention& weights, FloatType type, const double* q,
                  const float* angles, double* out) {
  constexpr std::int64_t kAtOnce = 64;
  const LatentAttentionShape& s = weights.shape();
  rotate(q + s.nope_dim, angles, s.rope_dim, out);
  alignas(float) char rounded[kAtOnce * sizeof(float)];
  for (std::int64_t i = 0; i < s.rope_dim; i += kAtOnce) {
    const std::int64_t count = std::min(kAtOnce, s.rope_dim - i);
    weights.kernels().narrow(out + i, type, rounded, count);
    weights.kernels().widen(rounded, type, out + i, count);
  }
}

double query_factor(const PackedLatentAttention& weights, const double* q) {
  const LatentAttentionShape& s = weights.shape();
  const double largest = weights.kernels().largest_magnitude(q, s.nope_dim + s.rope_dim);
  return std::isfinite(largest) ? static_cast<double>(s.softmax_scale)
                                : std::numeric_limits<double>::quiet_NaN();
}

void latent_attention(const LatentAttentionWeights& weights, const LatentAttentionParams& p,
                      const Parallel& parallel) {
  if (p.batch == 0 || p.length == 0) return;
  const auto& packed = static_cast<const PackedLatentAttention&>(weights);
  std::int64_t longest = 0;
  for (std::int64_t row = 0; row < p.batch; ++row) {
    longest = std::max<std::int64_t>(longest, p.past_lens[row] + p.seq_lens[row]);
  }
  const auto angles = packed.rotary().angles(longest);
  append(packed, p, angles->data(), parallel);
  if (p.length == 1) {
    attend_absorbed(packed, p, angles->data(), parallel);
  } else {
    attend_expanded(packed, p, angles->data(), parallel);
  }
}

}  // namespace tinylm::cpu
