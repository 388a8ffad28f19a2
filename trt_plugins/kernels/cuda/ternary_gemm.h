/// @file ternary_gemm.h
/// tinylm::BitLinear on a GPU: [gate,] RMSNorm, absmax, quantise, exact product with ternary
/// weights, scale [, add]. Numerics: tinylm/quantization.py and tinylm/norm.py.
///
/// int8 activations give the exact sum q . code, whatever the kernel. So do fp8_e4m3 ones, as three
/// int8 digits of a fixed-point number, but for half-precision tensors of more than 32 rows on
/// Hopper: those are summed by fp8 tensor cores.
#pragma once

#include "product_plan.h"
#include "types.h"

namespace tinylm::cuda {

/// Largest K: a row of it fits into shared memory as float32.
inline constexpr std::int64_t kMaxInputs = 32768;
/// Largest K with fp8 activations: int32 holds every sum in units of 2^-9.
inline constexpr std::int64_t kMaxFp8Inputs = 8192;

/// Bytes of packed weights, see export/gpu_packing.py: N is padded to 16 and K to 128.
inline constexpr std::int64_t packed_bytes(std::int64_t n, std::int64_t k) {
  return round_up(n, 16) * round_up(k, 128) / 4;
}

/// Arguments of bit_linear(). Device pointers, aligned to 16 bytes. On Hopper the weights, their
/// scale and the norm's weights are read before the stream's kernel before has ended, if that
/// allows it (programmatic dependent launch): it must not be the one that writes them.
struct BitLinearParams {
  DataType type = DataType::kFloat;  ///< of x, y and residual
  Activation activation = Activation::kInt8;
  std::int64_t m = 0;                    ///< rows, 0 allowed
  std::int64_t n = 0;                    ///< outputs
  std::int64_t k = 0;                    ///< inputs, a multiple of 4
  bool gated = false;                    ///< x is [gate | up], the input silu(gate) * up
  const void* x = nullptr;               ///< [m, k], or [m, 2k] if gated
  const void* residual = nullptr;        ///< [m, n] to add to y, or nullptr; may be y
  void* y = nullptr;                     ///< [m, n]
  const std::uint8_t* weight = nullptr;  ///< packed_bytes(n, k)
  const float* weight_scale = nullptr;   ///< [n]
  const float* norm_weight = nullptr;    ///< [k], or nullptr for no norm
  float eps = 1e-5F;
  const ProductPlan* plan = nullptr;  ///< how a product on Hopper is cut, to try others
};

/// Bytes of workspace that bit_linear() needs for up to m rows.
std::int64_t bit_linear_workspace(std::int64_t m, std::int64_t k, Activation activation);

/// Enqueues the layer. Nothing is allocated; the same arguments give the same bits.
/// @param workspace bit_linear_workspace() bytes, aligned to kAlignment.
/// @return cudaErrorInvalidValue where a size is out of range, else what the launch gave.
cudaError_t bit_linear(const BitLinearParams& params, void* workspace, cudaStream_t stream);

/// The exact sums alone: int8 q [m, k] times the weights, int32 [m, n].
/// @param workspace bit_linear_workspace(m, k, kInt8) bytes.
cudaError_t accumulate_int8(const std::int8_t* q, const std::uint8_t* weight, std::int64_t m,
                            std::int64_t n, std::int64_t k, std::int32_t* sums, void* workspace,
                            cudaStream_t stream, const ProductPlan* plan = nullptr);

}  // namespace tinylm::cuda
