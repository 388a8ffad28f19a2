/// @file reference_attention.h
/// tinylm::FlashMLA in float64, as export/torch_ops.py and tinylm/latent_attention.py compute it.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "latent_attention.h"
#include "reference.h"

namespace tinylm::reference {

/// Inputs of one call of latent_attention(), and the cache that it changes.
struct AttentionCase {
  cpu::LatentAttentionShape shape;
  std::int64_t batch = 0;
  std::int64_t length = 0;
  std::int64_t capacity = 0;
  FloatTensor q;                   ///< [B, S, H * (nope + P)]
  FloatTensor kv;                  ///< [B, S, R + P]
  std::vector<std::int8_t> codes;  ///< [H * (nope + Dv), R]
  std::vector<float> kv_b_scale;   ///< [H * (nope + Dv)]
  std::vector<float> norm_weight;  ///< [R]
  std::vector<std::int32_t> past_lens;
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int8_t> latent;  ///< [B, C, R]
  std::vector<float> scale;         ///< [B, C]
  FloatTensor rope;                 ///< [B, C, P]

  std::int64_t past(std::int64_t b) const { return past_lens[static_cast<std::size_t>(b)]; }
  std::int64_t fresh(std::int64_t b) const { return seq_lens[static_cast<std::size_t>(b)]; }
  std::int64_t rows() const { return shape.num_heads * (shape.nope_dim + shape.value_dim); }
};

/// tinylm.latent_attention.rotate of one vector of P values at a position, in float64.
inline std::vector<double> rotate(const std::vector<double>& x, std::int64_t position,
                                  double theta) {
  const std::size_t half = x.size() / 2;
  std::vector<double> y(x.size());
  for (std::size_t i = 0; i < half; ++i) {
    const double exponent = -static_cast<double>(2 * i) / static_cast<double>(x.size());
    const auto frequency = static_cast<float>(std::pow(theta, exponent));
    const double angle = static_cast<float>(position) * frequency;
    const double cosine = static_cast<float>(std::cos(angle));
    const double sine = static_cast<float>(std::sin(angle));
    y[i] = x[i] * cosine - x[half + i] * sine;
    y[half + i] = x[half + i] * cosine + x[i] * sine;
  }
  return y;
}

/// Writes the new tokens into the cache, and nothing else.
inline void append(AttentionCase& c) {
  const std::int64_t rank = c.shape.latent_rank;
  const std::int64_t width = c.shape.rope_dim;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t i = 0; i < c.fresh(b); ++i) {
      const std::int64_t source = (b * c.length + i) * (rank + width);
      const std::int64_t position = c.past(b) + i;
      const std::int64_t slot = b * c.capacity + position;
      std::vector<float> latent;
      for (std::int64_t j = 0; j < rank; ++j) latent.push_back(c.kv.get(source + j));
      rms_norm(latent, c.norm_weight.data(), c.shape.eps);
      const Quantized row = quantize(latent, cpu::Activation::kInt8);
      c.scale[static_cast<std::size_t>(slot)] = row.s;
      for (std::int64_t j = 0; j < rank; ++j) {
        c.latent[static_cast<std::size_t>(slot * rank + j)] =
            static_cast<std::int8_t>(row.q[static_cast<std::size_t>(j)]);
      }
      std::vector<double> key;
      for (std::int64_t j = 0; j < width; ++j) key.push_back(c.kv.get(source + rank + j));
      key = rotate(key, position, c.shape.theta);
      for (std::int64_t j = 0; j < width; ++j) {
        c.rope.set(slot * width + j, key[static_cast<std::size_t>(j)]);
      }
    }
  }
}

/// One query of one head.
struct Query {
  std::int64_t b;
  std::int64_t head;
  std::int64_t visible;      ///< cached tokens it sees
  std::vector<double> nope;  ///< [nope]
  std::vector<double> rope;  ///< [P], rotated and rounded to the tensors' type
};

inline Query read_query(const AttentionCase& c, std::int64_t b, std::int64_t i, std::int64_t head) {
  const auto& shape = c.shape;
  const std::int64_t width = shape.nope_dim + shape.rope_dim;
  const std::int64_t at = ((b * c.length + i) * shape.num_heads + head) * width;
  Query query{b, head, c.past(b) + i + 1, {}, {}};
  for (std::int64_t j = 0; j < shape.nope_dim; ++j) query.nope.push_back(c.q.get(at + j));
  for (std::int64_t j = shape.nope_dim; j < width; ++j) query.rope.push_back(c.q.get(at + j));
  query.rope = rotate(query.rope, c.past(b) + i, shape.theta);
  FloatTensor rounded(c.q.type(), shape.rope_dim);
  for (std::int64_t j = 0; j < shape.rope_dim; ++j) {
    double& value = query.rope[static_cast<std::size_t>(j)];
    rounded.set(j, value);
    value = rounded.get(j);
  }
  return query;
}

inline double rope_score(const AttentionCase& c, const Query& query, std::int64_t t) {
  const std::int64_t at = (query.b * c.capacity + t) * c.shape.rope_dim;
  double score = 0.0;
  for (std::int64_t j = 0; j < c.shape.rope_dim; ++j) {
    score += query.rope[static_cast<std::size_t>(j)] * c.rope.get(at + j);
  }
  return score;
}

/// Turns scores into weights that sum to 1.
inline void softmax(std::vector<double>& scores) {
  const double largest = *std::max_element(scores.begin(), scores.end());
  double sum = 0.0;
  for (double& score : scores) sum += score = std::exp(score - largest);
  for (double& score : scores) score /= sum;
}

