#include "swiglu_op.h"

#include "swiglu.h"

namespace tinylm::ort {

void SwiGLUKernel::compute(const Context& context) const {
  const Tensor gate = context.input(0);
  const Tensor up = context.input(1);
  require_shape("up", up, gate.shape, "[..., K]");
  cpu::swiglu(gate.data, up.data, context.output(0, gate.shape), gate.count(), type_,
              context.parallel());
}

const OpSpec& swiglu_spec() {
  static const OpSpec spec{
      "SwiGLU", {{"gate", "T", "[..., K]"}, {"up", "T", "[..., K]"}}, {{"y", "T", "[..., K]"}}, {}};
  return spec;
}

}  // namespace tinylm::ort
