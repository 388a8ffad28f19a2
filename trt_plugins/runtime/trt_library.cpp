#include "trt_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <stdexcept>

namespace tinylm {
namespace {

std::string library_path() {
  const char* named = std::getenv(kTrtLibraryVariable);
  if (named != nullptr && *named != '\0') return named;
  return "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
}

struct TrtLibrary {
  std::string path = library_path();
  void* handle = nullptr;

  TrtLibrary() {
    const std::string way_out =
        std::string(". Set ") + kTrtLibraryVariable + " to the path of libnvinfer.so." +
        std::to_string(NV_TENSORRT_MAJOR) + ", or LD_LIBRARY_PATH to its folder.";
    // Never closed: TensorRT's objects may outlive every object here. Global, because the plugin
    // library takes TensorRT's symbols from this process.
    handle = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (handle == nullptr) {
      throw std::runtime_error("TensorRT can't be loaded: " + std::string(dlerror()) + way_out);
    }
    for (const char* name :
         {"createInferRuntime_INTERNAL", "getInferLibVersion", "getPluginRegistry"}) {
      if (dlsym(handle, name) == nullptr) {
        throw std::runtime_error(path + ": no TensorRT, " + name + " is missing" + way_out);
      }
    }
  }

  template <typename Function>
  Function function(const char* name) const {
    return reinterpret_cast<Function>(dlsym(handle, name));  // POSIX allows
  }

  /// 100600 for 10.6.0.
  std::int32_t version() const { return function<std::int32_t (*)()>("getInferLibVersion")(); }
};

const TrtLibrary& trt_library() {
  static const TrtLibrary library;
  return library;
}

}  // namespace

void TrtLogger::log(Severity severity, const char* message) noexcept try {
  if (severity > Severity::kERROR) return;
  const std::lock_guard lock(mutex_);
  errors_ += (errors_.empty() ? "" : "; ") + std::string(message);
} catch (...) {  // out of memory: the exception that follows has no reason to name
}

std::string TrtLogger::last() {
  const std::lock_guard lock(mutex_);
  std::string text = errors_.empty() ? "it gives no reason" : errors_;
  errors_.clear();
  return text;
}

std::string trt_version() {
  const std::int32_t version = trt_library().version();
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

std::unique_ptr<nvinfer1::IRuntime> make_trt_runtime(TrtLogger& logger) {
  const TrtLibrary& library = trt_library();
  using Create = void* (*)(void* logger, std::int32_t version);
  // The library's own version, not the headers': a release takes programs of others of its major.
  void* made = library.function<Create>("createInferRuntime_INTERNAL")(&logger, library.version());
  if (made == nullptr) {
    throw std::runtime_error(library.path + ": TensorRT makes no runtime: " + logger.last());
  }
  return std::unique_ptr<nvinfer1::IRuntime>(static_cast<nvinfer1::IRuntime*>(made));
}

std::string load_plugins(const std::filesystem::path& library, TrtLogger& logger) {
  static std::mutex mutex;
  static std::map<std::string, std::string> versions;  // by path
  const std::string way_out =
      ". Give the path of libtinylm_trt.so, which `tinylm-export native build` makes.";
  if (!std::filesystem::is_regular_file(library)) {
    throw std::runtime_error(library.string() + ": not found" + way_out);
  }
  const std::string path = std::filesystem::canonical(library).string();
  const std::lock_guard lock(mutex);
  if (const auto known = versions.find(path); known != versions.end()) return known->second;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw std::runtime_error("the plugins can't be loaded: " + std::string(dlerror()) + way_out);
  }
  const auto version = reinterpret_cast<const char* (*)()>(dlsym(handle, "tinylm_version"));
  if (version == nullptr) {
    throw std::runtime_error(path + ": no TinyLM plugins, tinylm_version is missing" + way_out);
  }
  // The process's registry, not a runtime's own: every runtime looks there.
  auto& registry = *trt_library().function<nvinfer1::IPluginRegistry* (*)()>("getPluginRegistry")();
  if (registry.loadLibrary(path.c_str()) == nullptr) {
    throw std::runtime_error(path + ": TensorRT can't load the plugins: " + logger.last() +
                             way_out);
  }
  return versions[path] = version();
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

DeviceMemory device_memory(std::size_t num_bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, num_bytes), "device memory");
  return DeviceMemory(memory);
}

}  // namespace tinylm
