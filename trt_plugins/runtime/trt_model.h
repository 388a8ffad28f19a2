/// @file trt_model.h
/// Cached steps of a TensorRT engine directory.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "cached_model.h"

namespace tinylm {

/// How TrtModel runs.
struct TrtOptions {
  std::filesystem::path plugins;  ///< libtinylm_trt.so; not needed if the engine holds its plugins.
  bool cuda_graph = true;         ///< Whether decode steps become a CUDA graph.
  bool verify = true;             ///< Whether to compare the files with SHA256SUMS first.
};

/// An engine and its latent cache; the C++ form of export/trt_session.py.
///
/// The cache lives in buffers that are inputs and outputs of the engine at once, so no step copies
/// it. A step of one token a row becomes a CUDA graph when it is done the second time. Not
/// thread-safe: one object for each thread.
class TrtModel final : public CachedModel {
 public:
  /// Loads an engine.
  /// @param directory What `tinylm-export trt` wrote.
  /// @param options How to run it.
  /// @throws std::runtime_error A file is missing, altered or not TinyLM's; the engine was built
  /// for
  ///     another TensorRT release, GPU or plugin version, or without plugins; TensorRT, a GPU or
  ///     the plugin library is missing; or TensorRT can't load the engine.
  explicit TrtModel(const std::filesystem::path& directory, const TrtOptions& options = {});
  ~TrtModel() override;
  TrtModel(TrtModel&&) noexcept;
  TrtModel& operator=(TrtModel&&) noexcept;

  /// The model's, with max_seq_len no larger than the engine takes.
  const ModelConfig& config() const override;
  void start(std::int64_t batch_size, std::int64_t capacity) override;
  Logits step(const std::vector<std::int64_t>& ids, std::int64_t length,
              const std::vector<std::int32_t>& seq_lens) override;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tinylm
