#include "launch_fused.cuh"

#include "launch.cuh"
#include "product.cuh"
#include "ternary_fused_mma.cuh"
#include "ternary_fused_wgmma.cuh"

namespace tinylm::cuda {
namespace {

int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

template <typename T>
RowSource<T> row_source(const BitLinearParams& p) {
  return {static_cast<const T*>(p.x), p.norm_weight, p.eps, static_cast<int>(p.k), p.gated};
}

template <int kRowBlocks, int kVectors, Activation kActivation, typename T>
cudaError_t launch_mma(const BitLinearParams& p, const Output<T>& out, int num_sms,
                       cudaStream_t stream) {
  const int tiles = ceil_div(p.n, 16), blocks = num_blocks(p.k);
  const int each = std::min(ceil_div(tiles, num_sms), kFusedWarps);
  const FusedWeights weights{p.weight, blocks, tiles, each, std::min(kFusedWarps / each, blocks)};
  const auto grid = round_up(ceil_div(tiles, each), kRowBlocks);
  return launch_early(ternary_fused_mma<kRowBlocks, kVectors, kActivation, T>,
                      dim3(static_cast<unsigned>(grid)), kFusedThreads,
                      std::int64_t{kRowBlocks} * row_block_bytes<kActivation, false>(blocks),
                      kRowBlocks, stream, row_source<T>(p), static_cast<int>(p.m), weights, out);
}

template <int kVectors, Activation kActivation, typename T>
cudaError_t launch_wide(const BitLinearParams& p, const Output<T>& out, int k_parts,
                        cudaStream_t stream) {
  const int tiles = ceil_div(p.n, 64), blocks = num_blocks(p.k);
  const FusedWeights weights{p.weight, blocks, tiles, 4 / k_parts, k_parts};
  const dim3 grid(static_cast<unsigned>(round_up(ceil_div(tiles, 4 / k_parts), kFusedRowBlocks)),
                  static_cast<unsigned>(ceil_div(p.m, kFusedRows)));
  return launch_early(ternary_fused_wgmma<kVectors, kActivation, T>, grid, kFusedThreads,
                      fused_wgmma_bytes<kActivation>(blocks), kFusedRowBlocks, stream,
                      row_source<T>(p), static_cast<int>(p.m), weights, out);
}

/// Warpgroups that share K, at most as many as leave one thread block a multiprocessor; 0 if there
/// are too many tiles in any case.
int choose_k_parts(std::int64_t m, std::int64_t n, std::int64_t k, int num_sms) {
  for (int k_parts = 4; k_parts > 0; k_parts /= 2) {
    const std::int64_t blocks = round_up(ceil_div(ceil_div(n, 64), 4 / k_parts), kFusedRowBlocks) *
                                ceil_div(m, kFusedRows);
    if (k_parts <= num_blocks(k) && blocks <= num_sms) return k_parts;
  }
  return 0;
}

}  // namespace

template <Activation kActivation, typename T>
cudaError_t launch_fused(const BitLinearParams& p, const Output<T>& out, bool& launched,
                         cudaStream_t stream) {
  constexpr std::int64_t kFewRows = 16, kFewInputs = 1024, kSomeInputs = 3072;
  constexpr std::int64_t kMostFewRowsBytes = 160 * 1024;
  launched = false;
  if (p.plan != nullptr || p.m < 2 || !is_hopper()) return cudaSuccess;
  int num_sms = 0;
  if (const auto error = count_multiprocessors(num_sms)) return error;
  if (p.m <= kFewRows) {
    const std::int64_t bytes = round_up(p.m, 8) * num_digits(kActivation) * round_up(p.k, 128);
    if (p.k > 4096 || bytes > kMostFewRowsBytes) return cudaSuccess;
    launched = true;
    const auto launch = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      if (p.m <= 8) return launch_mma<1, kVectors, kActivation>(p, out, num_sms, stream);
      return launch_mma<2, kVectors, kActivation>(p, out, num_sms, stream);
    };
    if (p.k <= kFewInputs) return launch(std::integral_constant<int, 4>{});
    if (p.k <= kSomeInputs) return launch(std::integral_constant<int, 12>{});
    return launch(std::integral_constant<int, 16>{});
  }
  // fp8 tensor cores take half precision only, and more rows than are summed exactly.
  constexpr bool kExists = kActivation == Activation::kInt8 || sizeof(T) == 2;
  if constexpr (kExists) {
    if (p.k > kSomeInputs || row_layout(p.m) != RowLayout::kSwizzled) return cudaSuccess;
    const int k_parts = choose_k_parts(p.m, p.n, p.k, num_sms);
    if (k_parts == 0) return cudaSuccess;
    launched = true;
    if (p.k <= kFewInputs) return launch_wide<4, kActivation>(p, out, k_parts, stream);
    return launch_wide<12, kActivation>(p, out, k_parts, stream);
  }
  return cudaSuccess;
}

#define TINYLM_INSTANTIATE(activation, T)                                                         \
  template cudaError_t launch_fused<Activation::activation>(const BitLinearParams&,               \
                                                            const Output<T>&, bool&, cudaStream_t)
TINYLM_INSTANTIATE(kInt8, float);
TINYLM_INSTANTIATE(kInt8, __half);
TINYLM_INSTANTIATE(kInt8, __nv_bfloat16);
TINYLM_INSTANTIATE(kFp8E4m3, float);
TINYLM_INSTANTIATE(kFp8E4m3, __half);
TINYLM_INSTANTIATE(kFp8E4m3, __nv_bfloat16);
#undef TINYLM_INSTANTIATE

}  // namespace tinylm::cuda
