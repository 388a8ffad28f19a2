// The final RMSNorm of each row's last token and its product with the vocabulary's table. The table
// is read once for up to 64 rows, straight into registers, and its first part before the kernel
// before has ended; every thread block norms the rows for itself.
#pragma once

#include "async_copy.cuh"
#include "fragments.cuh"
#include "half_mma.cuh"
#include "quantize_row.cuh"

namespace tinylm::cuda {

inline constexpr int kHeadThreads = 512;
inline constexpr int kHeadWarps = kHeadThreads / 32;
inline constexpr int kHeadDepth = 4;         // steps of 32 inputs that a warp has asked for
inline constexpr int kHeadFloatRows = 8;     // rows of a pass over a float table
inline constexpr int kHeadFloatOutputs = 4;  // of a warp at once

template <typename T>
struct HeadArgs {
  const T* x;                    // [batch, length, hidden]
  const T* table;                // [vocab, hidden]
  const float* norm_weight;      // [hidden]
  const std::int32_t* seq_lens;  // [batch]
  float* logits;                 // [batch, vocab]
  float eps;
  int batch, length, hidden, vocab;
};

/// Elements between normed rows in shared memory: fragments of two rows meet in no bank.
template <typename T>
__host__ __device__ inline int head_stride(int hidden) {
  return sizeof(T) == 4 ? hidden : (hidden + 63) / 64 * 64 + 32;
}

namespace detail {

/// Norms the last tokens of rows first_row .. first_row + num_rows - 1, a warp a row. Zeros follow
/// in rows and columns that are not there.
template <typename T>
__device__ inline void norm_last_tokens(const HeadArgs<T>& args, int first_row, int num_rows,
                                        T* rows) {
  constexpr int kAtOnce = 8;  // loads on their way
  const int stride = head_stride<T>(args.hidden), lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < num_rows; i += kHeadWarps) {
    T* to = rows + i * stride;
    const int b = first_row + i;
    if (b >= args.batch) {
      for (int c = 4 * lane; c < stride; c += 128) {
        for (int j = 0; j < 4; ++j) to[c + j] = from_float<T>(0.0F);
      }
      continue;
    }
    const std::int64_t token = max(args.seq_lens[b] - 1, 0);
    const T* from = args.x + (static_cast<std::int64_t>(b) * args.length + token) * args.hidden;
    float4 v[kAtOnce] = {};
    const auto load = [&](int first) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int c = first + 128 * u;
        v[u] = c < args.hidden ? load4(from + c) : float4{};
      }
    };
    double squares = 0.0;
    for (int first = 4 * lane; first < args.hidden; first += 128 * kAtOnce) {
      load(first);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const double p = v[u].x, q = v[u].y, s = v[u].z, t = v[u].w;
        squares += p * p + q * q + (s * s + t * t);
      }
    }
    squares = block_reduce<32>(squares, [](double p, double q) { return p + q; });
    const auto r =
        static_cast<float>(1.0 / sqrt(squares / args.hidden + static_cast<double>(args.eps)));
    for (int first = 4 * lane; first < stride; first += 128 * kAtOnce) {
      if (args.hidden > 128 * kAtOnce) load(first);  // else they are still there
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int c = first + 128 * u;
        if (c >= stride) break;
        const float4 w = c < args.hidden ? load4(args.norm_weight + c) : float4{};
        const T values[4] = {from_float<T>(v[u].x * r * w.x), from_float<T>(v[u].y * r * w.y),
                             from_float<T>(v[u].z * r * w.z), from_float<T>(v[u].w * r * w.w)};
        memcpy(to + c, values, sizeof(values));
      }
    }
  }
}

/// Eight elements of the table, zeros from `left` on. Whole 16-byte words where hidden allows.
template <bool kAligned, typename T>
__device__ inline uint4 load_table(const T* p, int left) {
  uint4 v = {};
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(p);
  if constexpr (kAligned) {
    if (left > 0) v = load_weights(bytes);
  } else {
    if (left > 0) {
      const uint2 low = __ldg(reinterpret_cast<const uint2*>(bytes));
      v.x = low.x, v.y = low.y;
    }
    if (left > 4) {
      const uint2 high = __ldg(reinterpret_cast<const uint2*>(bytes) + 1);
      v.z = high.x, v.w = high.y;
    }
  }
  return v;
}

/// What a warp has asked for: 16 outputs, kHeadDepth steps of 32 inputs ahead, and on to the next
/// 16. A lane has eight inputs of outputs g and g + 8.
template <bool kAligned, typename T>
class TableStream {
 public:
  uint4 low[kHeadDepth], high[kHeadDepth];

  /// @param group First group of 16 outputs; `step` leads to the warp's next one.
  __device__ TableStream(const HeadArgs<T>& args, int group, int step)
      : table_(args.table),
        hidden_(args.hidden),
        vocab_(args.vocab),
        padded_(32 * kHeadDepth * ((hidden_ + 32 * kHeadDepth - 1) / (32 * kHeadDepth))),
        group_(group),
        step_(step) {
    begin();
#pragma unroll
    for (int slot = 0; slot < kHeadDepth; ++slot) load(slot);
  }
  /// Asks for the next step; zeros follow the last one of the group, up to a multiple of the depth.
  __device__ void load(int slot) {
    const int left = 16 * group_ < vocab_ ? hidden_ - column_ : 0;
    low[slot] = load_table<kAligned>(low_row_ + column_, left);
    high[slot] = load_table<kAligned>(high_row_ + column_, left);
    column_ += 32;
    if (column_ < padded_) return;
    group_ += step_;
    begin();
  }
  /// Asks L2 for a part of what follows: kLines times 128 bytes of each of the 16 rows.
  template <int kLines>
  __device__ void prefetch(int lane) const {
    const T* from = row(16 * group_ + lane % 16);
#pragma unroll
    for (int line = lane / 16; line < kLines; line += 2) {
      const int column = 32 * kHeadDepth + 64 * line;
      if (16 * group_ < vocab_ && column < hidden_) detail::prefetch(from + column);
    }
  }

