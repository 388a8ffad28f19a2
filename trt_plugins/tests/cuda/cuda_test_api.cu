// The kernels' launchers as C functions, for ctypes (export/cuda_kernels.py). Every
// function returns a cudaError_t.
#include "cluster_plan.h"
#include "latent_attention.h"
#include "lm_head.h"
#include "ternary_gemm.h"

#define TINYLM_TEST_API extern "C" __attribute__((visibility("default")))

using namespace tinylm::cuda;

TINYLM_TEST_API std::int64_t tinylm_bit_linear_workspace(std::int64_t m, std::int64_t k,
                                                         int activation) {
  return bit_linear_workspace(m, k, static_cast<Activation>(activation));
}

/// rows, k_parts; nullptr for the launcher's choice.
static ProductPlan plan_of(const std::int32_t* plan) {
  return plan == nullptr ? ProductPlan{}
                         : ProductPlan{plan[0], plan[1], static_cast<Tiling>(plan[2])};
}

TINYLM_TEST_API int tinylm_bit_linear(int type, int activation, std::int64_t m, std::int64_t n,
                                      std::int64_t k, int gated, const void* x,
                                      const void* residual, void* y, const std::uint8_t* weight,
                                      const float* weight_scale, const float* norm_weight,
                                      float eps, const std::int32_t* plan, void* workspace,
                                      void* stream) {
  const auto given = plan_of(plan);
  const BitLinearParams params{static_cast<DataType>(type),
                               static_cast<Activation>(activation),
                               m,
                               n,
                               k,
                               gated != 0,
                               x,
                               residual,
                               y,
                               weight,
                               weight_scale,
                               norm_weight,
                               eps,
                               plan == nullptr ? nullptr : &given};
  return bit_linear(params, workspace, static_cast<cudaStream_t>(stream));
}

TINYLM_TEST_API int tinylm_accumulate_int8(const std::int8_t* q, const std::uint8_t* weight,
                                           std::int64_t m, std::int64_t n, std::int64_t k,
                                           std::int32_t* sums, const std::int32_t* plan,
                                           void* workspace, void* stream) {
  const auto given = plan_of(plan);
  return accumulate_int8(q, weight, m, n, k, sums, workspace, static_cast<cudaStream_t>(stream),
                         plan == nullptr ? nullptr : &given);
}

/// Sizes of an attention layer, in the order of export/cuda_kernels.py.
struct AttentionSizes {
  std::int64_t num_heads, nope_dim, rope_dim, value_dim, latent_rank, batch, length, capacity;
  float theta, eps, softmax_scale;
  int type;
};

static LatentAttentionShape shape_of(const AttentionSizes& sizes) {
  return {sizes.num_heads,   sizes.nope_dim, sizes.rope_dim, sizes.value_dim,
          sizes.latent_rank, sizes.theta,    sizes.eps,      sizes.softmax_scale};
}

TINYLM_TEST_API std::int64_t tinylm_latent_attention_workspace(const AttentionSizes* sizes) {
  return latent_attention_workspace(shape_of(*sizes), static_cast<DataType>(sizes->type),
                                    sizes->batch, sizes->length, sizes->capacity);
}

TINYLM_TEST_API const char* tinylm_latent_attention_unsupported(const AttentionSizes* sizes) {
  return unsupported(shape_of(*sizes));
}

/// Thread blocks that share a row in decode, or 0 where clusters don't take the shape.
/// @param counts Clusters of 2, 4, 8 and 16 that a GPU holds.
TINYLM_TEST_API int tinylm_decode_cluster(const AttentionSizes* sizes, const int* counts) {
  const LatentAttentionShape shape = shape_of(*sizes);
  if (!cluster_takes(shape)) return 0;
  const std::int64_t groups = (shape.num_heads + kClusterHeads - 1) / kClusterHeads;
  return cluster_blocks(sizes->batch * groups, {{counts[0], counts[1], counts[2], counts[3]}});
}

TINYLM_TEST_API int tinylm_latent_attention(const AttentionSizes* sizes, const void* qkv,
                                            const float* norm_weight, const std::uint8_t* kv_b,
                                            const float* kv_b_scale, const std::int32_t* past_lens,
                                            const std::int32_t* seq_lens, std::int8_t* latent,
                                            float* scale, void* rope, void* y, void* workspace,
                                            void* stream) {
  const LatentAttentionParams params{static_cast<DataType>(sizes->type),
                                     sizes->batch,
                                     sizes->length,
                                     sizes->capacity,
                                     qkv,
                                     norm_weight,
                                     kv_b,
                                     kv_b_scale,
                                     past_lens,
                                     seq_lens,
                                     latent,
                                     scale,
                                     rope,
                                     y};
  return latent_attention(shape_of(*sizes), params, workspace, static_cast<cudaStream_t>(stream));
}

TINYLM_TEST_API int tinylm_lm_head(int type, std::int64_t batch, std::int64_t length,
                                   std::int64_t hidden, std::int64_t vocab, const void* x,
                                   const void* table, const float* norm_weight,
                                   const std::int32_t* seq_lens, float* logits, float eps,
                                   void* stream) {
  const LmHeadParams params{static_cast<DataType>(type),
                            batch,
                            length,
                            hidden,
                            vocab,
                            x,
                            table,
                            norm_weight,
                            seq_lens,
                            logits,
                            eps};
  return lm_head(params, static_cast<cudaStream_t>(stream));
}
