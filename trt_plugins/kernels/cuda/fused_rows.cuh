// Some rows, quantised by the kernel that multiplies them: each thread block of a cluster quantises
// eight rows into its shared memory and copies them to the others, which saves a launch and a trip
// through memory. All of K stays in shared memory, [digit][K/128] blocks of 1024 bytes for each
// eight rows, swizzled as wgmma and ldmatrix like it (fragments.cuh).
#pragma once

#include "async_copy.cuh"
#include "cluster.cuh"
#include "fragments.cuh"
#include "quantize_registers.cuh"
#include "wgmma.cuh"

namespace tinylm::cuda {

/// Threads of a thread block, 64 a row while they quantise.
inline constexpr int kFusedThreads = 512;
inline constexpr int kFusedWarps = kFusedThreads / 32;
inline constexpr int kThreadsPerRow = kFusedThreads / 8;

/// What a product needs of a quantised row.
struct FusedScale {
  float s;
  int sum;
};

/// Shared memory of fixed size; the rows follow at rows_offset().
template <int kRowBlocks>
struct FusedMemory {
  RowReduction<kThreadsPerRow>::Memory reductions[8];
  FusedScale scales[kRowBlocks][8];
  CopyBarrier arrived;
};

/// Bytes of eight rows.
template <Activation kActivation, bool kRaw>
__host__ __device__ inline int row_block_bytes(int num_blocks) {
  return (kRaw ? 1 : num_digits(kActivation)) * num_blocks * kActivationBlockBytes;
}

#ifdef TINYLM_HOPPER

namespace detail {

/// 16-byte multiples from here to the same place in the shared memory of another thread block of
/// the cluster, and counted at its barrier.
__device__ inline void copy_to_cluster(void* shared, int bytes, CopyBarrier& barrier, int rank) {
  const std::uint32_t from = tinylm::cuda::shared_address(shared);
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(cluster_address(from, rank)),
      "r"(from), "r"(bytes),
      "r"(cluster_address(tinylm::cuda::shared_address(&barrier), rank))
      : "memory");
}

}  // namespace detail

/// kRowBlocks thread blocks share kRowBlocks * 8 rows. begin() may come before the stream's kernel
/// before has ended; end() before the thread block's rows are overwritten, and before it exits.
/// @tparam kVectors A row has up to 256 * kVectors inputs.
template <int kRowBlocks, int kVectors, Activation kActivation, bool kRaw, typename T>
class FusedRows {
 public:
  /// @param rows Shared memory for all rows.
  __device__ FusedRows(const RowSource<T>& source, std::int64_t first_row, std::int64_t m,
                       int num_blocks, FusedMemory<kRowBlocks>& memory, std::uint8_t* rows)
      : source_(source),
        first_row_(first_row),
        num_rows_(static_cast<int>(min(m - first_row, std::int64_t{8 * kRowBlocks}))),
        num_blocks_(num_blocks),
        memory_(memory),
        rows_(rows) {}

  __device__ void begin() {
    if constexpr (kRowBlocks > 1) {
      rank_ = detail::cluster_rank();
      if (threadIdx.x == 0) {
        memory_.arrived.init(1);
        const int others = num_row_blocks() - (rank_ < num_row_blocks() ? 1 : 0);
        memory_.arrived.expect(others * (block_bytes() + kScaleBytes));
        detail::fence_barrier_init();
      }
      __syncthreads();
      detail::cluster_arrive();
    }
    row_.load_weights(source_, thread());
  }

  /// Behind wait_for_previous_kernel().
  __device__ void quantize() {
    RowReduction<kThreadsPerRow> reduce{&memory_.reductions[in_rows()]};
    typename Row::RawRow raw{};
    const int row = 8 * rank_ + in_rows();
    if (row < num_rows_) Row::load(raw, source_, first_row_ + row, thread());
    row_.take(raw, source_);
    const float s = row_.template scale<kActivation>(source_, reduce, thread());
    std::uint8_t* mine = rows_ + rank_ * block_bytes();
    std::uint8_t* first = mine + swizzled_offset(in_rows(), 4 * thread(), 1);
    const int sum = row_.template quantize<kActivation, kRaw>(
        s, thread(), num_blocks_ * kBlockInputs,
        [&](int digit, int vector, std::uint32_t word) {
          constexpr int kVectorBytes = 4 * kThreadsPerRow / kBlockInputs * kActivationBlockBytes;
          *reinterpret_cast<std::uint32_t*>(first + digit * num_blocks_ * kActivationBlockBytes +
                                            vector * kVectorBytes) = word;
        });
    reduce.leave_sum(sum);
    __syncthreads();
    if (thread() == 0) memory_.scales[rank_][in_rows()] = {s, reduce.row_sum()};
    // Copies and wgmma read past the caches that stores go through.
    fence_barriers();
    __syncthreads();
    if constexpr (kRowBlocks > 1) {
      detail::cluster_wait();
      const auto to = static_cast<int>(threadIdx.x);
      if (to < kRowBlocks && to != rank_ && rank_ < num_row_blocks()) {
        detail::copy_to_cluster(mine, block_bytes(), memory_.arrived, to);
        detail::copy_to_cluster(memory_.scales[rank_], kScaleBytes, memory_.arrived, to);
      }
      memory_.arrived.wait(0);
      detail::cluster_arrive();  // whoever has all rows, has those that others copied
    }
  }

  __device__ void end() {
    if constexpr (kRowBlocks > 1) detail::cluster_wait();
  }

  __device__ int num_rows() const { return num_rows_; }
  __device__ int num_row_blocks() const { return (num_rows_ + 7) / 8; }
  __device__ FusedScale scale(int row) const { return memory_.scales[row / 8][row % 8]; }
  __device__ int block_bytes() const { return row_block_bytes<kActivation, kRaw>(num_blocks_); }

 private:
  // Rows of many inputs leave no registers for the norm's weights.
  using Row = RegisterRow<kThreadsPerRow, kVectors, T, (kVectors <= 4)>;
  static constexpr int kScaleBytes = 8 * static_cast<int>(sizeof(FusedScale));

  __device__ static int in_rows() { return threadIdx.x / kThreadsPerRow; }
  __device__ static int thread() { return threadIdx.x % kThreadsPerRow; }

  const RowSource<T>& source_;
  std::int64_t first_row_;
  int num_rows_, num_blocks_, rank_ = 0;
  FusedMemory<kRowBlocks>& memory_;
  std::uint8_t* rows_;
  Row row_;
};

#endif  // TINYLM_HOPPER

}  // namespace tinylm::cuda
