#include "launch_gemm.cuh"
#include "ternary_wgmma.cuh"

namespace tinylm::cuda {
namespace {

template <int kRows, Activation kActivation, typename Y>
cudaError_t launch(const Product& p, const ProductPlan& plan, const Output<Y>& out, int num_sms,
                   cudaStream_t stream) {
  using Shape = WgmmaShape<kRows>;
  const auto kernel = ternary_wgmma<Shape, kActivation, Y>;
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(WgmmaMemory<Shape>));
  static_assert(kBytes <= 227 * 1024);
  const WgmmaArgs args = wgmma_args(p, out.n, kRows, kPlanOutputs, plan.k_parts);
  const int tiles = args.num_row_tiles * args.num_output_tiles;
  const int at_once = plan.k_parts == 1 ? std::min(tiles, num_sms) : tiles;
  return launch_early(kernel, dim3(static_cast<unsigned>(at_once * plan.k_parts)), kWgmmaThreads,
                      kBytes, plan.k_parts, stream, args, out);
}

}  // namespace

template <Activation kActivation, typename Y>
cudaError_t launch_wgmma(const Product& p, const Output<Y>& out, cudaStream_t stream) {
  int num_sms = 0;
  if (const auto error = count_multiprocessors(num_sms)) return error;
  const ProductPlan plan = p.plan != nullptr ? *p.plan : plan_product(p.m, out.n, p.k, num_sms);
  if (!valid_plan(plan, p.k)) return cudaErrorInvalidValue;
  if (plan.tiling != Tiling::kThin) {
    return launch_square<kActivation>(p, plan.tiling, out, num_sms, stream);
  }
  if (plan.rows == 64) return launch<64, kActivation>(p, plan, out, num_sms, stream);
  if (plan.rows == 128) return launch<128, kActivation>(p, plan, out, num_sms, stream);
  return launch<256, kActivation>(p, plan, out, num_sms, stream);
}

template cudaError_t launch_wgmma<Activation::kInt8>(const Product&, const Output<std::int32_t>&,
                                                     cudaStream_t);
template cudaError_t launch_wgmma<Activation::kInt8>(const Product&, const Output<float>&,
                                                     cudaStream_t);
template cudaError_t launch_wgmma<Activation::kInt8>(const Product&, const Output<__half>&,
                                                     cudaStream_t);
template cudaError_t launch_wgmma<Activation::kInt8>(const Product&, const Output<__nv_bfloat16>&,
                                                     cudaStream_t);
template cudaError_t launch_wgmma<Activation::kFp8E4m3>(const Product&, const Output<__half>&,
                                                        cudaStream_t);
template cudaError_t launch_wgmma<Activation::kFp8E4m3>(const Product&,
                                                        const Output<__nv_bfloat16>&, cudaStream_t);

}  // namespace tinylm::cuda
