/// @file model_config.h
/// What an exported directory says of its model: config.json and export.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace tinylm {

/// The fields of config.json that a runtime needs; the schema is tinylm/config.py's.
struct ModelConfig {
  std::int64_t vocab_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t max_seq_len = 0;  ///< Longest sequence, prompt and new tokens together.
  std::int64_t latent_rank = 0;  ///< R, width of a cached latent.
  std::int64_t rope_dim = 0;     ///< P, width of a cached rotated key.
  std::optional<std::int64_t> bos_token_id;
  std::optional<std::int64_t> eos_token_id;
  std::optional<std::int64_t> pad_token_id;

  /// Reads config.json.
  /// @throws std::runtime_error Missing, not JSON, another model_type or format_version, or a field
  ///     that is missing or out of range.
  static ModelConfig load(const std::filesystem::path& path);
};

/// The fields of export.json that a runtime needs; the schema is export/to_onnx.py's ExportInfo.
struct ExportInfo {
  std::string task;         ///< "text-generation-with-past" or "text-generation".
  bool all_logits = false;  ///< Whether the graph gives logits at every position.

  /// Reads export.json.
  /// @throws std::runtime_error Missing, not JSON, or a field that is missing.
  static ExportInfo load(const std::filesystem::path& path);
};

}  // namespace tinylm
