// Chooses the kernel for rows that are quantised already.
#pragma once

#include <algorithm>

#include "gemv_plan.h"
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

/// Whether m rows go by ternary_gemv where the GPU might have wgmma.
inline bool takes_gemv(std::int64_t m, std::int64_t n, Activation activation, int num_sms) {
  return m <= kFewRows ||
         (is_hopper() && gemv_beats_wgmma(m, n, num_digits(activation) > 1, num_sms));
}

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

template <typename Shape, typename Y>
cudaError_t launch_gemv(const Product& p, const GemvPlan& plan, const Output<Y>& out,
                        cudaStream_t stream) {
  const GemvWeights weights{p.weight, num_blocks(p.k), static_cast<int>((out.n + 15) / 16)};
  // No more thread blocks on a multiprocessor than planned: those that begin early would gather
  // where there is room, and others would have nothing to do.
  constexpr std::int64_t kReserved = 1024;  // of each thread block, by CUDA
  int shared_memory = 0;
  if (const auto error =
          get_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, shared_memory)) {
    return error;
  }
  const std::int64_t bytes = std::max(Shape::shared_bytes(weights.num_blocks),
                                      shared_memory / (plan.together + 1) - kReserved);
  const dim3 grid(static_cast<unsigned>(plan.parts), static_cast<unsigned>(plan.row_blocks));
  return launch_early(ternary_gemv<Shape, Y>, grid, Shape::kThreads, bytes, 1, stream,
                      p.rows.activations, p.rows.digit_bytes, RowScales{p.rows.s, p.rows.sums},
                      weights, out, static_cast<int>(p.m));
}

template <Activation kActivation, typename Y>
cudaError_t launch_gemv(const Product& p, const Output<Y>& out, int num_sms, cudaStream_t stream) {
  constexpr bool kHasDigits = num_digits(kActivation) > 1;
  const GemvPlan plan = plan_gemv(p.m, out.n, p.k, kHasDigits, num_sms);
  const auto launch = [&](auto shape) {
    return launch_gemv<decltype(shape)>(p, plan, out, stream);
  };
  if constexpr (!kHasDigits) {
    if (plan.row_tiles == 4) return launch(GemvShape<kActivation, 4, 2, 8>{});
  }
  if (plan.row_tiles == 2) return launch(GemvShape<kActivation, 2, 2, 8>{});
  if (plan.output_tiles == 2) return launch(GemvShape<kActivation, 1, 2, 8>{});
  if (plan.warps == 16) return launch(GemvShape<kActivation, 1, 1, 16>{});
  return launch(GemvShape<kActivation, 1, 1, 8>{});
}

}  // namespace detail

/// Enqueues the product.
template <Activation kActivation, typename Y>
cudaError_t launch_product(const Product& p, const Output<Y>& out, cudaStream_t stream) {
  // Warps n x m, fragments n x m, stages, thread blocks on a multiprocessor.
  using Small = TileShape<2, 2, 2, 4, 4, 3>;  // 64 outputs x 64 rows
  using Large = TileShape<4, 2, 2, 8, 4, 2>;  // 128 outputs x 128 rows
  constexpr std::int64_t kEnoughBlocks = 100, kMostGemvTraffic = 24 << 20;
  if (p.rows.layout == RowLayout::kSwizzled) {
    // Exact fp8 products of float32 tensors have digits.
    constexpr bool kExists = kActivation == Activation::kInt8 || sizeof(Y) == 2;
    if constexpr (kExists) return launch_wgmma<kActivation>(p, out, stream);
    return cudaErrorInvalidValue;
  }
  int num_sms = 0;
  if (const auto error = count_multiprocessors(num_sms)) return error;
  const std::int64_t traffic = (out.n + 15) / 16 * p.m * p.k;  // 16 outputs read all activations
  if (takes_gemv(p.m, out.n, kActivation, num_sms) || traffic <= kMostGemvTraffic) {
    return detail::launch_gemv<kActivation>(p, out, num_sms, stream);
  }
  const std::int64_t large_blocks = (p.m + 127) / 128 * ((out.n + 127) / 128);
  if (large_blocks >= kEnoughBlocks) return detail::launch_tile<Large, kActivation>(p, out, stream);
  return detail::launch_tile<Small, kActivation>(p, out, stream);
}

}  // namespace tinylm::cuda
