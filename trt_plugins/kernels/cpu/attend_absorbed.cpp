// One new token a row, in the latent space (DeepSeek-V2, 2405.04434, section 2.1.2): kv_b goes into
// the query and behind the weighted sum, and no key or value of a cached token is ever made. Runs
// of the cache are independent tasks whose softmaxes are merged in a fixed order.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "latent_weights.h"
#include "wide_linear.h"
#include "workspace.h"

namespace tinylm::cpu {
namespace {

/// The caller's memory: one row.
struct Row {
  std::int64_t heads_pad;
  std::int64_t ld_latent;
  double* q_latent;  // [R, heads_pad]
  double* q_rope;    // [P, heads_pad]
  double* largest;   // [runs, heads_pad]
  double* total;     // [runs, heads_pad]
  double* y;         // [runs, heads_pad, ld_latent]
  bool tiles;        // the family's kernel takes digits in tiles rather than q_latent
  double* q_unit;    // [heads_pad]
  std::int8_t* q_tiles;
};

Row allocate(const PackedLatentAttention& weights, std::int64_t runs) {
  const LatentAttentionShape& s = weights.shape();
  Row row;
  row.heads_pad = round_up(s.num_heads, 16);
  row.ld_latent = round_up(s.latent_rank, 16);
  row.tiles = weights.kernels().decode_takes_tiles(s.latent_rank);
  const std::int64_t state = runs * row.heads_pad;
  const std::int64_t query = (s.rope_dim + (row.tiles ? 1 : s.latent_rank)) * row.heads_pad;
  const std::int64_t digits = row.tiles ? row.heads_pad * kWideDigits * s.latent_rank : 0;
  const std::int64_t doubles = query + state * (2 + row.ld_latent);
  auto* memory =
      static_cast<char*>(scratch(Scratch::kCaller, static_cast<std::size_t>(digits + 8 * doubles)));
  row.q_tiles = reinterpret_cast<std::int8_t*>(memory);
  row.q_rope = reinterpret_cast<double*>(memory + digits);
  row.q_latent = row.q_rope + s.rope_dim * row.heads_pad;
  row.q_unit = row.q_latent;
  row.largest = row.q_rope + query;
  row.total = row.largest + state;
  row.y = row.total + state;
  if (row.heads_pad != s.num_heads) {  // heads that only fill up
    std::memset(memory, 0, static_cast<std::size_t>(digits + 8 * query));
  }
  return row;
}

/// Carves a task's memory for wide_linear() and `doubles` float64 values.
WideScratch wide_scratch(const PackedLinear& w, std::int64_t doubles, double** values) {
  const std::int64_t digits = wide_digit_bytes(w);
  const std::int64_t sums = wide_num_sums(w);
  auto* memory = static_cast<char*>(
      scratch(Scratch::kTask, static_cast<std::size_t>(digits + 4 * sums + 8 * doubles)));
  WideScratch wide;
  wide.digits = reinterpret_cast<std::int8_t*>(memory);
  *values = reinterpret_cast<double*>(memory + digits);
  wide.sums = reinterpret_cast<std::int32_t*>(memory + digits + 8 * doubles);
  return wide;
}

/// Writes a head's query in digits where the tiles want them.
void store_tiles(const KernelTable& kernels, const double* latent, std::int64_t rank,
                 std::int64_t head, std::int8_t* digits, const Row& row) {
  const FixedPoint point = fixed_point(kernels.largest_magnitude(latent, rank));
  std::int32_t unused[kWideDigits];
  kernels.to_digits(latent, rank, point.steps, digits, rank, unused);
  row.q_unit[head] = point.unit;
  std::int8_t* out = row.q_tiles + head / 16 * 16 * kWideDigits * rank + head % 16 * 4;
  for (std::int64_t four = 0; four < kWideDigits * rank / 4; ++four) {
    std::memcpy(out + 64 * four, digits + 4 * four, 4);
  }
}

/// A head's query in the latent space, and its rotated part.
void absorb_query(const PackedLatentAttention& weights, const LatentAttentionParams& p,
                  const float* angles, std::int64_t batch, std::int64_t head, const Row& row) {
  const LatentAttentionShape& s = weights.shape();
  const PackedLinear& w = weights.absorb(head);
  const std::int64_t width = s.nope_dim + s.rope_dim;
  double* q = nullptr;
  const WideScratch wide = wide_scratch(w, width + s.rope_dim + 2 * s.latent_rank, &q);
  double* rotated = q + width;
  double* latent = rotated + s.rope_dim;
  auto* digits = reinterpret_cast<std::int8_t*>(latent + s.latent_rank);  // 7 of its 8 bytes
  const KernelTable& kernels = weights.kernels();
  const std::int64_t at = (batch * s.num_heads + head) * width;
  kernels.widen(offset(p.q, at * float_size(p.type)), p.type, q, width);
  rotate_query(weights, p.type, q, angles + p.past_lens[batch] * s.rope_dim, rotated);
  const double factor = query_factor(weights, q);
  for (std::int64_t i = 0; i < s.rope_dim; ++i) {
    row.q_rope[i * row.heads_pad + head] = rotated[i] * factor;
  }
  const float* scale = weights.expand(head).scale();
  for (std::int64_t i = 0; i < s.nope_dim; ++i) q[i] *= static_cast<double>(scale[i]);
  wide_linear(w, q, 0, latent, wide);
  for (std::int64_t r = 0; r < s.latent_rank; ++r) latent[r] *= factor;
  if (row.tiles) {
    store_tiles(kernels, latent, s.latent_rank, head, digits, row);
    return;
  }
  for (std::int64_t r = 0; r < s.latent_rank; ++r) {
    row.q_latent[r * row.heads_pad + head] = latent[r];
  }
}

void decode_run(const PackedLatentAttention& weights, const LatentAttentionParams& p,
                std::int64_t batch, std::int64_t run, std::int64_t tokens, const Row& row) {
  const LatentAttentionShape& s = weights.shape();
  const std::int64_t first = run * kDecodeRun;
  const std::int64_t slot = batch * p.capacity + first;
  const std::int64_t wide = kDecodeTokens * round_up(std::max(s.latent_rank, s.rope_dim), 16);
  DecodeRun r;
  r.num_tokens = std::min(kDecodeRun, tokens - first);
  r.latent_rank = s.latent_rank;
  r.rope_dim = s.rope_dim;
  r.heads_pad = row.heads_pad;
  r.q_latent = row.q_latent;
  r.q_rope = row.q_rope;
  r.latent = p.latent + slot * s.latent_rank;
  r.scale = p.scale + slot;
  r.rope = offset(p.rope, slot * s.rope_dim * float_size(p.type));
  r.type = p.type;
  const std::int64_t bytes = row.tiles ? decode_bytes(s.latent_rank) : 0;
  auto* memory = static_cast<char*>(scratch(
      Scratch::kTask, static_cast<std::size_t>(bytes + 8 * (wide + kDecodeRun * row.heads_pad))));
  r.bytes = reinterpret_cast<std::int8_t*>(memory);
  r.wide = reinterpret_cast<double*>(memory + bytes);
  r.scores = r.wide + wide;
  r.q_tiles = row.tiles ? row.q_tiles : nullptr;
  r.q_unit = row.q_unit;
  r.largest = row.largest + run * row.heads_pad;
  r.total = row.total + run * row.heads_pad;
  r.y = row.y + run * row.heads_pad * row.ld_latent;
  weights.kernels().decode(r);
}

/// Merges a head's runs and goes back from the latent space to values.
void finish_head(const PackedLatentAttention& weights, const LatentAttentionParams& p,
                 std::int64_t batch, std::int64_t head, std::int64_t runs, const Row& row) {
  const LatentAttentionShape& s = weights.shape();
  const PackedLinear& w = weights.expand(head);
  double* latent = nullptr;
  const WideScratch wide = wide_scratch(w, s.latent_rank + s.value_dim, &latent);
  double* y = latent + s.latent_rank;
  double largest = kNoScore;
  for (std::int64_t run = 0; run < runs; ++run) {
    largest = std::max(largest, row.largest[run * row.heads_pad + head]);
  }
  double total = 0.0;
  std::fill(latent, latent + s.latent_rank, 0.0);
  for (std::int64_t run = 0; run < runs; ++run) {
    const std::int64_t at = run * row.heads_pad + head;
    const double keep = std::exp(row.largest[at] - largest);
    total += row.total[at] * keep;
    for (std::int64_t r = 0; r < s.latent_rank; ++r) {
      latent[r] += row.y[at * row.ld_latent + r] * keep;
    }
  }
  for (std::int64_t r = 0; r < s.latent_rank; ++r) latent[r] /= total;
  wide_linear(w, latent, s.nope_dim, y, wide);
  const float* scale = w.scale() + s.nope_dim;
  for (std::int64_t d = 0; d < s.value_dim; ++d) y[d] *= static_cast<double>(scale[d]);
  const std::int64_t at = (batch * s.num_heads + head) * s.value_dim;
  weights.kernels().narrow(y, p.type, offset(p.y, at * float_size(p.type)), s.value_dim);
}

}  // namespace

void attend_absorbed(const PackedLatentAttention& weights, const LatentAttentionParams& p,
                     const float* angles, const Parallel& parallel) {
  const LatentAttentionShape& s = weights.shape();
  for (std::int64_t batch = 0; batch < p.batch; ++batch) {
    if (p.seq_lens[batch] == 0) {
      const std::int64_t bytes = s.num_heads * s.value_dim * float_size(p.type);
      std::memset(offset(p.y, batch * bytes), 0, static_cast<std::size_t>(bytes));
      continue;
    }
    const std::int64_t tokens = p.past_lens[batch] + 1;
    const std::int64_t runs = (tokens + kDecodeRun - 1) / kDecodeRun;
    const Row row = allocate(weights, runs);
    const auto heads = static_cast<std::size_t>(s.num_heads);
    parallel(heads, [&](std::size_t head) {
      absorb_query(weights, p, angles, batch, static_cast<std::int64_t>(head), row);
    });
    parallel(static_cast<std::size_t>(runs), [&](std::size_t run) {
      decode_run(weights, p, batch, static_cast<std::int64_t>(run), tokens, row);
    });
    parallel(heads, [&](std::size_t head) {
      finish_head(weights, p, batch, static_cast<std::int64_t>(head), runs, row);
    });
  }
}

}  // namespace tinylm::cpu
