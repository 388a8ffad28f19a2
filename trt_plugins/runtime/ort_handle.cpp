#include "ort_handle.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>

#ifndef TINYLM_ONNXRUNTIME_PATH
#define TINYLM_ONNXRUNTIME_PATH ""
#endif

namespace tinylm {
namespace {

std::string library_path() {
  const char* named = std::getenv(kOrtLibraryVariable);
  if (named != nullptr && *named != '\0') return named;
  const std::string configured = TINYLM_ONNXRUNTIME_PATH;
  std::error_code ignored;
  if (std::filesystem::exists(configured, ignored)) return configured;
  return "libonnxruntime.so.1";
}

const OrtApiBase& api_base() {
  static const OrtApiBase& base = []() -> const OrtApiBase& {
    const std::string path = library_path();
    const std::string way_out = std::string(". Set ") + kOrtLibraryVariable +
                                " to the path of libonnxruntime.so.1.*, which `pip install "
                                "onnxruntime` puts into the folder onnxruntime/capi.";
    // Never closed: sessions' threads may outlive every object here.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      throw std::runtime_error("ONNX Runtime can't be loaded: " + std::string(dlerror()) + way_out);
    }
    auto get_base =
        reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));  // POSIX allows
    if (get_base == nullptr) {
      throw std::runtime_error(path + ": no ONNX Runtime, OrtGetApiBase is missing" + way_out);
    }
    return *get_base();
  }();
  return base;
}

}  // namespace

std::string ort_version() { return api_base().GetVersionString(); }

const OrtApi& ort_api() {
  static const OrtApi& api = []() -> const OrtApi& {
    const OrtApi* found = api_base().GetApi(kOrtApiVersion);
    if (found == nullptr) {
      throw std::runtime_error("ONNX Runtime 1." + std::to_string(kOrtApiVersion) +
                               " or newer expected (C API version " +
                               std::to_string(kOrtApiVersion) + "), found " + ort_version() +
                               ". Install a newer one, or name it in " + kOrtLibraryVariable + ".");
    }
    return *found;
  }();
  return api;
}

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::unique_ptr<OrtStatus, OrtRelease<&OrtApi::ReleaseStatus>> owner(status);
  throw std::runtime_error(std::string("ONNX Runtime: ") + ort_api().GetErrorMessage(status));
}

}  // namespace tinylm
