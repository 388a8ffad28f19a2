#include "launch_gemm.cuh"
#include "ternary_square.cuh"

namespace tinylm::cuda {
namespace {

template <Tiling kTiling, Activation kActivation, typename Y>
cudaError_t launch(const Product& p, const Output<Y>& out, int num_sms, cudaStream_t stream) {
  using Shape = SquareShape<kTiling>;
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(SquareMemory<Shape>));
  static_assert(kBytes <= 227 * 1024);
  const WgmmaArgs args = wgmma_args(p, out.n, Shape::kRows, Shape::kOutputs);
  const int tiles = args.num_row_tiles * args.num_output_tiles;
  return launch_early(ternary_square<Shape, kActivation, Y>,
                      dim3(static_cast<unsigned>(std::min(tiles, num_sms))), kWgmmaThreads, kBytes,
                      1, stream, args, out);
}

}  // namespace

template <Activation kActivation, typename Y>
cudaError_t launch_square(const Product& p, Tiling tiling, const Output<Y>& out, int num_sms,
                          cudaStream_t stream) {
  if (tiling == Tiling::kTurns) {
    return launch<Tiling::kTurns, kActivation>(p, out, num_sms, stream);
  }
  return launch<Tiling::kWide, kActivation>(p, out, num_sms, stream);
}

template cudaError_t launch_square<Activation::kInt8>(const Product&, Tiling,
                                                      const Output<std::int32_t>&, int,
                                                      cudaStream_t);
template cudaError_t launch_square<Activation::kInt8>(const Product&, Tiling, const Output<float>&,
                                                      int, cudaStream_t);
template cudaError_t launch_square<Activation::kInt8>(const Product&, Tiling, const Output<__half>&,
                                                      int, cudaStream_t);
template cudaError_t launch_square<Activation::kInt8>(const Product&, Tiling,
                                                      const Output<__nv_bfloat16>&, int,
                                                      cudaStream_t);
template cudaError_t launch_square<Activation::kFp8E4m3>(const Product&, Tiling,
                                                         const Output<__half>&, int, cudaStream_t);
template cudaError_t launch_square<Activation::kFp8E4m3>(const Product&, Tiling,
                                                         const Output<__nv_bfloat16>&, int,
                                                         cudaStream_t);

}  // namespace tinylm::cuda
