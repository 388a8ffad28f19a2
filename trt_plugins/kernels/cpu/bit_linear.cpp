#include "bit_linear.h"

#include <algorithm>
#include <cstring>

#include "packed_linear.h"
#include "workspace.h"

namespace tinylm::cpu {
namespace {

constexpr int kFp8Digits = 3;
/// A task should outlast what it takes to hand it out: about this many products.
constexpr std::int64_t kProductsATask = 1 << 18;
/// Activations that a task passes over the weights at once: they should stay in the cache.
constexpr std::int64_t kActivationBytes = 1 << 20;

/// Rows of activations, quantised.
struct Quantized {
  std::int8_t* q = nullptr;  // [planes * plane, ldq]
  std::int64_t ldq = 0;
  std::int64_t plane = 0;              // rows from one digit to the next
  std::int32_t* correction = nullptr;  // [planes * plane]
  float* s = nullptr;                  // [m]
  float* s_inverse = nullptr;          // [m]
};

/// Takes the caller's scratch for `planes` digits of m rows.
Quantized allocate(std::int64_t m, std::int64_t k_pad, int planes) {
  Quantized rows;
  rows.ldq = k_pad + 64;  // not a power of two: rows would meet in the same cache sets
  rows.plane = m;
  const std::int64_t all = planes * m;
  // The tiles read whole groups of 32 rows.
  rows.q = scratch_of<std::int8_t>(Scratch::kQuantized, round_up(all, 32) * rows.ldq);
  rows.correction = scratch_of<std::int32_t>(Scratch::kRowScales, all + 2 * m);
  rows.s = reinterpret_cast<float*>(rows.correction + all);
  rows.s_inverse = rows.s + m;
  return rows;
}

void quantize_row(const PackedLinear& weights, const LinearParams& p, const Quantized& rows,
                  std::int64_t row) {
  const std::int64_t k = weights.inputs();
  RowParams r;
  r.x = static_cast<const char*>(p.x) + row * k * float_size(p.type);
  r.type = p.type;
  r.k = k;
  r.k_pad = weights.k_pad();
  r.norm_weight = p.norm_weight;
  r.eps = p.eps;
  r.normed = scratch_of<float>(Scratch::kNormed, r.k_pad);
  std::int8_t* q = rows.q + row * rows.ldq;
  const KernelTable& kernels = weights.kernels();
  if (p.activation == Activation::kInt8) {
    rows.s[row] = kernels.quantize_int8(r, q, &rows.correction[row]);
    rows.s_inverse[row] = 1.0F / rows.s[row];
    rows.correction[row] *= weights.offset();
    return;
  }
  std::int32_t sums[kFp8Digits];
  rows.s[row] = kernels.quantize_fp8(r, q, rows.plane * rows.ldq, sums);
  for (int d = 0; d < kFp8Digits; ++d) {
    rows.correction[d * rows.plane + row] = sums[d] * weights.offset();
  }
}

Quantized quantize(const PackedLinear& weights, const LinearParams& p, const Parallel& parallel) {
  const int planes = p.activation == Activation::kInt8 ? 1 : kFp8Digits;
  const Quantized rows = allocate(p.m, weights.k_pad(), planes);
  constexpr std::int64_t kRowsATask = 8;
  const std::int64_t tasks = (p.m + kRowsATask - 1) / kRowsATask;
  parallel(static_cast<std::size_t>(tasks), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * kRowsATask;
    for (std::int64_t row = first; row < std::min(p.m, first + kRowsATask); ++row) {
      quantize_row(weights, p, rows, row);
    }
  });
  return rows;
}

/// Splits the blocks of outputs into tasks: body(first_block, last_block).
template <typename Body>
void for_block_ranges(const PackedLinear& weights, std::int64_t m, const Parallel& parallel,
                      const Body& body) {
  constexpr std::int64_t kStep = 4;  // blocks that the kernels take together
  const std::int64_t blocks = weights.num_blocks();
  const std::int64_t products = kBlockRows * weights.k_pad() * m;
  const std::int64_t a_task = round_up(std::max<std::int64_t>(kProductsATask / products, 1), kStep);
  const std::int64_t tasks = (blocks + a_task - 1) / a_task;
  parallel(static_cast<std::size_t>(tasks), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * a_task;
    body(first, std::min(blocks, first + a_task));
  });
}

Sink at_row(Sink sink, std::int64_t row) {
  sink.correction += row;
  if (sink.sums != nullptr) sink.sums += row * sink.ld;
  if (sink.y != nullptr) {
    sink.y = static_cast<char*>(sink.y) + row * sink.ld * float_size(sink.type);
    sink.s += row;
    sink.s_inverse += row;
  }
  return sink;
}

