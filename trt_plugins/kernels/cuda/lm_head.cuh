// The final RMSNorm of each row's last token and its product with the vocabulary's table. The table
// is read once for up to 64 rows, straight into registers; every thread block norms the rows for
// itself while its part of the table is on the way to L2.
#pragma once

#include "fragments.cuh"
#include "half_mma.cuh"
#include "quantize_row.cuh"

namespace tinylm::cuda {

inline constexpr int kHeadThreads = 256;
inline constexpr int kHeadWarps = kHeadThreads / 32;
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
  const int stride = head_stride<T>(args.hidden);
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < num_rows; i += kHeadWarps) {
    T* to = rows + i * stride;
    const int b = first_row + i;
    float r = 0.0F;
    const T* from = nullptr;
    if (b < args.batch) {
      const std::int64_t token = max(args.seq_lens[b] - 1, 0);
      from = args.x + (static_cast<std::int64_t>(b) * args.length + token) * args.hidden;
      double squares = 0.0;
      for (int c = 4 * lane; c < args.hidden; c += 128) {
        const float4 v = load4(from + c);
        const double p = v.x, q = v.y, s = v.z, t = v.w;
        squares += p * p + q * q + (s * s + t * t);
      }
      squares = block_reduce<32>(squares, [](double p, double q) { return p + q; });
      r = static_cast<float>(1.0 / sqrt(squares / args.hidden + static_cast<double>(args.eps)));
    }
    for (int c = 4 * lane; c < stride; c += 128) {
      T values[4] = {};
      if (from != nullptr && c < args.hidden) {
        const float4 v = load4(from + c), w = load4(args.norm_weight + c);
        values[0] = from_float<T>(v.x * r * w.x);
        values[1] = from_float<T>(v.y * r * w.y);
        values[2] = from_float<T>(v.z * r * w.z);
        values[3] = from_float<T>(v.w * r * w.w);
      }
      for (int j = 0; j < 4; ++j) to[c + j] = values[j];
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

__device__ inline void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

}  // namespace detail

/// Half precision: a warp's 16 outputs times 8 * kTiles rows. A lane's 16 bytes of the table are
/// eight neighbouring inputs of two mma, in an order that its bytes of the rows share.
template <int kTiles, bool kAligned, typename T>
__global__ void __launch_bounds__(kHeadThreads) lm_head_tensor(HeadArgs<T> args) {
  extern __shared__ __align__(16) unsigned char head_memory[];
  T* rows = reinterpret_cast<T*>(head_memory);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_output = 16 * (blockIdx.x * kHeadWarps + threadIdx.x / 32);
  const int first_row = blockIdx.y * 8 * kTiles;
  const auto row_of = [&](int output) {
    return args.table + static_cast<std::int64_t>(min(output, args.vocab - 1)) * args.hidden;
  };
  const T* low = row_of(first_output + g);
  const T* high = row_of(first_output + g + 8);
  if (first_output + 16 <= args.vocab) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(row_of(first_output));
    const int count = 16 * args.hidden * static_cast<int>(sizeof(T));
    for (int i = 128 * lane; i < count; i += 128 * 32) detail::prefetch_l2(bytes + i);
  }
  detail::norm_last_tokens(args, first_row, 8 * kTiles, rows);
  __syncthreads();
  const int stride = head_stride<T>(args.hidden);
  float acc[kTiles][4] = {};
#pragma unroll 4
  for (int c = 8 * t; c < args.hidden + 8 * t; c += 32) {
    const uint4 a = detail::load_table<kAligned>(low + c, args.hidden - c);
    const uint4 b = detail::load_table<kAligned>(high + c, args.hidden - c);
    const std::uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const uint4 x = *reinterpret_cast<const uint4*>(rows + (8 * j + g) * stride + c);
      detail::multiply(acc[j], first, x.x, x.y, T{});
      detail::multiply(acc[j], second, x.z, x.w, T{});
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * j + 2 * t + i % 2;
      const int output = first_output + g + 8 * (i / 2);
      if (row < args.batch && output < args.vocab) {
        args.logits[static_cast<std::int64_t>(row) * args.vocab + output] = acc[j][i];
      }
    }
  }
}

/// float32: a warp's lanes share the inputs of kHeadFloatOutputs outputs and kHeadFloatRows rows.
static __global__ void __launch_bounds__(kHeadThreads) lm_head_float(HeadArgs<float> args) {
  extern __shared__ __align__(16) unsigned char head_memory[];
  auto* rows = reinterpret_cast<float*>(head_memory);
  const int first_row = blockIdx.y * kHeadFloatRows;
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
