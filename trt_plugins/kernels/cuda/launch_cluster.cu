#include "latent_cluster.cuh"
#include "launch.cuh"
#include "launch_cluster.cuh"

namespace tinylm::cuda {

namespace {

template <typename Kernel>
ClusterCounts count_clusters(Kernel kernel, int bytes) {
  // Without this consent 16 is refused.
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                       cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  ClusterCounts counts{};
  for (int i = 0; i < kNumClusterSizes; ++i) {
    const auto size = static_cast<unsigned>(kClusterSizes[i]);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {size, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size);
    config.blockDim = dim3(kClusterThreads);
    config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess) {
      counts.of_size[i] = count;
    }
  }
  cudaGetLastError();  // a size that was refused is no error of the launch to come
  return counts;
}

template <int kRank, int kRope, typename T>
cudaError_t launch_cluster_of(const LatentArgs<T>& args, std::int64_t batch, cudaStream_t stream) {
  const int groups = (args.num_heads + kClusterHeads - 1) / kClusterHeads;
  const auto kernel = latent_cluster<kRank, kRope, T>;
  constexpr int kBytes = ClusterMemory<kRank, kRope>::kBytes;
  constexpr int kMostBytes = 227 * 1024;  // of a thread block of sm_90
  static_assert(kBytes <= kMostBytes, "shared memory");
  if (const auto error = allow_shared_memory(kernel, kBytes)) return error;
  // Asked once, of the first GPU: asking takes longer than the kernel.
  static const ClusterCounts counts = count_clusters(kernel, kBytes);
  const int blocks = cluster_blocks(batch * groups, counts);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups),
                  static_cast<unsigned>(batch));
  return launch_early(kernel, grid, kClusterThreads, kBytes, blocks, stream, args);
}

template <int kRank, typename T>
cudaError_t launch_cluster_rank(const LatentArgs<T>& args, std::int64_t batch,
                                cudaStream_t stream) {
  if (args.rope_dim == 16) return launch_cluster_of<kRank, 16>(args, batch, stream);
  if (args.rope_dim == 32) return launch_cluster_of<kRank, 32>(args, batch, stream);
  if (args.rope_dim == 64) return launch_cluster_of<kRank, 64>(args, batch, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

template <typename T>
cudaError_t launch_cluster(const LatentArgs<T>& args, std::int64_t batch, cudaStream_t stream) {
  switch (args.rank) {
    case 64:
      return launch_cluster_rank<64>(args, batch, stream);
    case 128:
      return launch_cluster_rank<128>(args, batch, stream);
    case 192:
      return launch_cluster_rank<192>(args, batch, stream);
    case 256:
      return launch_cluster_rank<256>(args, batch, stream);
    case 384:
      return launch_cluster_rank<384>(args, batch, stream);
    case 512:
      return launch_cluster_rank<512>(args, batch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template cudaError_t launch_cluster(const LatentArgs<__half>&, std::int64_t, cudaStream_t);
template cudaError_t launch_cluster(const LatentArgs<__nv_bfloat16>&, std::int64_t, cudaStream_t);

}  // namespace tinylm::cuda
