/// @file lm_head.h
/// Logits of each row's last token on a GPU: RMSNorm, and the product with the vocabulary's table,
/// which is the embedding where both are tied.
#pragma once

#include "types.h"

namespace tinylm::cuda {

/// Largest hidden size: eight rows of it fit into shared memory.
inline constexpr std::int64_t kMaxHeadInputs = 6144;

/// Arguments of lm_head(). Device pointers, aligned to 16 bytes.
struct LmHeadParams {
  DataType type = DataType::kFloat;  ///< of x and table
  std::int64_t batch = 0;            ///< rows, 0 allowed
  std::int64_t length = 0;           ///< tokens of a row, right-padded
  std::int64_t hidden = 0;           ///< a multiple of 4
  std::int64_t vocab = 0;
  const void* x = nullptr;                 ///< [batch, length, hidden]
  const void* table = nullptr;             ///< [vocab, hidden]
  const float* norm_weight = nullptr;      ///< [hidden]
  const std::int32_t* seq_lens = nullptr;  ///< [batch], valid tokens; 0 reads the first
  float* logits = nullptr;                 ///< [batch, vocab]
  float eps = 1e-5F;
};

/// Enqueues the head. The norm is rounded to the element type; sums are float32. Nothing is
/// allocated; the same arguments give the same bits.
/// @return cudaErrorInvalidValue where a size is out of range, else what the launch gave.
cudaError_t lm_head(const LmHeadParams& params, cudaStream_t stream);

}  // namespace tinylm::cuda
