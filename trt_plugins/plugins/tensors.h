/// @file tensors.h
/// Checks of a plugin's tensors, with messages that name the tensor, the expected and the found.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "types.h"

namespace tinylm::plugins {

/// The kernels' name of a floating point type.
/// @throws std::invalid_argument Another type than float, half and bfloat16.
cuda::DataType element_type(nvinfer1::DataType type);

std::string to_string(const nvinfer1::Dims& dims);

/// Checks a shape.
/// @param expected Sizes; -1 where any fits.
/// @throws std::invalid_argument It has another rank or other sizes.
void require_shape(const char* tensor, const nvinfer1::Dims& found,
                   const std::vector<std::int64_t>& expected);

/// Whether position `pos` of a plugin's tensors is of a type and in the linear format.
bool is_linear(const nvinfer1::PluginTensorDesc& desc, nvinfer1::DataType type);

/// The same for activations: any of element_type()'s types.
bool is_linear_activation(const nvinfer1::PluginTensorDesc& desc);

/// Product of all sizes but the last.
std::int64_t num_rows(const nvinfer1::Dims& dims);

/// @throws std::runtime_error A CUDA call failed.
void check_cuda(cudaError_t error, const char* what);

}  // namespace tinylm::plugins
