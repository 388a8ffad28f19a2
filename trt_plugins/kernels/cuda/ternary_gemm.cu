#include "launch_gemm.cuh"
#include "ternary_gemm.h"

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

template <Activation kActivation, typename T>
cudaError_t launch_quantize(const BitLinearParams& p, const QuantizedRows& rows,
                            cudaStream_t stream) {
  // Many short rows: a warp for each, which never waits for another.
  constexpr std::int64_t kManyRows = 512, kShort = 4096;
  const bool by_warp = p.m >= kManyRows && p.k <= kShort;
  const auto kernel =
      by_warp ? quantize_rows<32, kActivation, T> : quantize_rows<kQuantizeThreads, kActivation, T>;
  const std::int64_t rows_at_once = by_warp ? kQuantizeThreads / 32 : 1;
  const auto bytes = rows_at_once * p.k * static_cast<std::int64_t>(sizeof(float));
  if (const auto error = allow_shared_memory(kernel, bytes)) return error;
  kernel<<<static_cast<unsigned>((p.m + rows_at_once - 1) / rows_at_once), kQuantizeThreads, bytes,
           stream>>>(row_source<T>(p), p.m, num_blocks(p.k), rows);
  return cudaGetLastError();
}

template <Activation kActivation, typename T>
cudaError_t run(const BitLinearParams& p, void* workspace, cudaStream_t stream) {
  const Output<T> out{static_cast<T*>(p.y), static_cast<const T*>(p.residual), p.weight_scale, p.n};
  if (p.m == 1) {
    const auto kernel = ternary_gemv_fused<kActivation, T, T>;
    const std::int64_t bytes = p.k * static_cast<std::int64_t>(sizeof(float)) +
                               num_digits(kActivation) * round_up(p.k, kBlockInputs);
    if (const auto error = allow_shared_memory(kernel, bytes)) return error;
    kernel<<<static_cast<unsigned>((p.n + 15) / 16), kGemvThreads, bytes, stream>>>(
        row_source<T>(p), {p.weight, num_blocks(p.k)}, out);
    return cudaGetLastError();
  }
  const QuantizedRows rows = cut_workspace(workspace, p.m, p.k, kActivation);
  if (const auto error = launch_quantize<kActivation, T>(p, rows, stream)) return error;
  return launch_product<kActivation>({rows, p.weight, p.m, p.k, {}}, out, stream);
}

/// Back from the order of fragments to [m, k].
template <Activation kActivation>
__global__ void gather_quantized(QuantizedRows rows, void* q, float* s, int k, int blocks) {
  const std::int64_t row = blockIdx.x;
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    int value = 0;
    for (int digit = num_digits(kActivation) - 1; digit >= 0; --digit) {
      const std::int64_t at = activation_offset(row, i / 4 * 4, blocks) + i % 4;
      value =
          value * 256 + static_cast<std::int8_t>(rows.activations[digit * rows.digit_bytes + at]);
    }
    if (kActivation == Activation::kInt8) {
      static_cast<std::int8_t*>(q)[row * k + i] = static_cast<std::int8_t>(value);
    } else {
      static_cast<std::int32_t*>(q)[row * k + i] = value;
    }
  }
  if (threadIdx.x == 0) s[row] = rows.s[row];
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

cudaError_t quantize(const BitLinearParams& p, void* q, float* s, void* workspace,
                     cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  const QuantizedRows rows = cut_workspace(workspace, p.m, p.k, p.activation);
  return with_type(p.type, [&](auto element) {
    using T = decltype(element);
    const auto run_one = [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      if (const auto error = launch_quantize<kActivation, T>(p, rows, stream)) return error;
      gather_quantized<kActivation><<<static_cast<unsigned>(p.m), kQuantizeThreads, 0, stream>>>(
          rows, q, s, static_cast<int>(p.k), num_blocks(p.k));
      return cudaGetLastError();
    };
    if (p.activation == Activation::kInt8) {
      return run_one(std::integral_constant<Activation, Activation::kInt8>{});
    }
    return run_one(std::integral_constant<Activation, Activation::kFp8E4m3>{});
  });
}

cudaError_t accumulate_int8(const std::int8_t* q, const std::uint8_t* weight, std::int64_t m,
                            std::int64_t n, std::int64_t k, std::int32_t* sums, void* workspace,
                            cudaStream_t stream) {
  if (m < 0 || n <= 0 || k <= 0 || k % 4 != 0 || k > kMaxInputs) return cudaErrorInvalidValue;
  if (m == 0) return cudaSuccess;
  const QuantizedRows rows = cut_workspace(workspace, m, k, Activation::kInt8);
  if (const auto error = launch_arrange(q, nullptr, m, k, rows, {}, stream)) return error;
  const Output<std::int32_t> out{sums, nullptr, nullptr, n};
  return launch_product<Activation::kInt8>({rows, weight, m, k, {}}, out, stream);
}

}  // namespace tinylm::cuda
