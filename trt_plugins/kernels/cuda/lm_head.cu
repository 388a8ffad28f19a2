#include <algorithm>

#include "launch.cuh"
#include "lm_head.cuh"
#include "lm_head.h"

namespace tinylm::cuda {
namespace {

template <typename T>
HeadArgs<T> head_args(const LmHeadParams& p) {
  return {static_cast<const T*>(p.x),
          static_cast<const T*>(p.table),
          p.norm_weight,
          p.seq_lens,
          p.logits,
          p.eps,
          static_cast<int>(p.batch),
          static_cast<int>(p.length),
          static_cast<int>(p.hidden),
          static_cast<int>(p.vocab)};
}

template <typename Kernel, typename T>
cudaError_t launch(Kernel kernel, const HeadArgs<T>& args, int rows, int blocks,
                   cudaStream_t stream) {
  const auto bytes = static_cast<std::int64_t>(rows) * head_stride<T>(args.hidden) *
                     static_cast<std::int64_t>(sizeof(T));
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>((args.batch + rows - 1) / rows));
  return launch_early(kernel, grid, kHeadThreads, bytes, 1, stream, args);
}

template <int kTiles, typename T>
cudaError_t launch_tensor(const HeadArgs<T>& args, cudaStream_t stream) {
  constexpr int kOutputs = 16 * kHeadWarps;
  int num_sms = 0;
  if (const auto error = count_multiprocessors(num_sms)) return error;
  const auto kernel =
      args.hidden % 8 == 0 ? lm_head_tensor<kTiles, true, T> : lm_head_tensor<kTiles, false, T>;
  const int blocks = std::min((args.vocab + kOutputs - 1) / kOutputs, num_sms);
  return launch(kernel, args, 8 * kTiles, blocks, stream);
}

cudaError_t run(const HeadArgs<float>& args, cudaStream_t stream) {
  constexpr int kOutputs = kHeadFloatOutputs * kHeadWarps;
  const int blocks = (args.vocab + kOutputs - 1) / kOutputs;
  return launch(lm_head_float, args, kHeadFloatRows, blocks, stream);
}

template <typename T>
cudaError_t run(const HeadArgs<T>& args, cudaStream_t stream) {
  const std::int64_t row_bytes = head_stride<T>(args.hidden) * 2;
  int most = 0;
  if (const auto error = max_shared_memory(most)) return error;
  const auto fits = [&](int tiles) { return 8 * tiles * row_bytes <= most; };
  if (args.batch > 32 && fits(8)) return launch_tensor<8>(args, stream);
  if (args.batch > 16 && fits(4)) return launch_tensor<4>(args, stream);
  if (args.batch > 8 && fits(2)) return launch_tensor<2>(args, stream);
  return launch_tensor<1>(args, stream);
}

}  // namespace

cudaError_t lm_head(const LmHeadParams& p, cudaStream_t stream) {
  constexpr std::int64_t kMost = INT32_MAX;
  if (p.batch < 0 || p.length <= 0 || p.vocab <= 0 || p.hidden <= 0 || p.hidden % 4 != 0 ||
      p.hidden > kMaxHeadInputs || p.vocab > kMost || p.length > kMost || p.batch > kMost) {
    return cudaErrorInvalidValue;
  }
  if (p.batch == 0) return cudaSuccess;
  return with_type(p.type,
                   [&](auto element) { return run(head_args<decltype(element)>(p), stream); });
}

}  // namespace tinylm::cuda