/// tinylm.latent_attention.attend_expanded, with keys and values of every cached token.
class Expanded {
 public:
  explicit Expanded(const AttentionCase& c) : case_(c) {
    const std::int64_t rank = c.shape.latent_rank;
    values_.resize(static_cast<std::size_t>(c.batch * c.capacity * c.rows()));
    for (std::int64_t b = 0; b < c.batch; ++b) {
      for (std::int64_t t = 0; t < c.past(b) + c.fresh(b); ++t) {
        const std::int64_t slot = b * c.capacity + t;
        const double s = c.scale[static_cast<std::size_t>(slot)];
        for (std::int64_t row = 0; row < c.rows(); ++row) {
          const std::int64_t sum = dot(&c.latent[static_cast<std::size_t>(slot * rank)],
                                       &c.codes[static_cast<std::size_t>(row * rank)], rank);
          const double weight_scale = c.kv_b_scale[static_cast<std::size_t>(row)];
          values_[static_cast<std::size_t>(slot * c.rows() + row)] =
              static_cast<double>(sum) * weight_scale / s;
        }
      }
    }
  }

  /// Returns [Dv].
  std::vector<double> operator()(const Query& query) const {
    const auto& shape = case_.shape;
    std::vector<double> weights;
    for (std::int64_t t = 0; t < query.visible; ++t) {
      double score = 0.0;
      for (std::int64_t j = 0; j < shape.nope_dim; ++j) {
        score += query.nope[static_cast<std::size_t>(j)] * at(query, t)[j];
      }
      weights.push_back((score + rope_score(case_, query, t)) * shape.softmax_scale);
    }
    softmax(weights);
    std::vector<double> y(static_cast<std::size_t>(shape.value_dim));
    for (std::int64_t t = 0; t < query.visible; ++t) {
      const double* value = at(query, t) + shape.nope_dim;
      for (std::size_t j = 0; j < y.size(); ++j)
        y[j] += weights[static_cast<std::size_t>(t)] * value[j];
    }
    return y;
  }

 private:
  const double* at(const Query& query, std::int64_t t) const {
    const std::int64_t width = case_.shape.nope_dim + case_.shape.value_dim;
    const std::int64_t slot = query.b * case_.capacity + t;
    return &values_[static_cast<std::size_t>(slot * case_.rows() + query.head * width)];
  }

  const AttentionCase& case_;
  std::vector<double> values_;  // [B, C, H * (nope + Dv)]
};

/// tinylm.latent_attention.attend_absorbed, with kv_b in the query and the output.
class Absorbed {
 public:
  explicit Absorbed(const AttentionCase& c) : case_(c) {}

  /// Returns [Dv].
  std::vector<double> operator()(const Query& query) const {
    const auto& shape = case_.shape;
    const auto rank = static_cast<std::size_t>(shape.latent_rank);
    const std::int64_t first_row = query.head * (shape.nope_dim + shape.value_dim);
    std::vector<double> q_latent(rank);
    for (std::int64_t d = 0; d < shape.nope_dim; ++d) {
      for (std::size_t r = 0; r < rank; ++r) {
        q_latent[r] += query.nope[static_cast<std::size_t>(d)] * weight(first_row + d, r);
      }
    }
    std::vector<double> weights;
    for (std::int64_t t = 0; t < query.visible; ++t) {
      double score = 0.0;
      for (std::size_t r = 0; r < rank; ++r) score += q_latent[r] * latent(query, t)[r];
      score = score / multiplier(query, t) + rope_score(case_, query, t);
      weights.push_back(score * shape.softmax_scale);
    }
    softmax(weights);
    std::vector<double> y_latent(rank);
    for (std::int64_t t = 0; t < query.visible; ++t) {
      const double w = weights[static_cast<std::size_t>(t)] / multiplier(query, t);
      for (std::size_t r = 0; r < rank; ++r) y_latent[r] += w * latent(query, t)[r];
    }
    std::vector<double> y(static_cast<std::size_t>(shape.value_dim));
    for (std::size_t j = 0; j < y.size(); ++j) {
      const std::int64_t row = first_row + shape.nope_dim + static_cast<std::int64_t>(j);
      for (std::size_t r = 0; r < rank; ++r) y[j] += y_latent[r] * weight(row, r);
    }
    return y;
  }

 private:
  double weight(std::int64_t row, std::size_t r) const {
    const auto at =
        static_cast<std::size_t>(row) * static_cast<std::size_t>(case_.shape.latent_rank);
    return static_cast<double>(case_.codes[at + r]) *
           case_.kv_b_scale[static_cast<std::size_t>(row)];
  }
  const std::int8_t* latent(const Query& query, std::int64_t t) const {
    const std::int64_t slot = query.b * case_.capacity + t;
    return &case_.latent[static_cast<std::size_t>(slot * case_.shape.latent_rank)];
  }
  double multiplier(const Query& query, std::int64_t t) const {
    return case_.scale[static_cast<std::size_t>(query.b * case_.capacity + t)];
  }

  const AttentionCase& case_;
};

/// Attends over the cache of a case whose new tokens are appended already.
/// @return y [B, S, H * Dv], zeros past seq_lens.
template <typename Attend>
FloatTensor attend(const AttentionCase& c) {
  const Attend one(c);
  const auto& shape = c.shape;
  FloatTensor y(c.q.type(), c.batch * c.length * shape.num_heads * shape.value_dim);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t i = 0; i < c.fresh(b); ++i) {
      for (std::int64_t head = 0; head < shape.num_heads; ++head) {
        const std::vector<double> values = one(read_query(c, b, i, head));
        const std::int64_t at = ((b * c.length + i) * shape.num_heads + head) * shape.value_dim;
        for (std::int64_t j = 0; j < shape.value_dim; ++j) {
          y.set(at + j, values[static_cast<std::size_t>(j)]);
        }
      }
    }
  }
  return y;
}

}  // namespace tinylm::reference
