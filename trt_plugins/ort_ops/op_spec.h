/// @file op_spec.h
/// The op contract as the library has it; tests hold it to export/ops.py.
#pragma once

#include <onnxruntime_c_api.h>

#include <vector>

namespace tinylm::ort {

/// An input or output. `type` is an ONNX type string, or "T" for the graph's floating point type.
struct Parameter {
  const char* name;
  const char* type;
  const char* shape;
  bool optional = false;
};

/// An attribute; `otherwise` is its default as text, nullptr if it is required.
struct Attribute {
  const char* name;
  const char* type;
  const char* otherwise;
};

struct OpSpec {
  const char* name;
  std::vector<Parameter> inputs;
  std::vector<Parameter> outputs;
  std::vector<Attribute> attributes;
};

const OpSpec& bit_linear_spec();
const OpSpec& int8_linear_spec();
const OpSpec& flash_mla_spec();
const OpSpec& swiglu_spec();

/// ONNX Runtime's number for a type of the contract, with `t` for "T".
ONNXTensorElementDataType element_type(const char* type, ONNXTensorElementDataType t);

}  // namespace tinylm::ort
