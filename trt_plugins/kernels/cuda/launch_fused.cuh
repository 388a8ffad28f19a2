// Whether the one launch of ternary_fused_mma or ternary_fused_wgmma does a layer's product.
#pragma once

#include "ternary_gemm.h"
#include "epilogue.cuh"

namespace tinylm::cuda {

/// Launches it where it pays: on Hopper, with few rows, or some rows of few inputs.
/// @param launched Whether it did.
template <Activation kActivation, typename T>
cudaError_t launch_fused(const BitLinearParams& p, const Output<T>& out, bool& launched,
                         cudaStream_t stream);

}  // namespace tinylm::cuda
