// What launchers share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "types.h"

namespace tinylm::cuda {

/// Lets a kernel have `bytes` of shared memory, where that is more than every kernel may have.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, std::int64_t bytes) {
  constexpr std::int64_t kAlwaysAllowed = 24 * 1024;  // 48 KiB, less what is declared in the kernel
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

/// Of the current GPU.
inline cudaError_t get_attribute(cudaDeviceAttr attribute, int& value) {
  int device = 0;
  if (const auto error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(&value, attribute, device);
}
inline cudaError_t count_multiprocessors(int& count) {
  return get_attribute(cudaDevAttrMultiProcessorCount, count);
}
/// Dynamic shared memory that a thread block may have.
inline cudaError_t max_shared_memory(int& bytes) {
  return get_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, bytes);
}

/// Whether the current GPU, Hopper or newer, lets a kernel begin before the one before it ends.
inline bool can_launch_early() {
  int major = 0;
  return get_attribute(cudaDevAttrComputeCapabilityMajor, major) == cudaSuccess && major >= 9;
}

/// Launches a kernel that may begin before the stream's kernel before it ends, and so calls
/// wait_for_previous_kernel(); clusters of `cluster` thread blocks.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, std::int64_t bytes,
                         int cluster, cudaStream_t stream, Arguments... arguments) {
  if (const auto error = allow_shared_memory(kernel, bytes)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  if (can_launch_early()) {
    auto& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    auto& size = attributes[config.numAttrs++];
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  config.attrs = attributes;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

/// Calls f(T{}) with the element type.
template <typename F>
cudaError_t with_type(DataType type, F f) {
  switch (type) {
    case DataType::kFloat:
      return f(float{});
    case DataType::kHalf:
      return f(__half{});
    case DataType::kBFloat16:
      return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace tinylm::cuda
