/// @file swiglu.h
/// tinylm::SwiGLU on the CPU: silu(gate) * up, silu computed in float64 and rounded once.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "parallel.h"

namespace tinylm::cpu {

/// y[i] = silu(gate[i]) * up[i].
/// @param gate, up, y `count` elements of `type`; y may be gate or up.
void swiglu(const void* gate, const void* up, void* y, std::int64_t count, FloatType type,
            const Parallel& parallel);

}  // namespace tinylm::cpu
