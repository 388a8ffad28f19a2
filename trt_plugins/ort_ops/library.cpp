// The library's entry points: what ONNX Runtime calls, and what tells a program which kernels ran.

#include <cstring>
#include <stdexcept>
#include <string>

#include "bit_linear_op.h"
#include "custom_op.h"
#include "flash_mla_op.h"
#include "int8_linear_op.h"
#include "isa.h"
#include "swiglu_op.h"

#define TINYLM_EXPORT extern "C" __attribute__((visibility("default")))

namespace tinylm::ort {
namespace {

constexpr const char* kDomain = "tinylm";
constexpr ONNXTensorElementDataType kFloatTypes[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                                     ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                                     ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};

template <typename Kernel>
void add_op(OrtCustomOpDomain* domain) {
  static const CustomOp<Kernel> ops[] = {CustomOp<Kernel>(kFloatTypes[0]),
                                         CustomOp<Kernel>(kFloatTypes[1]),
                                         CustomOp<Kernel>(kFloatTypes[2])};
  for (const OrtCustomOp& op : ops) check(api().CustomOpDomain_Add(domain, &op));
}

/// Made once and kept: sessions refer to it for as long as they live.
OrtCustomOpDomain* make_domain() {
  OrtCustomOpDomain* domain = nullptr;
  check(api().CreateCustomOpDomain(kDomain, &domain));
  add_op<BitLinearKernel>(domain);
  add_op<Int8LinearKernel>(domain);
  add_op<FlashMLAKernel>(domain);
  add_op<SwiGLUKernel>(domain);
  return domain;
}

void describe(const std::vector<Parameter>& parameters, const char* kind, std::string* text) {
  for (const Parameter& p : parameters) {
    *text += std::string("  ") + kind + '\t' + p.name + '\t' + p.type + '\t' + p.shape + '\t' +
             (p.optional ? "optional" : "required") + '\n';
  }
}

std::string describe_all() {
  std::string text;
  for (const OpSpec* spec :
       {&bit_linear_spec(), &int8_linear_spec(), &flash_mla_spec(), &swiglu_spec()}) {
    text += std::string("op\t") + spec->name + '\n';
    describe(spec->inputs, "input", &text);
    describe(spec->outputs, "output", &text);
    for (const Attribute& a : spec->attributes) {
      text += std::string("  attribute\t") + a.name + '\t' + a.type + '\t' +
              (a.otherwise == nullptr ? "required" : a.otherwise) + '\n';
    }
  }
  return text;
}

}  // namespace

ONNXTensorElementDataType element_type(const char* type, ONNXTensorElementDataType t) {
  const std::string name = type;
  if (name == "T") return t;
  if (name == "tensor(float)") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (name == "tensor(uint8)") return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  if (name == "tensor(int8)") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  if (name == "tensor(int32)") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

}  // namespace tinylm::ort

/// What SessionOptions.register_custom_ops_library() calls.
TINYLM_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace tinylm::ort;
  const OrtApi* found = base->GetApi(kApiVersion);
  if (found == nullptr) return nullptr;  // older than 1.17; ONNX Runtime has said so itself
  set_api(found);
  return guarded([&] {
    tinylm::cpu::active_isa();  // a bad TINYLM_CPU_ISA is told here, not in the middle of a model
    static OrtCustomOpDomain* const domain = make_domain();
    check(api().AddCustomOpDomain(options, domain));
  });
}

/// The library's version, the Python package's.
TINYLM_EXPORT const char* tinylm_version() { return TINYLM_VERSION; }

/// The instruction set in use, or the reason why none can be chosen.
TINYLM_EXPORT const char* tinylm_cpu_isa() {
  try {
    return tinylm::cpu::isa_name(tinylm::cpu::active_isa());
  } catch (const std::exception& error) {
    static const std::string message = error.what();
    return message.c_str();
  }
}

/// How often kernels of an op have run in this process; 0 for an unknown op.
TINYLM_EXPORT std::uint64_t tinylm_kernel_calls(const char* op) {
  using namespace tinylm::ort;
  const std::string name = op;
  if (name == bit_linear_spec().name) return CustomOp<BitLinearKernel>::calls();
  if (name == int8_linear_spec().name) return CustomOp<Int8LinearKernel>::calls();
  if (name == flash_mla_spec().name) return CustomOp<FlashMLAKernel>::calls();
  if (name == swiglu_spec().name) return CustomOp<SwiGLUKernel>::calls();
  return 0;
}

/// The op contract as the library has it, one op, input, output or attribute a line.
TINYLM_EXPORT const char* tinylm_op_specs() {
  static const std::string text = tinylm::ort::describe_all();
  return text.c_str();
}
