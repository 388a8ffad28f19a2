#include "engine_manifest.h"

#include <stdexcept>

#include "json_file.h"

namespace tinylm {
namespace {

constexpr int kFormatVersion = 1;
constexpr const char* kWayOut = "Build the engine with `tinylm-export trt DIR --out ENGINE_DIR`.";

std::string text(const JsonFile& json, const char* name) {
  const Json& found = json.field(name);
  if (found.is_string()) return found;
  throw json.error(std::string(name) + " must be a string, found " + found.dump() + ".");
}

bool boolean(const JsonFile& json, const char* name) {
  const Json& found = json.field(name);
  if (found.is_boolean()) return found;
  throw json.error(std::string(name) + " must be true or false, found " + found.dump() + ".");
}

[[noreturn]] void refuse(const EngineManifest& manifest, const std::string& what,
                         const std::string& expected, const std::string& found) {
  throw std::runtime_error(manifest.path.string() + ": the engine was built for " + what + " " +
                           expected + ", found " + found +
                           ". Build it again on this machine with `tinylm-export trt`.");
}

}  // namespace

EngineManifest EngineManifest::load(const std::filesystem::path& directory) {
  EngineManifest manifest;
  manifest.path = directory / kManifestFile;
  const JsonFile json(manifest.path, kWayOut);
  json.require("format_version", kFormatVersion);
  manifest.tensorrt_version = text(json, "tensorrt_version");
  manifest.compute_capability = text(json, "compute_capability");
  manifest.gpu = text(json, "gpu");
  manifest.dense = boolean(json, "dense");
  manifest.embedded_plugins = boolean(json, "embedded_plugins");
  if (!manifest.dense) manifest.plugin_version = text(json, "plugin_version");
  return manifest;
}

void EngineManifest::check_tensorrt(const std::string& version) const {
  if (version != tensorrt_version) refuse(*this, "TensorRT", tensorrt_version, version);
}

void EngineManifest::check_gpu(const std::string& name, const std::string& found) const {
  if (found == compute_capability) return;
  refuse(*this, "a GPU of compute capability", compute_capability + " (" + gpu + ")",
         found + " (" + name + ")");
}

void EngineManifest::check_plugins(const std::string& version) const {
  if (version != plugin_version) {
    refuse(*this, "TinyLM's plugins of version", plugin_version, version);
  }
}

}  // namespace tinylm
