// The launch of latent_cluster().
#pragma once

#include "cluster_plan.h"
#include "latent_append.cuh"

namespace tinylm::cuda {

/// Enqueues a step of one new token a row; cluster_takes() the shape. T is half or bfloat16.
template <typename T>
cudaError_t launch_cluster(const LatentArgs<T>& args, std::int64_t batch, cudaStream_t stream);

}  // namespace tinylm::cuda
