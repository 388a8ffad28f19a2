/// @file latent_attention.h
/// tinylm::FlashMLA on the CPU: append to the int8 latent cache and attend over it.
///
/// Numerics: tinylm/latent_attention.py in float64, rounded to the tensors' type once. One new
/// token a row works in the latent space (absorbed); more expand blocks of the cache to keys and
/// values, with an online softmax, so that no buffer grows with S x T.
#pragma once

#include <cstdint>
#include <memory>

#include "float_type.h"
#include "parallel.h"

namespace tinylm::cpu {

/// Attributes and widths of one layer.
struct LatentAttentionShape {
  std::int64_t num_heads = 0;    ///< H
  std::int64_t nope_dim = 0;     ///< query-key width without position
  std::int64_t rope_dim = 0;     ///< P, even
  std::int64_t value_dim = 0;    ///< Dv
  std::int64_t latent_rank = 0;  ///< R, a multiple of 4
  float theta = 10000.0F;
  float eps = 1e-5F;
  float softmax_scale = 1.0F;
};

/// kv_b of one layer, re-packed: once for expansion, and its key part once more, transposed, for
/// absorption. Immutable.
class LatentAttentionWeights {
 public:
  /// @param shape Sizes; all positive.
  /// @param kv_b uint8 [H * (nope + Dv), R / 4], see LinearWeights::pack_ternary.
  /// @param kv_b_scale float32 [H * (nope + Dv)]; copied.
  /// @param norm_weight float32 [R]; copied.
  /// @throws std::invalid_argument A size is out of range, or a code is 3.
  static std::unique_ptr<LatentAttentionWeights> pack(const LatentAttentionShape& shape,
                                                      const std::uint8_t* kv_b,
                                                      const float* kv_b_scale,
                                                      const float* norm_weight);
  virtual ~LatentAttentionWeights() = default;
  virtual const LatentAttentionShape& shape() const = 0;
  virtual std::int64_t num_bytes() const = 0;
};

/// Arguments of latent_attention(). Rows are right-padded.
struct LatentAttentionParams {
  std::int64_t batch = 0;                   ///< B
  std::int64_t length = 0;                  ///< S, new tokens of a row with padding
  std::int64_t capacity = 0;                ///< C
  FloatType type = FloatType::kFloat;       ///< of q, kv, rope and y
  const void* q = nullptr;                  ///< [B, S, H * (nope + P)]
  const void* kv = nullptr;                 ///< [B, S, R + P]
  const std::int32_t* past_lens = nullptr;  ///< [B]
  const std::int32_t* seq_lens = nullptr;   ///< [B], 0 .. S
  std::int8_t* latent = nullptr;            ///< [B, C, R], past in, present out
  float* scale = nullptr;                   ///< [B, C]
  void* rope = nullptr;                     ///< [B, C, P]
  void* y = nullptr;                        ///< [B, S, H * Dv], zeros past seq_lens
};

/// Appends and attends. past_lens + seq_lens must not exceed the capacity: check before.
void latent_attention(const LatentAttentionWeights& weights, const LatentAttentionParams& params,
                      const Parallel& parallel);

}  // namespace tinylm::cpu
