// What launchers share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "types.h"

namespace tinylm::cuda {

/// Lets a kernel have `bytes` of shared memory, where that is more than every kernel may have.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, std::int64_t bytes) {
  constexpr std::int64_t kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
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
