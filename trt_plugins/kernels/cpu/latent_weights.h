/// @file latent_weights.h
/// What stands behind LatentAttentionWeights.
#pragma once

#include <memory>
#include <vector>

#include "latent_attention.h"
#include "packed_linear.h"
#include "rotary.h"

namespace tinylm::cpu {

/// kv_b head by head.
class PackedLatentAttention final : public LatentAttentionWeights {
 public:
  PackedLatentAttention(const LatentAttentionShape& shape, const std::uint8_t* kv_b,
                        const float* kv_b_scale, const float* norm_weight);

  const LatentAttentionShape& shape() const override { return shape_; }
  std::int64_t num_bytes() const override;

  /// Rows of a head, [nope + Dv, R]: latent to keys and values.
  const PackedLinear& expand(std::int64_t head) const {
    return static_cast<const PackedLinear&>(*expand_[static_cast<std::size_t>(head)]);
  }
  /// A head's key rows, transposed, [R, nope]: query to the latent space.
  const PackedLinear& absorb(std::int64_t head) const {
    return *absorb_[static_cast<std::size_t>(head)];
  }
  const float* norm_weight() const { return norm_weight_.data(); }
  RotaryTable& rotary() const { return *rotary_; }
  const KernelTable& kernels() const { return expand(0).kernels(); }

 private:
  LatentAttentionShape shape_;
  std::vector<std::unique_ptr<LinearWeights>> expand_;
  std::vector<std::unique_ptr<PackedLinear>> absorb_;
  std::vector<float> norm_weight_;
  std::shared_ptr<RotaryTable> rotary_;
};

/// The two ways to attend; latent_attention() chooses. Both take the cache with the new tokens in
/// it.
void attend_absorbed(const PackedLatentAttention& weights, const LatentAttentionParams& params,
                     const float* angles, const Parallel& parallel);
void attend_expanded(const PackedLatentAttention& weights, const LatentAttentionParams& params,
                     const float* angles, const Parallel& parallel);

/// Rotates `dim` values by halves: the pair of dimension i is i + dim / 2.
/// @param angles cos [dim / 2], then sin [dim / 2], of the position.
void rotate(const double* x, const float* angles, std::int64_t dim, double* out);

/// Rotates the second part of a head's query and rounds it to `type`, as PyTorch and ONNX do.
/// @param q [nope + P].
/// @param angles Of the query's position.
/// @param out [P].
void rotate_query(const PackedLatentAttention& weights, FloatType type, const double* q,
                  const float* angles, double* out);

/// softmax_scale, or NaN for a query that is not finite: it spoils its whole head, as a softmax
/// over such scores does.
double query_factor(const PackedLatentAttention& weights, const double* q);

/// Adds `bytes` to a pointer to elements of unknown type.
inline const void* offset(const void* p, std::int64_t bytes) {
  return static_cast<const char*>(p) + bytes;
}
inline void* offset(void* p, std::int64_t bytes) { return static_cast<char*>(p) + bytes; }

}  // namespace tinylm::cpu
