/// @file types.h
/// What the CUDA kernels' interfaces share. No CUDA header beyond the runtime's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tinylm::cuda {

/// Element type of activations.
enum class DataType { kFloat, kHalf, kBFloat16 };

/// Number format of quantised activations.
enum class Activation { kInt8, kFp8E4m3 };

/// Rounds up to a multiple.
inline constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Workspaces are cut into parts at this alignment.
inline constexpr std::int64_t kAlignment = 256;

}  // namespace tinylm::cuda
