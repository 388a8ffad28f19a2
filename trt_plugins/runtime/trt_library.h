/// @file trt_library.h
/// TensorRT loaded at run time, its log as exceptions, and CUDA memory with owners. Private to the
/// library: no public header includes it.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>

namespace tinylm {

/// Environment variable that names the TensorRT library to load.
inline constexpr const char* kTrtLibraryVariable = "TINYLM_TENSORRT_LIBRARY";

/// Keeps TensorRT's errors for the exception that follows; prints nothing.
class TrtLogger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;

  /// Returns what was said since the last call.
  std::string last();

 private:
  std::mutex mutex_;
  std::string errors_;
};

/// Returns TensorRT's release, such as "10.6.0", loading the library when first called: the one
/// that TINYLM_TENSORRT_LIBRARY names, else the loader's libnvinfer.so of the headers' major
/// release.
/// @throws std::runtime_error It is not found, or no TensorRT.
std::string trt_version();

/// Makes a runtime of that library.
/// @throws std::runtime_error As trt_version(), or TensorRT makes none.
std::unique_ptr<nvinfer1::IRuntime> make_trt_runtime(TrtLogger& logger);

/// Loads the plugin library into this process, once, and registers its plugins.
/// @return Its version.
/// @throws std::runtime_error It is missing, no TinyLM library, or TensorRT refuses it.
std::string load_plugins(const std::filesystem::path& library, TrtLogger& logger);

/// @throws std::runtime_error The status is an error; says what failed.
void check(cudaError_t status, const char* what);

struct CudaFree {
  void operator()(void* memory) const { cudaFree(memory); }
};
struct CudaFreeHost {
  void operator()(void* memory) const { cudaFreeHost(memory); }
};
struct CudaGraphDestroy {
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
struct CudaStreamDestroy {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
using DeviceMemory = std::unique_ptr<void, CudaFree>;
using GraphHandle = std::unique_ptr<CUgraphExec_st, CudaGraphDestroy>;
using StreamHandle = std::unique_ptr<CUstream_st, CudaStreamDestroy>;
template <typename T>
using PinnedMemory = std::unique_ptr<T[], CudaFreeHost>;

/// Takes device memory, its bytes not set.
DeviceMemory device_memory(std::size_t num_bytes);

/// Takes host memory that the GPU can copy from and to without a staging buffer.
template <typename T>
PinnedMemory<T> pinned_memory(std::size_t count) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, count * sizeof(T)), "pinned host memory");
  return PinnedMemory<T>(static_cast<T*>(memory));
}

}  // namespace tinylm
