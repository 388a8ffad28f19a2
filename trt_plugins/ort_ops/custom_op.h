/// @file custom_op.h
/// Makes an OrtCustomOp of an OpSpec and a kernel class.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "float_type.h"
#include "op_spec.h"
#include "ort_api.h"

namespace tinylm::ort {

/// The kernels' name of ONNX Runtime's type.
inline cpu::FloatType float_type(ONNXTensorElementDataType type) {
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) return cpu::FloatType::kFloat16;
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) return cpu::FloatType::kBFloat16;
  return cpu::FloatType::kFloat;
}

/// One op for one floating point type.
/// @tparam Kernel Has Kernel(const NodeInfo&, cpu::FloatType), void compute(const Context&) const
///     and static const OpSpec& spec().
template <typename Kernel>
class CustomOp : public OrtCustomOp {
 public:
  explicit CustomOp(ONNXTensorElementDataType t) : OrtCustomOp{}, t_(t) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::spec().name; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::spec().inputs.size(); };
    GetInputType = [](const OrtCustomOp* op, std::size_t i) {
      return element_type(Kernel::spec().inputs[i].type, static_cast<const CustomOp*>(op)->t_);
    };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t i) {
      return Kernel::spec().inputs[i].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::spec().outputs.size(); };
    GetOutputType = [](const OrtCustomOp* op, std::size_t i) {
      return element_type(Kernel::spec().outputs[i].type, static_cast<const CustomOp*>(op)->t_);
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = create;
    KernelComputeV2 = compute;
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  /// Times that any kernel of the op ran in this process.
  static std::uint64_t calls() { return counter().load(); }

 private:
  static OrtStatus* create(const OrtCustomOp* op, const OrtApi* ort_api, const OrtKernelInfo* info,
                           void** kernel) {
    set_api(ort_api);
    const NodeInfo node(info);
    return guarded([&] {
      try {
        *kernel = new Kernel(node, float_type(static_cast<const CustomOp*>(op)->t_));
      } catch (const std::exception& error) {
        throw std::runtime_error(std::string(Kernel::spec().name) + " node '" + node.name() +
                                 "': " + error.what());
      }
    });
  }

  // ONNX Runtime puts the node's name before the message.
  static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    return guarded([&] {
      static_cast<const Kernel*>(kernel)->compute(Context(context));
      counter().fetch_add(1, std::memory_order_relaxed);
    });
  }

  static std::atomic<std::uint64_t>& counter() {
    static std::atomic<std::uint64_t> count{0};
    return count;
  }

  ONNXTensorElementDataType t_;
};

}  // namespace tinylm::ort
