/// @file cached_model.h
/// A model with a latent cache that takes tokens step by step, whatever runs it.
#pragma once

#include <cstdint>
#include <vector>

#include "model_config.h"

namespace tinylm {

/// float32 [batch_size, length, vocab_size], a view into the model's buffer.
struct Logits {
  const float* data = nullptr;
  std::int64_t batch_size = 0;
  std::int64_t length = 0;  ///< 1: after each row's last token. S with `--all-logits`.
  std::int64_t vocab_size = 0;

  /// Returns the vocab_size logits of one row and position.
  const float* at(std::int64_t row, std::int64_t position) const {
    return data + (row * length + position) * vocab_size;
  }
};

/// What OrtModel and TrtModel have in common.
class CachedModel {
 public:
  virtual ~CachedModel() = default;

  virtual const ModelConfig& config() const = 0;

  /// Makes an empty cache.
  /// @param batch_size B, rows.
  /// @param capacity C, most tokens of a row, at most max_seq_len.
  /// @throws std::invalid_argument A size is out of range.
  virtual void start(std::int64_t batch_size, std::int64_t capacity) = 0;

  /// Appends tokens to the cache.
  /// @param ids [B, S], right-padded; padding too must be ids of the vocabulary.
  /// @param length S.
  /// @param seq_lens [B], valid tokens of each row; 0 leaves a row as it is.
  /// @return Logits, valid until the next call; meaningless for rows with seq_lens 0 and, with
  ///     `--all-logits`, at padding.
  /// @throws std::invalid_argument start() was not called, sizes disagree, an id is not in the
  ///     vocabulary, or the cache is full; the cache is unchanged.
  /// @throws std::runtime_error The runtime failed.
  virtual Logits step(const std::vector<std::int64_t>& ids, std::int64_t length,
                      const std::vector<std::int32_t>& seq_lens) = 0;

 protected:
  CachedModel() = default;
  CachedModel(const CachedModel&) = default;
  CachedModel& operator=(const CachedModel&) = default;
};

/// Checks the sizes of a cache.
/// @throws std::invalid_argument As CachedModel::start().
void check_start(std::int64_t batch_size, std::int64_t capacity, std::int64_t max_capacity);

/// Checks a step against the cache.
/// @param vocab_size Ids lie below it.
/// @param past_lens Tokens that each row holds; empty before start().
/// @param capacity Most tokens of a row.
/// @throws std::invalid_argument As CachedModel::step().
void check_step(std::int64_t vocab_size, const std::vector<std::int32_t>& past_lens,
                std::int64_t capacity, const std::vector<std::int64_t>& ids, std::int64_t length,
                const std::vector<std::int32_t>& seq_lens);

}  // namespace tinylm
