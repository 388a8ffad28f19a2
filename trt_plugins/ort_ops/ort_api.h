/// @file ort_api.h
/// ONNX Runtime's C API with errors as exceptions.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "parallel.h"

namespace tinylm::ort {

/// Oldest ONNX Runtime interface that has what the ops use (KernelContext_ParallelFor); any
/// ONNX Runtime since 1.17 offers it.
inline constexpr std::uint32_t kApiVersion = 17;

/// Keeps the interface that ONNX Runtime handed over.
void set_api(const OrtApi* api);
const OrtApi& api();

/// @throws std::runtime_error The status holds an error; its message. Frees the status.
void check(OrtStatus* status);

/// Runs body() and turns what it throws into a status, for functions that ONNX Runtime calls.
template <typename Body>
OrtStatus* guarded(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return api().CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api().CreateStatus(ORT_FAIL, "unknown error in the TinyLM ops");
  }
}

/// A tensor that ONNX Runtime owns.
struct Tensor {
  const void* data = nullptr;
  std::vector<std::int64_t> shape;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
  std::int64_t count() const;
};

/// Tells the system that a constant has been re-packed and won't be read again soon: the pages of a
/// mapped weights file then leave this process's memory. What they hold stays valid.
void release_pages(const Tensor& tensor, std::int64_t bytes);

/// Returns "[2, 3]".
std::string shape_text(const std::vector<std::int64_t>& shape);

/// A node when its kernel is made.
class NodeInfo {
 public:
  explicit NodeInfo(const OrtKernelInfo* info) : info_(info) {}

  std::string name() const;
  std::int64_t int_attribute(const char* name) const;
  float float_attribute(const char* name) const;
  float float_attribute(const char* name, float otherwise) const;
  std::string string_attribute(const char* name, const char* otherwise) const;
  /// Whether an optional input is given.
  bool has_input(std::size_t index) const;
  /// @throws std::runtime_error The input is computed by the graph.
  Tensor constant(std::size_t index, const char* name) const;

 private:
  /// Whether an attribute was read; takes the status of the attempt.
  /// @throws std::runtime_error The attribute is of another type.
  bool found(OrtStatus* status, const char* name, const char* type) const;

  const OrtKernelInfo* info_;
};

/// A node while it runs.
class Context {
 public:
  explicit Context(OrtKernelContext* context) : context_(context) {}

  Tensor input(std::size_t index) const;
  void* output(std::size_t index, const std::vector<std::int64_t>& shape) const;
  /// ONNX Runtime's own threads.
  cpu::Parallel parallel() const;

 private:
  OrtKernelContext* context_;
};

/// @throws std::runtime_error Names the tensor, the expected and the found shape.
void require_shape(const char* name, const Tensor& tensor,
                   const std::vector<std::int64_t>& expected, const char* letters);

}  // namespace tinylm::ort
