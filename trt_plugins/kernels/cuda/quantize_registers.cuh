// The same as quantize_row.cuh for rows that fit into the registers of their threads, which is
// faster: each value is read once and kept.
#pragma once

#include "async_copy.cuh"
#include "quantize_row.cuh"

namespace tinylm::cuda {

namespace detail {

/// values[0 .. kCount - 1] in pairs, pairs of pairs and so on, all at once.
template <int kCount, typename V, typename Combine>
__device__ inline V tree_reduce(const V* values, Combine combine) {
  V parts[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) parts[i] = values[i];
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < kCount; i += 2 * step) parts[i] = combine(parts[i], parts[i + step]);
  }
  return parts[0];
}

struct Add {
  template <typename V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  __device__ std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const { return max(a, b); }
};

// Integers have an instruction for it.
__device__ inline std::uint32_t warp_reduce(std::uint32_t value, Max) {
  return __reduce_max_sync(0xffffffffU, value);
}
__device__ inline int warp_reduce(int value, Add) { return __reduce_add_sync(0xffffffffU, value); }

}  // namespace detail

/// Reductions of one row by kThreads, a whole thread block; or some warps of one, who have a
/// barrier to themselves then. Each of the three has memory of its own, so that one barrier is
/// enough: another lies between a read and the next row's write.
template <int kThreads, bool kSome = false>
struct RowReduction {
  static constexpr int kWarps = kThreads / 32;
  struct Memory {
    __align__(16) double squares[kWarps];
    std::uint32_t largest[kWarps];
    int sums[kWarps];
  };

  Memory* memory;

  __device__ double squares(double value) { return all(value, memory->squares, detail::Add()); }
  __device__ std::uint32_t largest(std::uint32_t value) {
    return all(value, memory->largest, detail::Max());
  }
  /// Leaves the sum to row_sum(), behind another barrier.
  __device__ void leave_sum(int value) {
    value = detail::warp_reduce(value, detail::Add());
    if (threadIdx.x % 32 == 0) memory->sums[threadIdx.x / 32 % kWarps] = value;
  }
  __device__ int row_sum() const {
    return detail::tree_reduce<kWarps>(memory->sums, detail::Add());
  }
  __device__ void sync() const {
    if constexpr (kSome) {
      named_sync<kThreads>(threadIdx.x / kThreads + 1);
    } else {
      __syncthreads();
    }
  }

 private:
  template <typename V, typename Combine>
  __device__ V all(V value, V* parts, Combine combine) {
    value = detail::warp_reduce(value, combine);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32 % kWarps] = value;
    sync();
    return detail::tree_reduce<kWarps>(parts, combine);
  }
};

/// The part of a row that one of kThreads threads holds: 4 * kVectors values.
/// @tparam kKeepsWeights Whether load_weights() keeps the norm's weights; else scale() reads them.
/// @tparam kMayGate Whether source.gated is looked at.
template <int kThreads, int kVectors, typename T, bool kKeepsWeights = true, bool kMayGate = true>
struct RegisterRow {
  float4 values[kVectors];
  float4 weights[kKeepsWeights ? kVectors : 1];  // of the norm

  __device__ static int column(int thread, int vector) { return 4 * (thread + vector * kThreads); }

