/// @file kernel_table.h
/// What each instruction set implements: plain functions over raw pointers, without threads.
///
/// The implementations (isa_kernels.cpp, once per family) are compiled with that family's
/// instructions, so nothing in them may be a template or inline function that the linker could
/// hand to other code: what they include is C headers, intrinsics and this file.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "isa.h"

namespace tinylm::cpu {

/// Packed weights: blocks of 16 rows; a block is a run of 64-byte groups.
/// Ternary: a group holds 16 rows x 16 inputs. Byte 4 * row + j, bits 2 * l and up, is the code of
/// input 16 * group + 4 * l + j, plus 1. Shifting and masking a group gives four vectors of
/// 16 rows x 4 inputs, which is what the dot product instructions and the tiles take.
/// int8: a group holds 16 rows x 4 inputs, byte 4 * row + j, plus 128.
/// Inputs are padded to a multiple of 64 (activations with zeros), rows to a multiple of 16.
inline constexpr int kBlockRows = 16;
inline constexpr int kInputAlign = 64;
inline constexpr int kGroupBytes = 64;

/// What becomes of a tile of integer sums.
struct Sink {
  const std::int32_t* correction = nullptr;  ///< [m], subtracted from every sum of the row
  std::int64_t outputs = 0;                  ///< n, columns that exist
  std::int32_t* sums = nullptr;              ///< [m, ld]: write the integers, or
  void* y = nullptr;                         ///< [m, ld] of `type`: write sum * scale / s
  const float* scale = nullptr;              ///< [n]
  const float* s = nullptr;                  ///< [m]
  const float* s_inverse = nullptr;          ///< [m], 1 / s
  std::int64_t ld = 0;
  std::int64_t first_column = 0;  ///< output that stands at the start of a row of sums or y
  FloatType type = FloatType::kFloat;
};

/// One product: q [m, k_pad] times the blocks [first_block, last_block) of packed weights.
struct DotParams {
  const std::uint8_t* weights = nullptr;  ///< of block 0
  std::int64_t k_pad = 0;                 ///< multiple of kInputAlign
  std::int64_t first_block = 0;
  std::int64_t last_block = 0;
  const std::int8_t* q = nullptr;  ///< [round_up(m, 32), ldq]; what rows past m hold is ignored
  std::int64_t ldq = 0;            ///< at least k_pad
  std::int64_t m = 0;
  std::int8_t* panel = nullptr;  ///< scratch of panel_bytes(k_pad)
};

/// Scratch for DotParams::panel: two blocks of unpacked weights.
inline constexpr std::int64_t panel_bytes(std::int64_t k_pad) { return k_pad * 2 * kBlockRows; }

/// One row through norm and quantiser.
struct RowParams {
  const void* x = nullptr;  ///< [k] of `type`
  FloatType type = FloatType::kFloat;
  std::int64_t k = 0;
  std::int64_t k_pad = 0;
  const float* norm_weight = nullptr;  ///< [k] or nullptr
  float eps = 0.0F;
  float* normed = nullptr;  ///< scratch [k_pad]
};

/// Attention of a few queries over one block of expanded keys and values of one head, in float64.
struct AttendTile {
  std::int64_t num_queries = 0;    ///< at most kQueryTile
  std::int64_t num_keys = 0;       ///< keys of this block
  std::int64_t first_visible = 0;  ///< keys that query 0 sees in this block; query i sees i more
  std::int64_t key_dim = 0;        ///< nope + P
  const double* q = nullptr;       ///< [kQueryTile, key_dim], softmax_scale multiplied in
  const double* keys = nullptr;    ///< [key_dim, ld_keys], transposed
  std::int64_t ld_keys = 0;        ///< multiple of 16
  const double* values = nullptr;  ///< [num_keys, ld_values]
  std::int64_t ld_values = 0;      ///< Dv rounded up to 16; zeros from Dv on
  double* scores = nullptr;        ///< scratch [kQueryTile, ld_keys]
  double* largest = nullptr;       ///< [kQueryTile], running maximum, kNoScore at first
  double* total = nullptr;         ///< [kQueryTile], running sum of weights
  double* y = nullptr;             ///< [kQueryTile, ld_values], running weighted sum
};
inline constexpr std::int64_t kQueryTile = 8;
/// Below every score, and finite, so that differences stay numbers.
inline constexpr double kNoScore = -1e300;

/// Digits of a float64 number in fixed point, see wide_linear.h.
inline constexpr int kWideDigits = 7;

/// Attention of one query of every head over a run of cached tokens, in the latent space.
struct DecodeRun {
  std::int64_t num_tokens = 0;          ///< at most kDecodeRun
  std::int64_t latent_rank = 0;         ///< R
  std::int64_t rope_dim = 0;            ///< P
  std::int64_t heads_pad = 0;           ///< H rounded up to 16
  const double* q_latent = nullptr;     ///< [R, heads_pad], softmax_scale multiplied in
  const double* q_rope = nullptr;       ///< [P, heads_pad], likewise
  const std::int8_t* latent = nullptr;  ///< [num_tokens, R]
  const float* scale = nullptr;         ///< [num_tokens]
  const void* rope = nullptr;           ///< [num_tokens, P] of `type`
  FloatType type = FloatType::kFloat;
  double* scores = nullptr;   ///< scratch [kDecodeRun, heads_pad]
  double* wide = nullptr;     ///< scratch [kDecodeTokens, round_up(max(R, P), 16)]
  double* largest = nullptr;  ///< [heads_pad], out
  double* total = nullptr;    ///< [heads_pad], out
  double* y = nullptr;        ///< [heads_pad, round_up(R, 16)], out: weighted sum of latents
  // Where decode_takes_tiles(R), in place of q_latent:
  const std::int8_t* q_tiles = nullptr;  ///< [heads_pad / 16, kWideDigits, R / 64, 16, 16, 4]
  const double* q_unit = nullptr;        ///< [heads_pad], what digit 0 of a head counts
  std::int8_t* bytes = nullptr;          ///< scratch of decode_bytes(R), 64-byte aligned
};
inline constexpr std::int64_t kDecodeRun = 512;
/// Tokens whose latents are converted at a time.
inline constexpr std::int64_t kDecodeTokens = 16;

/// Latents interleaved, and a group of heads' weights in digits.
inline constexpr std::int64_t decode_bytes(std::int64_t latent_rank) {
  return kDecodeRun * (latent_rank + 16 * kWideDigits);
}

/// The functions of one family.
struct KernelTable {
  /// Packed 2-bit weights times int8 activations.
  void (*dot_ternary)(const DotParams&, const Sink&);
  /// Packed int8 weights times int8 activations.
  void (*dot_int8)(const DotParams&, const Sink&);
  /// Norms and quantises a row: q [k_pad] (zeros from k on); returns s, and the sum of q.
  float (*quantize_int8)(const RowParams&, std::int8_t* q, std::int32_t* sum);
  /// Norms and quantises a row to e4m3, as three signed digits to base 128 of q * 512: digit i
  /// goes to q[i * stride]. Returns s, and the sum of each digit.
  float (*quantize_fp8)(const RowParams&, std::int8_t* q, std::int64_t stride, std::int32_t* sum);
  /// Rows [m, n] of y = float(d0 + 128 d1 + 16384 d2) / 512 * scale / s from the digits' sums.
  void (*finish_fp8)(const std::int32_t* sums, std::int64_t plane, std::int64_t ld, std::int64_t m,
                     std::int64_t first_column, std::int64_t columns, const Sink& sink);
  /// silu(gate) * up.
  void (*swiglu)(const void* gate, const void* up, void* y, std::int64_t count, FloatType type);
  /// Conversions between `type` and float64.
  void (*widen)(const void* x, FloatType type, double* y, std::int64_t count);
  void (*narrow)(const double* x, FloatType type, void* y, std::int64_t count);
  /// NaN if a value is not finite.
  double (*largest_magnitude)(const double* x, std::int64_t count);
  /// Digits to base 128 of round(x * unit), |x * unit| < 2**47: digit d of x[i] goes to
  /// digits[d * stride + i], zeros up to the next multiple of 8; their sums to sums[d].
  void (*to_digits)(const double* x, std::int64_t count, double unit, std::int8_t* digits,
                    std::int64_t stride, std::int32_t* sums);
  /// out[i] = unit * sum over d of 128**d * sums[d * stride + i]. Reads up to 7 sums past count.
  void (*from_digits)(const std::int32_t* sums, std::int64_t stride, std::int64_t count,
                      double unit, double* out);
  void (*attend)(const AttendTile&);
  void (*decode)(const DecodeRun&);
  /// Whether decode wants q_tiles, q_unit and bytes for this rank.
  bool (*decode_takes_tiles)(std::int64_t latent_rank);
};

/// The table of a family, which must be supported.
const KernelTable& kernel_table(Isa isa);

const KernelTable& portable_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avxvnni_kernels();
const KernelTable& avx512vnni_kernels();
const KernelTable& amxint8_kernels();

}  // namespace tinylm::cpu
