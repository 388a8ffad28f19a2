#include "launch_gemm.cuh"
#include "ternary_wgmma.cuh"

namespace tinylm::cuda {
namespace {

/// What a launch must know of the current GPU.
struct Gpu {
  int device = 0, num_sms = 0;
  cudaError_t error;
  Gpu() : error(cudaGetDevice(&device)) {
    if (error != cudaSuccess) return;
    error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  }
};

/// Clusters of this size that run at once.
template <typename Kernel>
cudaError_t clusters_at_once(Kernel kernel, int cluster, std::int64_t bytes, int num_sms,
                             int& found) {
  found = num_sms / cluster;
  if (cluster <= 2) return cudaSuccess;  // multiprocessors come in pairs
  if (const auto error = allow_shared_memory(kernel, bytes)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(found * cluster));
  config.blockDim = dim3(kWgmmaThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&found, kernel, &config);
}

template <int kFragments, int kRows, Activation kActivation, typename Y>
cudaError_t launch(const Product& p, const ProductPlan& plan, const Output<Y>& out, int num_sms,
                   cudaStream_t stream) {
  using Shape = WgmmaShape<kFragments, kRows>;
  const auto kernel = ternary_wgmma<Shape, kActivation, Y>;
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(WgmmaMemory<Shape>));
  const auto ceil_div = [](std::int64_t a, std::int64_t b) {
    return static_cast<int>((a + b - 1) / b);
  };
  const WgmmaArgs args{p.rows,
                       p.weight,
                       p.m,
                       num_blocks(p.k),
                       ceil_div(p.m, kRows),
                       ceil_div(out.n, Shape::kOutputs),
                       plan.k_parts,
                       plan.sharers,
                       p.limits};
  const int groups = args.num_row_tiles * ceil_div(args.num_output_tiles, plan.sharers);
  int clusters = groups;
  if (plan.k_parts == 1) {
    if (const auto error = clusters_at_once(kernel, plan.cluster(), kBytes, num_sms, clusters)) {
      return error;
    }
    clusters = std::min(clusters, groups);
  }
  return launch_early(kernel, dim3(static_cast<unsigned>(clusters * plan.cluster())), kWgmmaThreads,
                      kBytes, plan.cluster(), stream, args, out);
}

}  // namespace

template <Activation kActivation, typename Y>
cudaError_t launch_wgmma(const Product& p, const Output<Y>& out, cudaStream_t stream) {
  const Gpu gpu;
  if (gpu.error != cudaSuccess) return gpu.error;
  const ProductPlan plan = p.plan != nullptr ? *p.plan : plan_product(p.m, out.n, p.k, gpu.num_sms);
  if (!valid_plan(plan, p.k)) return cudaErrorInvalidValue;
  const auto run = [&](auto fragments, auto rows) {
    return launch<decltype(fragments)::value, decltype(rows)::value, kActivation>(
        p, plan, out, gpu.num_sms, stream);
  };
  using std::integral_constant;
  constexpr integral_constant<int, 1> kOne;
  constexpr integral_constant<int, 2> kTwo;
  if (plan.rows == 64) {
    constexpr integral_constant<int, 64> kRows;
    return plan.fragments == 1 ? run(kOne, kRows) : run(kTwo, kRows);
  }
  if (plan.rows == 128) {
    constexpr integral_constant<int, 128> kRows;
    return plan.fragments == 1 ? run(kOne, kRows) : run(kTwo, kRows);
  }
  return run(kOne, integral_constant<int, 256>{});
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
