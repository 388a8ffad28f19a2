#include "ort_api.h"

#include <atomic>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tinylm::ort {
namespace {

std::atomic<const OrtApi*> g_api{nullptr};  // sessions may be made on several threads

Tensor view(const OrtValue* value) {
  Tensor tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api().GetTensorTypeAndShape(value, &info));
  std::size_t rank = 0;
  OrtStatus* status = api().GetTensorElementType(info, &tensor.type);
  if (status == nullptr) status = api().GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    tensor.shape.resize(rank);
    status = api().GetDimensions(info, tensor.shape.data(), rank);
  }
  api().ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  void* data = nullptr;
  check(api().GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

std::runtime_error missing(const char* name, const char* type) {
  return std::runtime_error("attribute '" + std::string(name) + "' (" + type +
                            ") is required and missing.");
}

}  // namespace

void set_api(const OrtApi* api) { g_api.store(api); }
const OrtApi& api() { return *g_api.load(std::memory_order_relaxed); }

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw std::runtime_error(message);
}

std::int64_t Tensor::count() const {
  std::int64_t total = 1;
  for (const std::int64_t dim : shape) total *= dim;
  return total;
}

void release_pages(const Tensor& tensor, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data);
  const std::uintptr_t first = (begin + page - 1) / page * page;
  const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(bytes)) / page * page;
  // Only a hint: a system that can't follow it keeps the pages.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#else
  static_cast<void>(tensor);
  static_cast<void>(bytes);
#endif
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::string NodeInfo::name() const {
  std::size_t size = 0;
  check(api().KernelInfo_GetNodeName(info_, nullptr, &size));
  std::string name(size, '\0');
  check(api().KernelInfo_GetNodeName(info_, name.data(), &size));
  name.resize(size == 0 ? 0 : size - 1);  // the size counts the end mark
  return name;
}

std::int64_t NodeInfo::int_attribute(const char* name) const {
  std::int64_t value = 0;
  OrtStatus* status = api().KernelInfoGetAttribute_int64(info_, name, &value);
  if (!found(status, name, "int")) throw missing(name, "int");
  return value;
}

float NodeInfo::float_attribute(const char* name) const {
  float value = 0.0F;
  OrtStatus* status = api().KernelInfoGetAttribute_float(info_, name, &value);
  if (!found(status, name, "float")) throw missing(name, "float");
  return value;
}

float NodeInfo::float_attribute(const char* name, float otherwise) const {
  float value = otherwise;
  OrtStatus* status = api().KernelInfoGetAttribute_float(info_, name, &value);
  return found(status, name, "float") ? value : otherwise;
}

std::string NodeInfo::string_attribute(const char* name, const char* otherwise) const {
  std::size_t size = 0;
  OrtStatus* status = api().KernelInfoGetAttribute_string(info_, name, nullptr, &size);
  if (!found(status, name, "string")) return otherwise;
  std::string value(size, '\0');
  check(api().KernelInfoGetAttribute_string(info_, name, value.data(), &size));
  value.resize(size == 0 ? 0 : size - 1);
  return value;
}

bool NodeInfo::found(OrtStatus* status, const char* name, const char* type) const {
  if (status == nullptr) return true;
  api().ReleaseStatus(status);
  // ONNX Runtime answers alike to an attribute that is missing and to one of another type.
  std::int64_t integer = 0;
  float number = 0.0F;
  std::size_t size = 0;
  for (OrtStatus* other : {api().KernelInfoGetAttribute_int64(info_, name, &integer),
                           api().KernelInfoGetAttribute_float(info_, name, &number),
                           api().KernelInfoGetAttribute_string(info_, name, nullptr, &size)}) {
    if (other == nullptr) {
      throw std::runtime_error("attribute '" + std::string(name) + "' must be of type " + type +
                               ", found another type.");
    }
    api().ReleaseStatus(other);
  }
  return false;
}

bool NodeInfo::has_input(std::size_t index) const {
  std::size_t count = 0;
  check(api().KernelInfo_GetInputCount(info_, &count));
  if (index >= count) return false;
  std::size_t size = 0;
  check(api().KernelInfo_GetInputName(info_, index, nullptr, &size));
  return size > 1;  // an input that is left out has an empty name
}

Tensor NodeInfo::constant(std::size_t index, const char* name) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  OrtStatus* status = api().KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value);
  if (status != nullptr || is_constant == 0 || value == nullptr) {
    if (status != nullptr) api().ReleaseStatus(status);
    throw std::runtime_error(std::string(name) +
                             " must be a constant initializer, because it is re-packed when the "
                             "session is made; found a value that the graph computes or takes.");
  }
  return view(value);
}

Tensor Context::input(std::size_t index) const {
  const OrtValue* value = nullptr;
  check(api().KernelContext_GetInput(context_, index, &value));
  return view(value);
}

void* Context::output(std::size_t index, const std::vector<std::int64_t>& shape) const {
  OrtValue* value = nullptr;
  check(api().KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  void* data = nullptr;
  check(api().GetTensorMutableData(value, &data));
  return data;
}

cpu::Parallel Context::parallel() const {
  cpu::Parallel parallel;
  parallel.pool = context_;
  parallel.run = [](void* pool, std::size_t count, void (*task)(void*, std::size_t), void* data) {
    check(api().KernelContext_ParallelFor(static_cast<OrtKernelContext*>(pool), task, count, 0,
                                          data));
  };
  return parallel;
}

void require_shape(const char* name, const Tensor& tensor,
                   const std::vector<std::int64_t>& expected, const char* letters) {
  if (tensor.shape == expected) return;
  throw std::runtime_error(std::string(name) + " " + letters + ": expected " +
                           shape_text(expected) + " to fit the other inputs, found " +
                           shape_text(tensor.shape) + ".");
}

}  // namespace tinylm::ort
