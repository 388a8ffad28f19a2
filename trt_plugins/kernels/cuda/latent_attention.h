/// @file latent_attention.h
/// tinylm::FlashMLA on a GPU: append to the int8 latent cache and attend over it.
///
/// Numerics: tinylm/latent_attention.py. Float32 tensors are attended in float64 and rounded once;
/// half precision in float32, and with tensor cores where several tokens a row are new.
#pragma once

#include "types.h"

namespace tinylm::cuda {

/// Largest P: the frequencies travel as a kernel argument.
inline constexpr std::int64_t kMaxRopeDim = 128;
/// Largest R, H and Dv.
inline constexpr std::int64_t kMaxLatentRank = 512;
inline constexpr std::int64_t kMaxHeads = 256;
inline constexpr std::int64_t kMaxValueDim = 256;

/// Attributes and widths of one layer.
struct LatentAttentionShape {
  std::int64_t num_heads = 0;    ///< H
  std::int64_t nope_dim = 0;     ///< query-key width without position
  std::int64_t rope_dim = 0;     ///< P, even, a multiple of 4
  std::int64_t value_dim = 0;    ///< Dv
  std::int64_t latent_rank = 0;  ///< R, a multiple of 4
  float theta = 10000.0F;
  float eps = 1e-5F;
  float softmax_scale = 1.0F;

  std::int64_t qk_dim() const { return nope_dim + rope_dim; }
  std::int64_t q_width() const { return num_heads * qk_dim(); }
  std::int64_t kv_b_rows() const { return num_heads * (nope_dim + value_dim); }
};

/// Arguments of latent_attention(). Device pointers, aligned to 16 bytes. Rows are right-padded.
struct LatentAttentionParams {
  DataType type = DataType::kFloat;         ///< of qkv, rope and y
  std::int64_t batch = 0;                   ///< B
  std::int64_t length = 0;                  ///< S, new tokens of a row with padding
  std::int64_t capacity = 0;                ///< C
  const void* qkv = nullptr;                ///< [B, S, H * (nope + P) + R + P]
  const float* norm_weight = nullptr;       ///< [R]
  const std::uint8_t* kv_b = nullptr;       ///< packed codes [H * (nope + Dv), R]
  const float* kv_b_scale = nullptr;        ///< [H * (nope + Dv)]
  const std::int32_t* past_lens = nullptr;  ///< [B]
  const std::int32_t* seq_lens = nullptr;   ///< [B], 0 .. S
  std::int8_t* latent = nullptr;            ///< [B, C, R], past in, present out
  float* scale = nullptr;                   ///< [B, C]
  void* rope = nullptr;                     ///< [B, C, P]
  void* y = nullptr;                        ///< [B, S, H * Dv], zeros past seq_lens
};

/// Why a shape can't be run, or nullptr where it can.
const char* unsupported(const LatentAttentionShape& shape);

/// Bytes of workspace for these sizes and all smaller ones.
std::int64_t latent_attention_workspace(const LatentAttentionShape& shape, DataType type,
                                        std::int64_t batch, std::int64_t length,
                                        std::int64_t capacity);

/// Enqueues the step. Nothing is allocated; the same arguments give the same bits.
/// A row whose past_lens + seq_lens exceeds the capacity keeps the tokens that fit and gives
/// not-a-number for the others: nothing is written outside the cache.
/// @param workspace latent_attention_workspace() bytes, aligned to kAlignment.
/// @return cudaErrorInvalidValue where unsupported() says why, else what the launches gave.
cudaError_t latent_attention(const LatentAttentionShape& shape, const LatentAttentionParams& params,
                             void* workspace, cudaStream_t stream);

}  // namespace tinylm::cuda
