/// @file ort_model.h
/// Cached steps of an exported ONNX directory in ONNX Runtime, on the CPU.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "model_config.h"

namespace tinylm {

/// How OrtModel runs.
struct OrtOptions {
  int num_threads = 0;                ///< Threads within an op; 0 for ONNX Runtime's own choice.
  std::filesystem::path ops_library;  ///< libtinylm_ort.so; empty: the model's function bodies.
};

/// float32 [batch_size, length, vocab_size], a view into OrtModel's buffer.
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

/// An exported model and its latent cache; the C++ form of export/ort_session.py.
///
/// The cache lives in buffers that are inputs and outputs of the graph at once, so no step copies
/// it. Not thread-safe: one object for each thread.
class OrtModel {
 public:
  /// Loads a model; SHA256SUMS is not checked (`sha256sum -c SHA256SUMS` does that).
  /// @param directory What `tinylm-export onnx` wrote, with task text-generation-with-past.
  /// @param options How to run it.
  /// @throws std::runtime_error A file is missing or not TinyLM's, the task has no cache, ONNX
  ///     Runtime is missing or too old, the ops library can't be loaded, or the model can't.
  /// @throws std::invalid_argument num_threads is negative.
  explicit OrtModel(const std::filesystem::path& directory, const OrtOptions& options = {});
  ~OrtModel();
  OrtModel(OrtModel&&) noexcept;
  OrtModel& operator=(OrtModel&&) noexcept;

  const ModelConfig& config() const;

  /// Makes an empty cache.
  /// @param batch_size B, rows.
  /// @param capacity C, most tokens of a row, at most max_seq_len.
  /// @throws std::invalid_argument A size is out of range.
  void start(std::int64_t batch_size, std::int64_t capacity);

  /// Appends tokens to the cache.
  /// @param ids [B, S], right-padded; padding too must be ids of the vocabulary.
  /// @param length S.
  /// @param seq_lens [B], valid tokens of each row; 0 leaves a row as it is.
  /// @return Logits, valid until the next call; meaningless for rows with seq_lens 0 and, with
  ///     `--all-logits`, at padding.
  /// @throws std::invalid_argument start() was not called, sizes disagree, an id is not in the
  ///     vocabulary, or the cache is full; the cache is unchanged.
  /// @throws std::runtime_error ONNX Runtime failed.
  Logits step(const std::vector<std::int64_t>& ids, std::int64_t length,
              const std::vector<std::int32_t>& seq_lens);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tinylm
