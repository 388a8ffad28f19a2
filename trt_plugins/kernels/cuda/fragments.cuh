// The layouts that feed mma.sync.m16n8k32, and the instruction.
//
// Weights are its A operand (16 outputs x 32 inputs), activations its B operand (32 inputs x 8
// rows). Both lie in memory in the order of the registers, so that every load is 16 bytes a lane
// and no shared memory is needed to transpose:
//   weights      [N/16][K/128][lane][4 words]: a word is one A fragment of 2-bit codes,
//                register i in bits 2i of each byte (export/gpu_packing.py);
//   activations  [digit][M/8][K/128][half][lane][4 words]: word 2b + i is register i of the B
//                fragment for inputs 64 half + 32 b ...
#pragma once

#include <cstdint>

namespace tinylm::cuda {

inline constexpr int kBlockInputs = 128;
inline constexpr int kWeightBlockBytes = 512;       // 16 outputs x 128 inputs
inline constexpr int kActivationBlockBytes = 1024;  // 8 rows x 128 inputs

/// Blocks of 128 inputs that hold k.
__host__ __device__ inline int num_blocks(std::int64_t k) {
  return static_cast<int>((k + kBlockInputs - 1) / kBlockInputs);
}

/// Byte offset of the word with columns column .. column + 3 (a multiple of 4) of a row among the
/// activations of one digit.
__host__ __device__ inline std::int64_t activation_offset(std::int64_t row, int column,
                                                          int row_blocks) {
  const std::int64_t block = row / 8 * row_blocks + column / kBlockInputs;
  const int in_block = column % kBlockInputs;
  const int half = in_block / 64;
  const int lane = static_cast<int>(row % 8) * 4 + in_block % 16 / 4;
  const int word = in_block % 64 / 32 * 2 + in_block % 32 / 16;
  return block * kActivationBlockBytes + half * 512 + lane * 16 + word * 4;
}

/// The same for wgmma: [K/128][M/8] blocks of 8 rows x 128 bytes, in which row r has its 16-byte
/// chunk c at chunk c ^ r (the 128-byte swizzle). num_row_blocks is M / 8.
__host__ __device__ inline std::int64_t swizzled_offset(std::int64_t row, int column,
                                                        int num_row_blocks) {
  const std::int64_t block =
      static_cast<std::int64_t>(column / kBlockInputs) * num_row_blocks + row / 8;
  const int in_rows = static_cast<int>(row % 8), chunk = column % kBlockInputs / 16;
  return block * kActivationBlockBytes + in_rows * kBlockInputs + (chunk ^ in_rows) * 16 +
         column % 16;
}

/// acc += A . B with unsigned codes {0, 1, 2} and signed activations.
__device__ inline void mma(int (&acc)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                           std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// One A fragment of codes 0, 1, 2 from its word.
__device__ inline void unpack(std::uint32_t word, std::uint32_t (&a)[4]) {
  for (int i = 0; i < 4; ++i) a[i] = word >> (2 * i) & 0x03030303U;
}

/// Two A fragments of codes that stay where they are in their bytes, for two accumulators: a mask
/// each, no shift. `first` has inputs 0 ... 15 and 32 ... 47 of the 64 of two words, `second` the
/// others. joined_sum() makes up for the places.
__device__ inline void mask_codes(std::uint32_t word0, std::uint32_t word1,
                                  std::uint32_t (&first)[4], std::uint32_t (&second)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t word = i < 2 ? word0 : word1;
    first[i] = word & (i % 2 == 0 ? 0x03030303U : 0x0c0c0c0cU);
    second[i] = word & (i % 2 == 0 ? 0x30303030U : 0xc0c0c0c0U);
  }
}

/// The same for one accumulator, by a shift more: sums of outputs 8 ... 15 are four times what they
/// should be.
__device__ inline void mask_low_codes(std::uint32_t word0, std::uint32_t word1,
                                      std::uint32_t (&first)[4], std::uint32_t (&second)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t word = i < 2 ? word0 : word1;
    const std::uint32_t mask = i % 2 == 0 ? 0x03030303U : 0x0c0c0c0cU;
    first[i] = word & mask;
    second[i] = word >> 4 & mask;
  }
}

/// acc[0] += first . B and acc[1] += second . B; b has four words of a row's 64 inputs, 16 each.
__device__ inline void mma_masked(int (&acc)[2][4], const std::uint32_t (&first)[4],
                                  const std::uint32_t (&second)[4], uint4 b) {
  mma(acc[0], first, b.x, b.z);
  mma(acc[1], second, b.y, b.w);
}

/// The sum of register i of both: each is a multiple of the place of its codes. No sum of up to
/// 32768 inputs reaches 2^30.
__device__ inline int joined_sum(const int (&acc)[2][4], int i) {
  const int upper = i / 2 * 2;  // outputs 8 ... 15
  return (acc[0][i] >> upper) + (acc[1][i] >> (4 + upper));
}

/// Weights are read once: past L1, first to leave L2.
__device__ inline uint4 load_weights(const std::uint8_t* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

/// Code -1, 0 or 1 as W, from a word's bits 2 * i + 8 * byte. Built from the bits of 2^23 or 2^52
/// plus the code, because conversions of integers are slow.
template <typename W>
__device__ inline W code_value(std::uint32_t word, int i, int byte);
template <>
__device__ inline float code_value<float>(std::uint32_t word, int i, int byte) {
  return __uint_as_float(0x4b000000U | (word >> (2 * i + 8 * byte) & 3)) - 8388609.0F;
}
template <>
__device__ inline double code_value<double>(std::uint32_t word, int i, int byte) {
  return __hiloint2double(0x43300000, static_cast<int>(word >> (2 * i + 8 * byte) & 3)) -
         4503599627370497.0;
}

/// One word of packed weights: rows 16 * row_block + g and + 8 of lane 4 * g + t, columns
/// 32 * column_word + 16 * half + 4 * t + byte.
__device__ inline std::uint32_t weight_word(const std::uint8_t* weight, int row_block,
                                            int column_word, int row_blocks, int lane) {
  const std::int64_t block = static_cast<std::int64_t>(row_block) * row_blocks + column_word / 4;
  return __ldg(reinterpret_cast<const std::uint32_t*>(weight + block * kWeightBlockBytes) +
               lane * 4 + column_word % 4);
}

}  // namespace tinylm::cuda
