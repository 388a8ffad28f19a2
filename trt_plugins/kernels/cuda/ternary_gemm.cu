#include "launch_gemm.cuh"
#include "ternary_gemm.h"
#include "ternary_gemv_row.cuh"
#include "ternary_gemv_rows.cuh"

namespace tinylm::cuda {
namespace {

bool valid(const BitLinearParams& p) {
  const std::int64_t most = p.activation == Activation::kInt8 ? kMaxInputs : kMaxFp8Inputs;
  return p.m >= 0 && p.n > 0 && p.k > 0 && p.k % 4 == 0 && p.k <= most;
}

template <typename T>
RowSource<T> row_source(const BitLinearParams& p) {
  return {static_cast<const T*>(p.x), p.norm_weight, p.eps, static_cast<int>(p.k), p.gated};
}

/// The order of rows that bit_linear()'s kernels take.
RowLayout layout_of(const BitLinearParams& p, int num_sms) {
  // fp8 tensor cores are not exact: float32 tensors keep to digits.
  const bool digits = p.activation == Activation::kFp8E4m3 && p.type == DataType::kFloat;
  const bool gemv = p.plan == nullptr && takes_gemv(p.m, p.n, p.activation, num_sms);
  return digits || gemv ? RowLayout::kFragments : row_layout(p.m);
}

/// Whether ternary_gemv_rows is faster, whose thread blocks quantise all rows, each for itself.
bool takes_rows(const BitLinearParams& p, int num_sms) {
  const bool int8 = p.activation == Activation::kInt8;
  const bool one_tile = p.n <= std::int64_t{16} * num_sms;  // of outputs, a thread block
  const int most = one_tile ? (int8 ? 4 : 3) : (int8 ? 2 : 0);
  return p.m <= most && p.k <= kMostRowsInputs && is_hopper();
}

template <int kThreads_, int kVectors_, int kBlocks_>
struct QuantizeShape {
  static constexpr int kThreads = kThreads_;  // of a row
  static constexpr int kVectors = kVectors_;  // of four values for each
  static constexpr int kBlocks = kBlocks_;    // thread blocks of a multiprocessor
};

template <Activation kActivation, bool kRaw, typename T>
cudaError_t launch_quantize(const BitLinearParams& p, const QuantizedRows& rows, int num_sms,
                            cudaStream_t stream) {
  constexpr std::int64_t kManyRows = 512;
  const std::int64_t k = round_up(p.k, kBlockInputs);
  const auto launch = [&](auto shape) {
    using S = decltype(shape);
    const std::int64_t most = static_cast<std::int64_t>(num_sms) * S::kBlocks;
    const auto kernel =
        p.gated ? quantize_rows<S::kThreads, S::kVectors, S::kBlocks, true, kActivation, kRaw, T>
                : quantize_rows<S::kThreads, S::kVectors, S::kBlocks, false, kActivation, kRaw, T>;
    return launch_early(kernel, dim3(static_cast<unsigned>(std::min(p.m, most))), S::kThreads, 0, 1,
                        stream, row_source<T>(p), p.m, num_blocks(p.k), rows);
  };
  // Few rows are the sooner done the more threads each has; many take fewer instructions with few.
  if (p.m >= kManyRows) {
    if (k <= 1024) return launch(QuantizeShape<64, 4, 16>{});
    if (k <= 2048) return launch(QuantizeShape<128, 4, 8>{});
    if (k <= 3072) return launch(QuantizeShape<192, 4, 5>{});
    if (k <= 4096) return launch(QuantizeShape<256, 4, 4>{});
    if (k <= 8192) return launch(QuantizeShape<256, 8, 3>{});
  }
  if (k <= 1024) return launch(QuantizeShape<256, 1, 4>{});
  if (k <= 4096) return launch(QuantizeShape<512, 2, 2>{});
  if (k <= 8192 && p.m <= kFewRows) return launch(QuantizeShape<1024, 2, 1>{});
  if (k <= 8192) return launch(QuantizeShape<512, 4, 2>{});
  if (k <= 16384) return launch(QuantizeShape<1024, 4, 1>{});
  return launch_early(quantize_long_rows<kActivation, kRaw, T>, dim3(static_cast<unsigned>(p.m)),
                      kQuantizeThreads, p.k * static_cast<std::int64_t>(sizeof(float)), 1, stream,
                      row_source<T>(p), num_blocks(p.k), rows);
}

template <Activation kActivation, typename T>
cudaError_t launch_quantize(const BitLinearParams& p, const QuantizedRows& rows, int num_sms,
                            cudaStream_t stream) {
  if constexpr (kActivation == Activation::kFp8E4m3 && !std::is_same_v<T, float>) {
    if (rows.layout == RowLayout::kSwizzled) {
      return launch_quantize<kActivation, true, T>(p, rows, num_sms, stream);
    }
  }
  return launch_quantize<kActivation, false, T>(p, rows, num_sms, stream);
}

template <typename Shape, Activation kActivation, typename T>
cudaError_t launch_row(const BitLinearParams& p, const Output<T>& out, int num_sms,
                       cudaStream_t stream) {
  const auto tiles = static_cast<int>((p.n + 15) / 16);
  // Few thread blocks for each multiprocessor, since each quantises the row.
  const int few = Shape::kTogether * num_sms;
  const int each = std::min((tiles + few - 1) / few, Shape::kMostTiles);
  const int blocks = num_blocks(p.k), parts = warps_of_tile(blocks, each, Shape::kWarps);
  const RowWeights weights{p.weight, blocks, tiles, each, parts, blocks / parts};
  return launch_early(ternary_gemv_row<Shape, kActivation, T>,
                      dim3(static_cast<unsigned>((tiles + each - 1) / each)), Shape::kThreads,
                      row_shared_bytes<Shape, kActivation>(weights), 1, stream, row_source<T>(p),
                      weights, out);
}

template <Activation kActivation, typename T>
cudaError_t launch_rows(const BitLinearParams& p, const Output<T>& out, int num_sms,
                        cudaStream_t stream) {
  const auto tiles = static_cast<int>((p.n + 15) / 16);
  const int each = std::min((tiles + num_sms - 1) / num_sms, kRowsWarps), blocks = num_blocks(p.k);
  const RowsWeights weights{p.weight, blocks, tiles, each, std::min(kRowsWarps / each, blocks)};
  return launch_early(ternary_gemv_rows<kActivation, T>,
                      dim3(static_cast<unsigned>((tiles + each - 1) / each)), kRowsThreads,
                      rows_shared_bytes<kActivation>(blocks), 1, stream, row_source<T>(p),
                      static_cast<int>(p.m), weights, out);
}

template <Activation kActivation, typename T>
cudaError_t run(const BitLinearParams& p, void* workspace, cudaStream_t stream) {
  const Output<T> out{static_cast<T*>(p.y), static_cast<const T*>(p.residual), p.weight_scale, p.n};
  int num_sms = 0;
  if (const auto error = count_multiprocessors(num_sms)) return error;
  if (p.m == 1) {
    if (p.k <= 1024) return launch_row<RowShape<128, 2>, kActivation>(p, out, num_sms, stream);
    if (p.k <= 2048) return launch_row<RowShape<256, 2>, kActivation>(p, out, num_sms, stream);
    if (p.k <= 3072) return launch_row<RowShape<384, 2>, kActivation>(p, out, num_sms, stream);
    if (p.k <= 4096) return launch_row<RowShape<256, 4>, kActivation>(p, out, num_sms, stream);
    if (p.k <= 8192) return launch_row<RowShape<256, 8>, kActivation>(p, out, num_sms, stream);
    if (p.k <= 16384) return launch_row<RowShape<512, 8>, kActivation>(p, out, num_sms, stream);
  }
  if (takes_rows(p, num_sms)) return launch_rows<kActivation>(p, out, num_sms, stream);
  const QuantizedRows rows = cut_workspace(workspace, p.m, p.k, kActivation, layout_of(p, num_sms));
  if (const auto error = launch_quantize<kActivation, T>(p, rows, num_sms, stream)) return error;
  return launch_product<kActivation>({rows, p.weight, p.m, p.k, {}, p.plan}, out, stream);
}

}  // namespace

std::int64_t bit_linear_workspace(std::int64_t m, std::int64_t k, Activation activation) {
  const std::int64_t rows = round_up(m, 8);
  const std::int64_t bytes = num_digits(activation) * rows * round_up(k, kBlockInputs);
  return round_up(bytes, kAlignment) + round_up(rows * 4, kAlignment) * 2;
}

cudaError_t bit_linear(const BitLinearParams& p, void* workspace, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  return with_type(p.type, [&](auto element) {
    using T = decltype(element);
    if (p.activation == Activation::kInt8) return run<Activation::kInt8, T>(p, workspace, stream);
    return run<Activation::kFp8E4m3, T>(p, workspace, stream);
  });
}

cudaError_t accumulate_int8(const std::int8_t* q, const std::uint8_t* weight, std::int64_t m,
                            std::int64_t n, std::int64_t k, std::int32_t* sums, void* workspace,
                            cudaStream_t stream, const ProductPlan* plan) {
  if (m < 0 || n <= 0 || k <= 0 || k % 4 != 0 || k > kMaxInputs) return cudaErrorInvalidValue;
  if (m == 0) return cudaSuccess;
  const QuantizedRows rows = cut_workspace(workspace, m, k, Activation::kInt8);
  if (const auto error = launch_arrange(q, nullptr, m, k, rows, {}, stream)) return error;
  const Output<std::int32_t> out{sums, nullptr, nullptr, n};
  return launch_product<Activation::kInt8>({rows, weight, m, k, {}, plan}, out, stream);
}

}  // namespace tinylm::cuda
