/// @file ort_model.h
/// Cached steps of an exported ONNX directory in ONNX Runtime, on the CPU.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "cached_model.h"

namespace tinylm {

/// How OrtModel runs.
struct OrtOptions {
  int num_threads = 0;                ///< Threads within an op; 0 for ONNX Runtime's own choice.
  std::filesystem::path ops_library;  ///< libtinylm_ort.so; empty: the model's function bodies.
};

/// An exported model and its latent cache; the C++ form of export/ort_session.py.
///
/// The cache lives in buffers that are inputs and outputs of the graph at once, so no step copies
/// it. Not thread-safe: one object for each thread.
class OrtModel final : public CachedModel {
 public:
  /// Loads a model; SHA256SUMS is not checked (`sha256sum -c SHA256SUMS` does that).
  /// @param directory What `tinylm-export onnx` wrote, with task text-generation-with-past.
  /// @param options How to run it.
  /// @throws std::runtime_error A file is missing or not TinyLM's, the task has no cache, ONNX
  ///     Runtime is missing or too old, the ops library can't be loaded, or the model can't.
  /// @throws std::invalid_argument num_threads is negative.
  explicit OrtModel(const std::filesystem::path& directory, const OrtOptions& options = {});
  ~OrtModel() override;
  OrtModel(OrtModel&&) noexcept;
  OrtModel& operator=(OrtModel&&) noexcept;

  const ModelConfig& config() const override;
  void start(std::int64_t batch_size, std::int64_t capacity) override;
  Logits step(const std::vector<std::int64_t>& ids, std::int64_t length,
              const std::vector<std::int32_t>& seq_lens) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tinylm
