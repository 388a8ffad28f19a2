#include <algorithm>
#include <cmath>
#include <type_traits>

#include "latent_attention.h"
#include "latent_decode.cuh"
#include "latent_expand.cuh"
#include "latent_prefill.cuh"
#include "latent_prefill_wgmma.cuh"
#include "latent_tensor.cuh"
#include "launch_cluster.cuh"
#include "launch_gemm.cuh"
#include "ternary_gemm.h"

namespace tinylm::cuda {
namespace {

// Query tokens that are in the latent space at once, and parts that they leave.
constexpr std::int64_t kSliceTokens = 256;
constexpr std::int64_t kWantedBlocks = 264;  // two for each multiprocessor of an H100
constexpr std::int64_t kMaxParts = kSliceTokens + kWantedBlocks;

std::int64_t head_groups(const LatentAttentionShape& shape) {
  return (shape.num_heads + kDecodeHeads - 1) / kDecodeHeads;
}

ChunkLayout chunk_layout(const LatentAttentionShape& shape, std::int64_t tokens,
                         std::int64_t capacity) {
  const std::int64_t tiles = (capacity + kDecodeTokens - 1) / kDecodeTokens;
  const std::int64_t wanted = kWantedBlocks / (tokens * head_groups(shape));
  const std::int64_t chunks = std::clamp<std::int64_t>(wanted, 1, tiles);
  const std::int64_t chunk_tiles = (tiles + chunks - 1) / chunks;
  return {static_cast<int>(chunk_tiles * kDecodeTokens),
          static_cast<int>((tiles + chunk_tiles - 1) / chunk_tiles)};
}

/// Offsets of the latent path's parts in the workspace.
struct LatentWorkspace {
  std::int64_t sums, stats, bytes;  // the queries lie at its start
  LatentWorkspace(const LatentAttentionShape& shape, DataType type) {
    const std::int64_t wide = type == DataType::kFloat ? 8 : 4;
    const std::int64_t width = shape.latent_rank + shape.rope_dim;
    sums = round_up(kSliceTokens * shape.num_heads * width * wide, kAlignment);
    stats = sums + round_up(kMaxParts * shape.num_heads * shape.latent_rank * wide, kAlignment);
    bytes = stats + round_up(kMaxParts * shape.num_heads * 2 * wide, kAlignment);
  }
};

template <typename T>
LatentArgs<T> make_args(const LatentAttentionShape& shape, const LatentAttentionParams& p) {
  LatentArgs<T> args{};
  args.num_heads = static_cast<int>(shape.num_heads);
  args.nope_dim = static_cast<int>(shape.nope_dim);
  args.rope_dim = static_cast<int>(shape.rope_dim);
  args.value_dim = static_cast<int>(shape.value_dim);
  args.rank = static_cast<int>(shape.latent_rank);
  args.eps = shape.eps;
  args.softmax_scale = shape.softmax_scale;
  for (std::int64_t i = 0; i < shape.rope_dim / 2; ++i) {
    const double exponent = -static_cast<double>(2 * i) / static_cast<double>(shape.rope_dim);
    args.frequencies.values[i] =
        static_cast<float>(std::pow(static_cast<double>(shape.theta), exponent));
  }
  args.length = static_cast<int>(p.length);
  args.capacity = static_cast<int>(p.capacity);
  args.qkv = static_cast<const T*>(p.qkv);
  args.width = static_cast<int>(shape.q_width() + shape.latent_rank + shape.rope_dim);
  args.norm_weight = p.norm_weight;
  args.kv_b = p.kv_b;
  args.kv_b_scale = p.kv_b_scale;
  args.past_lens = p.past_lens;
  args.seq_lens = p.seq_lens;
  args.latent = p.latent;
  args.scale = p.scale;
  args.rope = static_cast<T*>(p.rope);
  args.y = static_cast<T*>(p.y);
  return args;
}

template <typename T>
cudaError_t append(const LatentArgs<T>& args, std::int64_t batch, float2* angles,
                   cudaStream_t stream) {
  constexpr std::int64_t kWarps = kAppendThreads / 32;
  const std::int64_t tokens = batch * args.length;
  const dim3 grid(static_cast<unsigned>((tokens + kWarps - 1) / kWarps));
  const auto bytes = static_cast<std::int64_t>(kWarps * args.rank * sizeof(float));
  return launch_early(latent_append<T>, grid, kAppendThreads, bytes, 1, stream, args, tokens,
                      angles);
}

/// Calls f(kernel, threads, bytes of shared memory) with what attends over one chunk.
template <typename T, typename F>
cudaError_t with_attend(const LatentArgs<T>& args, F f) {
  using W = wide_t<T>;
  if constexpr (!std::is_same_v<T, float>) {
    const int bytes = TensorMemory{args.rank, args.rope_dim}.bytes();
    if (args.rope_dim % 16 == 0) {
      if (args.rank == 64) return f(latent_attend_tensor<1, T>, kTensorThreads, bytes);
      if (args.rank == 128) return f(latent_attend_tensor<2, T>, kTensorThreads, bytes);
      if (args.rank == 192) return f(latent_attend_tensor<3, T>, kTensorThreads, bytes);
      if (args.rank == 256) return f(latent_attend_tensor<4, T>, kTensorThreads, bytes);
      if (args.rank == 384) return f(latent_attend_tensor<6, T>, kTensorThreads, bytes);
      if (args.rank == 512) return f(latent_attend_tensor<8, T>, kTensorThreads, bytes);
    }
  }
  const int bytes = static_cast<int>(DecodeMemory<W>{args.rank, args.rope_dim}.bytes());
  if (args.rank <= 256) return f(latent_attend<1, T>, kDecodeThreads, bytes);
  return f(latent_attend<2, T>, kDecodeThreads, bytes);
}

/// Appends and attends in the latent space, slice by slice of the new tokens: a token sees none of
/// a later slice.
template <typename T>
cudaError_t attend_latent(const LatentAttentionShape& shape, const LatentArgs<T>& args,
                          std::int64_t batch, void* workspace, cudaStream_t stream) {
  using W = wide_t<T>;
  constexpr DataType kType = std::is_same_v<T, float> ? DataType::kFloat : DataType::kHalf;
  const LatentWorkspace parts(shape, kType);
  auto* memory = static_cast<std::uint8_t*>(workspace);
  auto* query = reinterpret_cast<W*>(memory);
  auto* sums = reinterpret_cast<W*>(memory + parts.sums);
  auto* stats = reinterpret_cast<W*>(memory + parts.stats);
  const auto absorb_bytes =
      std::max(args.rank * sizeof(float), args.nope_dim * sizeof(W) + args.rope_dim * sizeof(T));
  const auto heads = static_cast<unsigned>(args.num_heads);
  const std::int64_t tokens = batch * args.length;
  for (std::int64_t first = 0; first < tokens; first += kSliceTokens) {
    const auto count = static_cast<unsigned>(std::min(kSliceTokens, tokens - first));
    const ChunkLayout layout = chunk_layout(shape, count, args.capacity);
    latent_absorb<T>
        <<<dim3(count, heads + 1), kAppendThreads, absorb_bytes, stream>>>(args, first, query);
    const dim3 grid(count, static_cast<unsigned>(layout.num_chunks),
                    static_cast<unsigned>(head_groups(shape)));
    const auto launch = [&](auto kernel, int threads, int bytes) {
      if (const auto error = allow_shared_memory(kernel, bytes)) return error;
      kernel<<<grid, threads, bytes, stream>>>(args, first, layout, query, sums, stats);
      return cudaGetLastError();
    };
    if (const auto error = with_attend<T>(args, launch)) return error;
    const auto combine_bytes = (args.rank + layout.num_chunks) * sizeof(W);
    latent_combine<T><<<dim3(count, heads), kDecodeThreads, combine_bytes, stream>>>(
        args, first, layout, sums, stats);
    if (const auto error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

/// Calls f(integral constants of D and Dv) for the widths that latent_prefill() is built for.
template <typename F>
bool with_prefill_widths(const LatentAttentionShape& shape, F f) {
  using std::integral_constant;
  const std::int64_t d = shape.qk_dim(), dv = shape.value_dim;
  if (shape.nope_dim % 8 != 0 || shape.rope_dim % 8 != 0) return false;  // copies of 16 bytes
  if (d == 32 && dv == 32) return f(integral_constant<int, 32>{}, integral_constant<int, 32>{});
  if (d == 64 && dv == 64) return f(integral_constant<int, 64>{}, integral_constant<int, 64>{});
  if (d == 96 && dv == 64) return f(integral_constant<int, 96>{}, integral_constant<int, 64>{});
  if (d == 128 && dv == 128) return f(integral_constant<int, 128>{}, integral_constant<int, 128>{});
  return false;
}

bool can_expand(const LatentAttentionShape& shape, DataType type, std::int64_t length) {
  return type != DataType::kFloat && length > 1 &&
         with_prefill_widths(shape, [](auto, auto) { return true; });
}

/// Offsets of the expanded path's parts in the workspace, and how many rows it expands at once.
struct ExpandWorkspace {
  static constexpr std::int64_t kWantedBytes = 64 << 20;
  std::int64_t rows, expanded, arranged, bytes;  // the angles lie at its start
  ExpandWorkspace(const LatentAttentionShape& shape, std::int64_t batch, std::int64_t length,
                  std::int64_t capacity) {
    const std::int64_t row_bytes = capacity * shape.kv_b_rows() * 2;
    rows = std::clamp<std::int64_t>(kWantedBytes / row_bytes, 1, batch);
    // More rows of fewer tokens may come closer to the wanted bytes.
    const std::int64_t tokens =
        std::max(rows * capacity, std::min(kWantedBytes * capacity / row_bytes, batch * capacity));
    expanded = round_up(batch * length * shape.rope_dim / 2 * sizeof(float2), kAlignment);
    arranged = expanded + round_up(tokens * shape.kv_b_rows() * 2, kAlignment);
    bytes = arranged + bit_linear_workspace(tokens, shape.latent_rank, Activation::kInt8);
  }
};

template <int kKeyDim, int kValueDim, typename T>
cudaError_t launch_prefill_wgmma(const LatentArgs<T>& args, std::int64_t first_row,
                                 std::int64_t rows, const T* expanded, const float2* angles,
                                 cudaStream_t stream) {
  using Sizes = WgmmaPrefill<kKeyDim, kValueDim>;
  const auto kernel = latent_prefill_wgmma<kKeyDim, kValueDim, T>;
  if (const auto error = allow_shared_memory(kernel, Sizes::kBytes)) return error;
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors)) return error;
  const std::int64_t items =
      (args.length + Sizes::kQueries - 1) / Sizes::kQueries * args.num_heads * rows;
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(items, multiprocessors));
  return launch_early(kernel, dim3(blocks), Sizes::kThreads, Sizes::kBytes, 1, stream, args,
                      static_cast<int>(first_row), static_cast<int>(rows), expanded, angles);
}

template <typename T>
cudaError_t launch_prefill(const LatentAttentionShape& shape, const LatentArgs<T>& args,
                           std::int64_t first_row, std::int64_t rows, const T* expanded,
                           const float2* angles, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_prefill_widths(shape, [&](auto key_dim, auto value_dim) {
    constexpr int kKeyDim = decltype(key_dim)::value, kValueDim = decltype(value_dim)::value;
    if constexpr (kValueDim >= 64) {
      if (args.rope_dim % 16 == 0 && is_hopper()) {
        error = launch_prefill_wgmma<kKeyDim, kValueDim>(args, first_row, rows, expanded, angles,
                                                         stream);
        return true;
      }
    }
    constexpr int kBytes = PrefillMemory<kKeyDim, kValueDim>::kBytes;
    const auto kernel = latent_prefill<kKeyDim, kValueDim, T>;
    error = allow_shared_memory(kernel, kBytes);
    if (error != cudaSuccess) return true;
    const dim3 grid(static_cast<unsigned>((args.length + kPrefillQueries - 1) / kPrefillQueries),
                    static_cast<unsigned>(args.num_heads), static_cast<unsigned>(rows));
    kernel<<<grid, kPrefillThreads, kBytes, stream>>>(args, static_cast<int>(first_row), expanded,
                                                      angles);
    error = cudaGetLastError();
    return true;
  });
  return error;
}

/// Expands `rows` batch rows from first_row on.
template <typename T>
cudaError_t expand(const LatentAttentionShape& shape, const LatentArgs<T>& args,
                   std::int64_t first_row, std::int64_t rows, T* expanded, void* arranged_memory,
                   cudaStream_t stream) {
  const std::int64_t n = shape.kv_b_rows();
  if (args.rank % kExpandMultiple == 0 && n % 8 == 0) {
    const int bytes = expand_bytes(args.rank);
    const std::int64_t tiles = (args.capacity + kExpandTokens - 1) / kExpandTokens;
    const std::int64_t groups = (n + kExpandOutputs - 1) / kExpandOutputs;
    // Latents are read once by each thread block: no more of them than run at once.
    const dim3 grid(
        static_cast<unsigned>(tiles),
        static_cast<unsigned>(std::clamp<std::int64_t>(kWantedBlocks / (tiles * rows), 1, groups)),
        static_cast<unsigned>(rows));
    return launch_early(latent_expand<T>, grid, kExpandThreads, bytes, 1, stream, args,
                        static_cast<int>(first_row), expanded);
  }
  const std::int64_t m = rows * args.capacity, slot = first_row * args.capacity;
  const QuantizedRows arranged = cut_workspace(arranged_memory, m, args.rank, Activation::kInt8);
  const RowLimits limits{args.past_lens + first_row, args.seq_lens + first_row, args.capacity};
  if (const auto error = launch_arrange(args.latent + slot * args.rank, args.scale + slot, m,
                                        args.rank, arranged, limits, stream)) {
    return error;
  }
  const Output<T> out{expanded, nullptr, args.kv_b_scale, n};
  return launch_product<Activation::kInt8>({arranged, args.kv_b, m, args.rank, limits}, out,
                                           stream);
}

/// Expands batch rows to keys and values and attends with tensor cores, group by group.
template <typename T>
cudaError_t attend_expanded(const LatentAttentionShape& shape, const LatentArgs<T>& args,
                            std::int64_t batch, void* workspace, cudaStream_t stream) {
  const ExpandWorkspace parts(shape, batch, args.length, args.capacity);
  auto* memory = static_cast<std::uint8_t*>(workspace);
  auto* angles = reinterpret_cast<float2*>(memory);
  auto* expanded = reinterpret_cast<T*>(memory + parts.expanded);
  if (const auto error = append(args, batch, angles, stream)) return error;
  for (std::int64_t b = 0; b < batch; b += parts.rows) {
    const std::int64_t rows = std::min(parts.rows, batch - b);
    if (const auto error = expand(shape, args, b, rows, expanded, memory + parts.arranged, stream))
      return error;
    if (const auto error = launch_prefill(shape, args, b, rows, expanded, angles, stream))
      return error;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t run(const LatentAttentionShape& shape, const LatentAttentionParams& p, void* workspace,
                cudaStream_t stream) {
  const LatentArgs<T> args = make_args<T>(shape, p);
  if constexpr (!std::is_same_v<T, float>) {
    if (can_expand(shape, p.type, p.length)) {
      return attend_expanded(shape, args, p.batch, workspace, stream);
    }
    constexpr std::int64_t kMaxGridRows = 65535;
    if (p.length == 1 && p.batch <= kMaxGridRows && cluster_takes(shape) && is_hopper()) {
      return launch_cluster(args, p.batch, stream);
    }
  }
  return attend_latent(shape, args, p.batch, workspace, stream);
}

}  // namespace

const char* unsupported(const LatentAttentionShape& s) {
  if (s.num_heads < 1 || s.num_heads > kMaxHeads) return "num_heads must be 1 .. 256";
  if (s.nope_dim < 1 || s.nope_dim > 1024) return "nope_dim must be 1 .. 1024";
  if (s.rope_dim < 2 || s.rope_dim % 2 != 0 || s.rope_dim > kMaxRopeDim) {
    return "rope_dim must be even and 2 .. 128";
  }
  if (s.value_dim < 1 || s.value_dim > kMaxValueDim) return "value_dim must be 1 .. 256";
  if (s.latent_rank < 4 || s.latent_rank % 4 != 0 || s.latent_rank > kMaxLatentRank) {
    return "latent_rank must be a multiple of 4 and 4 .. 512";
  }
  // Loads of four elements start at the latent of each token.
  if (s.q_width() % 4 != 0 || s.rope_dim % 4 != 0) {
    return "rope_dim and num_heads * (nope_dim + rope_dim) must be multiples of 4";
  }
  return nullptr;
}

std::int64_t latent_attention_workspace(const LatentAttentionShape& shape, DataType type,
                                        std::int64_t batch, std::int64_t length,
                                        std::int64_t capacity) {
  const std::int64_t latent = LatentWorkspace(shape, type).bytes;
  if (!can_expand(shape, type, length)) return latent;
  return std::max(latent, ExpandWorkspace(shape, batch, length, capacity).bytes);
}

cudaError_t latent_attention(const LatentAttentionShape& shape, const LatentAttentionParams& p,
                             void* workspace, cudaStream_t stream) {
  if (unsupported(shape) != nullptr || p.batch < 0 || p.length < 0 || p.capacity < 1) {
    return cudaErrorInvalidValue;
  }
  if (p.batch == 0 || p.length == 0) return cudaSuccess;
  return with_type(
      p.type, [&](auto element) { return run<decltype(element)>(shape, p, workspace, stream); });
}

}  // namespace tinylm::cuda
