#include "tensors.h"

#include <algorithm>
#include <stdexcept>

namespace tinylm::plugins {

using nvinfer1::DataType;
using nvinfer1::Dims;

cuda::DataType element_type(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return cuda::DataType::kFloat;
    case DataType::kHALF:
      return cuda::DataType::kHalf;
    case DataType::kBF16:
      return cuda::DataType::kBFloat16;
    default:
      throw std::invalid_argument("activations must be float, half or bfloat16, found type " +
                                  std::to_string(static_cast<int>(type)) + ".");
  }
}

std::string to_string(const Dims& dims) {
  std::string text = "[";
  for (std::int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
  }
  return text + "]";
}

void require_shape(const char* tensor, const Dims& found,
                   const std::vector<std::int64_t>& expected) {
  bool fits = static_cast<std::size_t>(found.nbDims) == expected.size();
  std::string wanted = "[";
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (fits && expected[i] >= 0 && found.d[i] >= 0) fits = found.d[i] == expected[i];
    wanted += (i == 0 ? "" : ", ") + (expected[i] < 0 ? "any" : std::to_string(expected[i]));
  }
  if (!fits) {
    throw std::invalid_argument("input '" + std::string(tensor) + "' must have shape " + wanted +
                                "], found " + to_string(found) + ".");
  }
}

bool is_linear(const nvinfer1::PluginTensorDesc& desc, DataType type) {
  return desc.format == nvinfer1::TensorFormat::kLINEAR && desc.type == type;
}

bool is_linear_activation(const nvinfer1::PluginTensorDesc& desc) {
  const std::initializer_list<DataType> types{DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
  return std::any_of(types.begin(), types.end(),
                     [&](DataType type) { return is_linear(desc, type); });
}

std::int64_t num_rows(const Dims& dims) {
  std::int64_t rows = 1;
  for (std::int32_t i = 0; i + 1 < dims.nbDims; ++i) rows *= dims.d[i];
  return rows;
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + ".");
  }
}

}  // namespace tinylm::plugins
