// Chooses the kernel for rows that are quantised already.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "quantize.cuh"
#include "ternary_gemv.cuh"
#include "ternary_tile.cuh"

namespace tinylm::cuda {

/// Brings int8 rows [m, k] into the order of fragments.
inline cudaError_t launch_arrange(const std::int8_t* q, const float* s, std::int64_t m,
                                  std::int64_t k, const QuantizedRows& out, const RowLimits& limits,
                                  cudaStream_t stream) {
  return launch_early(arrange_rows, dim3(static_cast<unsigned>(m)), kArrangeThreads, 0, 1, stream,
                      q, s, static_cast<int>(k), num_blocks(k), out, limits);
}

/// The product on Hopper, of swizzled rows (ternary_wgmma.cu).
template <Activation kActivation, typename Y>
cudaError_t launch_wgmma(const Product& p, const Output<Y>& out, cudaStream_t stream);

/// The same by square tiles of warpgroups (ternary_square.cu).
template <Activation kActivation, typename Y>
cudaError_t launch_square(const Product& p, Tiling tiling, const Output<Y>& out, int num_sms,
                          cudaStream_t stream);

/// Bytes that ternary_gemv reads: every 16 outputs read all activations again, from L2.
inline std::int64_t gemv_traffic(std::int64_t m, std::int64_t n, std::int64_t k) {
  return (n + 15) / 16 * m * k;
}
inline constexpr std::int64_t kMaxGemvTraffic = 24 << 20;       // against ternary_tile
inline constexpr std::int64_t kMaxHopperGemvTraffic = 8 << 20;  // against ternary_wgmma

namespace detail {

template <typename Shape, Activation kActivation, typename Y>
cudaError_t launch_tile(const Product& p, const Output<Y>& out, cudaStream_t stream) {
  const auto kernel = ternary_tile<Shape, kActivation, Y>;
  if (const auto error = allow_shared_memory(kernel, Shape::kSharedBytes)) return error;
  const dim3 grid(static_cast<unsigned>((p.m + Shape::kRows - 1) / Shape::kRows),
                  static_cast<unsigned>((out.n + Shape::kOutputs - 1) / Shape::kOutputs));
  kernel<<<grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(
      p.rows.activations, p.rows.digit_bytes, {p.rows.s, p.rows.sums}, p.weight, num_blocks(p.k),
      out, p.m, p.limits);
  return cudaGetLastError();
}

template <int kTiles, Activation kActivation, typename Y>
cudaError_t launch_gemv(const Product& p, const Output<Y>& out, cudaStream_t stream) {
  const GemvWeights weights{p.weight, num_blocks(p.k)};
  const dim3 blocks(static_cast<unsigned>((out.n + 15) / 16),
                    static_cast<unsigned>((p.m + 8 * kTiles - 1) / (8 * kTiles)));
  return launch_early(ternary_gemv<kActivation, kTiles, Y>, blocks, kGemvThreads, 0, 1, stream,
                      p.rows.activations, p.rows.digit_bytes, RowScales{p.rows.s, p.rows.sums},
                      weights, out, static_cast<int>(p.m));
}

}  // namespace detail

/// Enqueues the product.
template <Activation kActivation, typename Y>
cudaError_t launch_product(const Product& p, const Output<Y>& out, cudaStream_t stream) {
  // Warps n x m, fragments n x m, stages, thread blocks on a multiprocessor.
  using Small = TileShape<2, 2, 2, 4, 4, 3>;  // 64 outputs x 64 rows
  using Large = TileShape<4, 2, 2, 8, 4, 2>;  // 128 outputs x 128 rows
  constexpr std::int64_t kEnoughBlocks = 100;
  if (p.rows.layout == RowLayout::kSwizzled) {
    // Exact fp8 products of float32 tensors have digits.
    constexpr bool kExists = kActivation == Activation::kInt8 || sizeof(Y) == 2;
    if constexpr (kExists) return launch_wgmma<kActivation>(p, out, stream);
    return cudaErrorInvalidValue;
  }
  if (p.m <= 8) return detail::launch_gemv<1, kActivation>(p, out, stream);
  if (p.m <= 16) return detail::launch_gemv<2, kActivation>(p, out, stream);
  if (p.m <= 32) return detail::launch_gemv<4, kActivation>(p, out, stream);
  if (gemv_traffic(p.m, out.n, p.k) <= kMaxGemvTraffic) {
    return detail::launch_gemv<8, kActivation>(p, out, stream);
  }
  const std::int64_t large_blocks = (p.m + 127) / 128 * ((out.n + 127) / 128);
  if (large_blocks >= kEnoughBlocks) return detail::launch_tile<Large, kActivation>(p, out, stream);
  return detail::launch_tile<Small, kActivation>(p, out, stream);
}

}  // namespace tinylm::cuda
