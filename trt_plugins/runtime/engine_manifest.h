/// @file engine_manifest.h
/// What manifest.json says of an engine: for which machine it was built. Private to the library.
#pragma once

#include <filesystem>
#include <string>

namespace tinylm {

inline constexpr const char* kEngineFile = "model.engine";
inline constexpr const char* kManifestFile = "manifest.json";

/// The fields of manifest.json that a runtime needs; the schema is export/manifest.py's.
struct EngineManifest {
  std::string tensorrt_version;    ///< Such as "10.6.0".
  std::string compute_capability;  ///< Of the GPU, such as "9.0".
  std::string gpu;                 ///< Its name.
  std::string plugin_version;      ///< The plugin library's.
  bool embedded_plugins = false;   ///< Whether the engine holds the plugin library.
  bool dense = false;              ///< Whether it is the rival without plugins.

  /// Reads manifest.json.
  /// @throws std::runtime_error Missing, not JSON, of another format, or a field that is missing.
  static EngineManifest load(const std::filesystem::path& directory);

  /// @throws std::runtime_error TensorRT's version is another one than the engine was built with.
  void check_tensorrt(const std::string& version) const;

  /// @throws std::runtime_error The engine was built for another GPU.
  void check_gpu(const std::string& name, const std::string& found_capability) const;

  /// @throws std::runtime_error The plugin library is of another version.
  void check_plugins(const std::string& version) const;

  std::filesystem::path path;  ///< The file, for messages.
};

}  // namespace tinylm