 private:
  __device__ const T* row(int output) const {
    return table_ + static_cast<std::int64_t>(min(output, vocab_ - 1)) * hidden_;
  }
  __device__ void begin() {
    const int lane = threadIdx.x % 32;
    column_ = lane % 4 * 8;
    low_row_ = row(16 * group_ + lane / 4);
    high_row_ = row(16 * group_ + lane / 4 + 8);
  }

  const T* table_;
  int hidden_, vocab_, padded_, group_, step_, column_;
  const T *low_row_, *high_row_;
};

}  // namespace detail

/// Half precision: a warp's 16 outputs times 8 * kTiles rows. A lane's 16 bytes of the table are
/// eight neighbouring inputs of two mma, in an order that its bytes of the rows share.
template <int kTiles, bool kAligned, typename T>
__global__ void __launch_bounds__(kHeadThreads) lm_head_tensor(HeadArgs<T> args) {
  extern __shared__ __align__(16) unsigned char head_memory[];
  T* rows = reinterpret_cast<T*>(head_memory);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_groups = (args.vocab + 15) / 16, step = gridDim.x * kHeadWarps;
  const int first_group = blockIdx.x * kHeadWarps + threadIdx.x / 32;
  const int first_row = blockIdx.y * 8 * kTiles;
  launch_next_kernel();
  detail::TableStream<kAligned, T> table(args, first_group, step);
  table.template prefetch<kTiles>(lane);  // more where the norm takes longer
  wait_for_previous_kernel();
  detail::norm_last_tokens(args, first_row, 8 * kTiles, rows);
  __syncthreads();
  const int stride = head_stride<T>(args.hidden), num_steps = (args.hidden + 31) / 32;
  for (int group = first_group; group < num_groups; group += step) {
    float acc[kTiles][4] = {};
    for (int s = 0; s < num_steps; s += kHeadDepth) {
#pragma unroll
      for (int slot = 0; slot < kHeadDepth; ++slot) {
        if (s + slot < num_steps) {
          const uint4 a = table.low[slot], b = table.high[slot];
          const std::uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
          const T* from = rows + g * stride + 32 * (s + slot) + 8 * t;
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const uint4 x = *reinterpret_cast<const uint4*>(from + 8 * j * stride);
            detail::multiply(acc[j], first, x.x, x.y, T{});
            detail::multiply(acc[j], second, x.z, x.w, T{});
          }
        }
        table.load(slot);
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + 8 * j + 2 * t + i % 2;
        const int output = 16 * group + g + 8 * (i / 2);
        if (row < args.batch && output < args.vocab) {
          args.logits[static_cast<std::int64_t>(row) * args.vocab + output] = acc[j][i];
        }
      }
    }
  }
}

/// float32: a warp's lanes share the inputs of kHeadFloatOutputs outputs and kHeadFloatRows rows.
static __global__ void __launch_bounds__(kHeadThreads) lm_head_float(HeadArgs<float> args) {
  extern __shared__ __align__(16) unsigned char head_memory[];
  auto* rows = reinterpret_cast<float*>(head_memory);
  const int first_row = blockIdx.y * kHeadFloatRows;
  launch_next_kernel();
  wait_for_previous_kernel();
  detail::norm_last_tokens(args, first_row, kHeadFloatRows, rows);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int first = kHeadFloatOutputs * (blockIdx.x * kHeadWarps + threadIdx.x / 32);
  float acc[kHeadFloatOutputs][kHeadFloatRows] = {};
  for (int c = 4 * lane; c < args.hidden; c += 128) {
    float4 w[kHeadFloatOutputs];
#pragma unroll
    for (int j = 0; j < kHeadFloatOutputs; ++j) {
      const std::int64_t output = min(first + j, args.vocab - 1);
      w[j] = load4(args.table + output * args.hidden + c);
    }
#pragma unroll
    for (int i = 0; i < kHeadFloatRows; ++i) {
      const float4 x = load4(rows + i * args.hidden + c);
#pragma unroll
      for (int j = 0; j < kHeadFloatOutputs; ++j) {
        acc[j][i] = fmaf(w[j].x, x.x, acc[j][i]);
        acc[j][i] = fmaf(w[j].y, x.y, acc[j][i]);
        acc[j][i] = fmaf(w[j].z, x.z, acc[j][i]);
        acc[j][i] = fmaf(w[j].w, x.w, acc[j][i]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kHeadFloatOutputs; ++j) {
#pragma unroll
    for (int i = 0; i < kHeadFloatRows; ++i) {
      const float sum = detail::block_reduce<32>(acc[j][i], [](float p, float q) { return p + q; });
      const int row = first_row + i, output = first + j;
      if (lane == 0 && row < args.batch && output < args.vocab) {
        args.logits[static_cast<std::int64_t>(row) * args.vocab + output] = sum;
      }
    }
  }
}

}  // namespace tinylm::cuda