  /// The norm's weights, which no kernel writes.
  __device__ void load_weights(const RowSource<T>& source, int thread) {
    if (source.norm_weight == nullptr || !kKeepsWeights) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) weights[v] = norm_weights(source, thread, v);
  }

  using Raw = std::conditional_t<sizeof(T) == 2, uint2, uint4>;  // four elements

  /// A row as it lies in memory, gate and up.
  struct RawRow {
    Raw values[kVectors];
    Raw up[kMayGate ? kVectors : 1];
  };

  __device__ static void load(RawRow& raw, const RowSource<T>& source, std::int64_t row,
                              int thread) {
    const bool gated = kMayGate && source.gated;
    const T* x = source.x + row * source.k * (gated ? 2 : 1);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = column(thread, v);
      raw.values[v] = Raw{};
      if (gated) raw.up[v] = Raw{};
      if (i >= source.k) continue;
      raw.values[v] = *reinterpret_cast<const Raw*>(x + i);
      if (gated) raw.up[v] = *reinterpret_cast<const Raw*>(x + source.k + i);
    }
  }

  /// Takes the row, gated.
  __device__ void take(const RawRow& raw, const RowSource<T>& source) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float4& x = values[v];
      x = load4(reinterpret_cast<const T*>(&raw.values[v]));
      if (!kMayGate || !source.gated) continue;
      const float4 up = load4(reinterpret_cast<const T*>(&raw.up[v]));
      x = make_float4(detail::gate<T>(x.x, up.x), detail::gate<T>(x.y, up.y),
                      detail::gate<T>(x.z, up.z), detail::gate<T>(x.w, up.w));
    }
  }

  /// Norms and scales to the quantiser's range; returns the multiplier s.
  template <Activation kActivation, typename Reduction>
  __device__ float scale(const RowSource<T>& source, Reduction reduce, int thread) {
    if (source.norm_weight != nullptr) {
      const double squares = reduce.squares(sum_of_squares());
      const float r = inverse_root(squares * source.inverse_k + static_cast<double>(source.eps));
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float4& x = values[v];
        const float4 w = kKeepsWeights ? weights[v] : norm_weights(source, thread, v);
        x = make_float4(x.x * r * w.x, x.y * r * w.y, x.z * r * w.z, x.w * r * w.w);
      }
    }
    // As integers, so that not-a-number, whose bits are larger than all others', is the largest.
    std::uint32_t largest = __float_as_uint(1e-5F);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4& x = values[v];
      largest = max(max(largest, __float_as_uint(fabsf(x.x))), __float_as_uint(fabsf(x.y)));
      largest = max(max(largest, __float_as_uint(fabsf(x.z))), __float_as_uint(fabsf(x.w)));
    }
    largest = reduce.largest(largest);
    return (kActivation == Activation::kInt8 ? 127.0F : 448.0F) / __uint_as_float(largest);
  }

  /// Quantises: emit(digit, vector, word) for columns up to k_padded. Returns this thread's sum, 0
  /// if raw.
  /// @tparam kRaw Whether e4m3 values are given as they are, as digit 0.
  template <Activation kActivation, bool kRaw, typename Emit>
  __device__ int quantize(float s, int thread, int k_padded, Emit emit) const {
    int sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(thread, v) >= k_padded) continue;
      const float x[4] = {values[v].x, values[v].y, values[v].z, values[v].w};
      if constexpr (kActivation == Activation::kInt8) {
        // Rounds by adding 1.5 * 2^23. No product is beyond 127 but by its own rounding.
        constexpr float kRound = 12582912.0F;
        std::uint32_t q[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) q[j] = __float_as_uint(__fmul_rn(x[j], s) + kRound);
        const std::uint32_t word =
            __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
        sum = __dp4a(static_cast<int>(word), 0x01010101, sum);
        emit(0, v, word);
      } else {
        int q[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const __nv_fp8_storage_t value = detail::fp8_value(x[j] * s);
          if (kRaw) {
            q[j] = value;
          } else {
            q[j] = detail::fp8_units(value);
            sum += q[j];
          }
        }
#pragma unroll
        for (int digit = 0; digit < (kRaw ? 1 : num_digits(kActivation)); ++digit) {
          emit(digit, v, detail::pack4(q[0], q[1], q[2], q[3]));
#pragma unroll
          for (int j = 0; j < 4; ++j) q[j] = (q[j] - static_cast<std::int8_t>(q[j])) / 256;
        }
      }
    }
    return sum;
  }

 private:
  __device__ static float4 norm_weights(const RowSource<T>& source, int thread, int vector) {
    const int i = column(thread, vector);
    if (i >= source.k) return make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    return load4(source.norm_weight + i);
  }

  __device__ double sum_of_squares() const {
    double sum = 0.0;
    if constexpr (!std::is_same_v<T, float>) {
      // Products of half precision are exact in float32, and four of them lose little.
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4& x = values[v];
        sum += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
      }
      if (isfinite(sum)) return sum;
      sum = 0.0;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const double a = values[v].x, b = values[v].y, c = values[v].z, d = values[v].w;
      sum += a * a + b * b + (c * c + d * d);
    }
    return sum;
  }

  /// 1 / sqrt(x), by one step of Newton's method in float64 where float32 can begin it.
  __device__ static float inverse_root(double x) {
    constexpr double kMost = 1e30;
    if (std::is_same_v<T, float> || !(x < kMost)) return static_cast<float>(1.0 / sqrt(x));
    const double y = rsqrtf(static_cast<float>(x));
    return static_cast<float>(y * (1.5 - 0.5 * x * y * y));
  }
};

}  // namespace tinylm::cuda