/// The product, in portions of rows that stay in the cache.
void multiply(const PackedLinear& weights, const Quantized& rows, std::int64_t m, const Sink& sink,
              const Parallel& parallel) {
  const std::int64_t portion = std::max<std::int64_t>(kActivationBytes / rows.ldq / 32 * 32, 32);
  for_block_ranges(weights, m, parallel, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = 0; row < m; row += portion) {
      DotParams p;
      p.first_block = first;
      p.last_block = last;
      p.q = rows.q + row * rows.ldq;
      p.ldq = rows.ldq;
      p.m = std::min(portion, m - row);
      weights.dot(p, at_row(sink, row));
    }
  });
}

/// fp8: the sums of the three digits first, a few columns at a time, then the output.
void multiply_fp8(const PackedLinear& weights, const Quantized& rows, std::int64_t m,
                  const Sink& sink, const Parallel& parallel) {
  const std::int64_t n = weights.outputs();
  for_block_ranges(weights, kFp8Digits * m, parallel, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t block = first; block < last; ++block) {
      std::int32_t* sums = scratch_of<std::int32_t>(Scratch::kSums, kFp8Digits * m * kBlockRows);
      const std::int64_t column = block * kBlockRows;
      Sink part;
      part.correction = rows.correction;
      part.outputs = n;
      part.sums = sums;
      part.first_column = column;
      part.ld = kBlockRows;
      DotParams p;
      p.first_block = block;
      p.last_block = block + 1;
      p.q = rows.q;
      p.ldq = rows.ldq;
      p.m = kFp8Digits * m;
      weights.dot(p, part);
      weights.kernels().finish_fp8(sums, rows.plane, kBlockRows, m, column,
                                   std::min<std::int64_t>(kBlockRows, n - column), sink);
    }
  });
}

}  // namespace

void linear(const LinearWeights& weights, const LinearParams& p, const Parallel& parallel) {
  if (p.m == 0) return;
  const auto& packed = static_cast<const PackedLinear&>(weights);
  const Quantized rows = quantize(packed, p, parallel);
  Sink sink;
  sink.correction = rows.correction;
  sink.outputs = packed.outputs();
  sink.y = p.y;
  sink.scale = packed.scale();
  sink.s = rows.s;
  sink.s_inverse = rows.s_inverse;
  sink.ld = packed.outputs();
  sink.type = p.type;
  if (p.activation == Activation::kInt8) {
    multiply(packed, rows, p.m, sink, parallel);
  } else {
    multiply_fp8(packed, rows, p.m, sink, parallel);
  }
}

void accumulate_int8(const LinearWeights& weights, const std::int8_t* q, std::int64_t m,
                     std::int32_t* sums, const Parallel& parallel) {
  if (m == 0) return;
  const auto& packed = static_cast<const PackedLinear&>(weights);
  const std::int64_t k = packed.inputs();
  const Quantized rows = allocate(m, packed.k_pad(), 1);
  for (std::int64_t row = 0; row < m; ++row) {
    std::int8_t* out = rows.q + row * rows.ldq;
    std::memcpy(out, q + row * k, static_cast<std::size_t>(k));
    std::memset(out + k, 0, static_cast<std::size_t>(packed.k_pad() - k));
    std::int32_t total = 0;
    for (std::int64_t i = 0; i < k; ++i) total += out[i];
    rows.correction[row] = total * packed.offset();
  }
  Sink sink;
  sink.correction = rows.correction;
  sink.outputs = packed.outputs();
  sink.sums = sums;
  sink.ld = packed.outputs();
  multiply(packed, rows, m, sink, parallel);
}

void quantize_int8(const LinearParams& p, std::int64_t k, std::int8_t* q, float* s) {
  const KernelTable& kernels = kernel_table(active_isa());
  const std::int64_t k_pad = round_up(k, kInputAlign);
  auto* padded = scratch_of<std::int8_t>(Scratch::kQuantized, k_pad);
  for (std::int64_t row = 0; row < p.m; ++row) {
    RowParams r;
    r.x = static_cast<const char*>(p.x) + row * k * float_size(p.type);
    r.type = p.type;
    r.k = k;
    r.k_pad = k_pad;
    r.norm_weight = p.norm_weight;
    r.eps = p.eps;
    r.normed = scratch_of<float>(Scratch::kNormed, k_pad);
    std::int32_t sum = 0;
    s[row] = kernels.quantize_int8(r, padded, &sum);
    std::memcpy(q + row * k, padded, static_cast<std::size_t>(k));
  }
}

}  // namespace tinylm::cpu
