/// @file swiglu_op.h
/// Kernel of tinylm::SwiGLU.
#pragma once

#include "custom_op.h"

namespace tinylm::ort {

class SwiGLUKernel {
 public:
  SwiGLUKernel(const NodeInfo&, cpu::FloatType type) : type_(type) {}
  void compute(const Context& context) const;
  static const OpSpec& spec() { return swiglu_spec(); }

 private:
  cpu::FloatType type_;
};

}  // namespace tinylm::ort
