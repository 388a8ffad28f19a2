// Several new tokens a row: each head expands the cache to keys and values, a block at a time, and
// passes every tile of queries over it with an online softmax (2205.14135, algorithm 1).

#include <algorithm>
#include <cstring>

#include "latent_weights.h"
#include "workspace.h"

namespace tinylm::cpu {
namespace {

constexpr std::int64_t kKeyBlock = 256;

/// One task's memory: one head of one row.
struct Head {
  double* q;                 // [queries, key_dim]
  double* keys;              // [key_dim, kKeyBlock]
  double* values;            // [kKeyBlock, ld_values]
  double* scores;            // [kQueryTile, kKeyBlock]
  double* largest;           // [queries]
  double* total;             // [queries]
  double* y;                 // [queries, ld_values]
  double* row;               // [key_dim]
  std::int32_t* sums;        // [kKeyBlock, nope + Dv]
  std::int32_t* correction;  // [kKeyBlock]
  std::int8_t* latent;       // [kKeyBlock, k_pad + 64]
  std::int64_t ld_values;
  std::int64_t ldq;
};

Head allocate(const LatentAttentionShape& s, std::int64_t num_queries) {
  Head h;
  const std::int64_t key_dim = s.nope_dim + s.rope_dim;
  const std::int64_t queries = round_up(num_queries, kQueryTile);
  h.ld_values = round_up(s.value_dim, 16);
  h.ldq = round_up(s.latent_rank, kInputAlign) + 64;
  const std::int64_t doubles = queries * (key_dim + 2 + h.ld_values) +
                               kKeyBlock * (key_dim + h.ld_values + kQueryTile) + key_dim;
  const std::int64_t integers = kKeyBlock * (s.nope_dim + s.value_dim + 1);
  auto* at = static_cast<double*>(
      scratch(Scratch::kTask,
              static_cast<std::size_t>(8 * doubles + 4 * integers + kKeyBlock * h.ldq + 64)));
  const auto take = [&at](std::int64_t count) {
    double* taken = at;
    at += count;
    return taken;
  };
  h.keys = take(kKeyBlock * key_dim);
  h.values = take(kKeyBlock * h.ld_values);
  h.scores = take(kKeyBlock * kQueryTile);
  h.y = take(queries * h.ld_values);
  h.q = take(queries * key_dim);
  h.largest = take(queries);
  h.total = take(queries);
  h.row = take(key_dim);
  h.sums = reinterpret_cast<std::int32_t*>(at);
  h.correction = h.sums + kKeyBlock * (s.nope_dim + s.value_dim);
  h.latent = reinterpret_cast<std::int8_t*>(h.correction + kKeyBlock);
  return h;
}

/// Rotated queries of a head, times softmax_scale; states of an empty softmax.
void start(const PackedLatentAttention& weights, const LatentAttentionParams& p,
           const float* angles, std::int64_t row, std::int64_t head, const Head& h) {
  const LatentAttentionShape& s = weights.shape();
  const std::int64_t key_dim = s.nope_dim + s.rope_dim;
  const std::int64_t queries = p.seq_lens[row];
  const std::int64_t padded = round_up(queries, kQueryTile);
  std::fill(h.q, h.q + padded * key_dim, 0.0);
  for (std::int64_t i = 0; i < queries; ++i) {
    double* q = h.q + i * key_dim;
    const std::int64_t at = ((row * p.length + i) * s.num_heads + head) * key_dim;
    weights.kernels().widen(offset(p.q, at * float_size(p.type)), p.type, h.row, key_dim);
    std::memcpy(q, h.row, static_cast<std::size_t>(s.nope_dim) * sizeof(double));
    rotate_query(weights, p.type, h.row, angles + (p.past_lens[row] + i) * s.rope_dim,
                 q + s.nope_dim);
    const double factor = query_factor(weights, h.row);
    for (std::int64_t j = 0; j < key_dim; ++j) q[j] *= factor;
  }
  std::fill(h.largest, h.largest + padded, kNoScore);
  std::fill(h.total, h.total + padded, 0.0);
  std::fill(h.y, h.y + padded * h.ld_values, 0.0);
}

/// Expands `count` cached tokens from `first` on to keys and values of one head.
void expand(const PackedLatentAttention& weights, const LatentAttentionParams& p, std::int64_t row,
            std::int64_t head, std::int64_t first, std::int64_t count, const Head& h) {
  const LatentAttentionShape& s = weights.shape();
  const PackedLinear& kv_b = weights.expand(head);
  const std::int64_t width = kv_b.outputs();
  const std::int64_t slot = row * p.capacity + first;
  for (std::int64_t t = 0; t < count; ++t) {
    std::int8_t* out = h.latent + t * h.ldq;
    std::memcpy(out, p.latent + (slot + t) * s.latent_rank,
                static_cast<std::size_t>(s.latent_rank));
    std::memset(out + s.latent_rank, 0, static_cast<std::size_t>(kv_b.k_pad() - s.latent_rank));
    std::int32_t total = 0;
    for (std::int64_t i = 0; i < s.latent_rank; ++i) total += out[i];
    h.correction[t] = total;
  }
  DotParams dot;
  dot.last_block = kv_b.num_blocks();
  dot.q = h.latent;
  dot.ldq = h.ldq;
  dot.m = count;
  Sink sink;
  sink.correction = h.correction;
  sink.outputs = width;
  sink.sums = h.sums;
  sink.ld = width;
  kv_b.dot(dot, sink);

  const float* scale = kv_b.scale();
  const std::int64_t padded = round_up(count, 16);
  for (std::int64_t t = 0; t < count; ++t) {
    const std::int32_t* sums = h.sums + t * width;
    const double step = p.scale[slot + t];
    for (std::int64_t d = 0; d < s.nope_dim; ++d) {
      h.keys[d * kKeyBlock + t] = sums[d] * static_cast<double>(scale[d]) / step;
    }
    double* value = h.values + t * h.ld_values;
    for (std::int64_t d = 0; d < s.value_dim; ++d) {
      value[d] = sums[s.nope_dim + d] * static_cast<double>(scale[s.nope_dim + d]) / step;
    }
    for (std::int64_t d = s.value_dim; d < h.ld_values; ++d) value[d] = 0.0;
    weights.kernels().widen(offset(p.rope, (slot + t) * s.rope_dim * float_size(p.type)), p.type,
                            h.row, s.rope_dim);
    for (std::int64_t d = 0; d < s.rope_dim; ++d) {
      h.keys[(s.nope_dim + d) * kKeyBlock + t] = h.row[d];
    }
  }
  for (std::int64_t d = 0; d < s.nope_dim + s.rope_dim; ++d) {
    for (std::int64_t t = count; t < padded; ++t) h.keys[d * kKeyBlock + t] = 0.0;
  }
}

void finish(const PackedLatentAttention& weights, const LatentAttentionParams& p, std::int64_t row,
            std::int64_t head, const Head& h) {
  const LatentAttentionShape& s = weights.shape();
  const std::int64_t size = float_size(p.type);
  for (std::int64_t i = 0; i < p.length; ++i) {
    const std::int64_t at = ((row * p.length + i) * s.num_heads + head) * s.value_dim;
    void* out = offset(p.y, at * size);
    if (i >= p.seq_lens[row]) {
      std::memset(out, 0, static_cast<std::size_t>(s.value_dim * size));
      continue;
    }
    double* y = h.y + i * h.ld_values;
    for (std::int64_t d = 0; d < s.value_dim; ++d) y[d] /= h.total[i];
    weights.kernels().narrow(y, p.type, out, s.value_dim);
  }
}

void attend_head(const PackedLatentAttention& weights, const LatentAttentionParams& p,
                 const float* angles, std::int64_t row, std::int64_t head) {
  const LatentAttentionShape& s = weights.shape();
  const std::int64_t queries = p.seq_lens[row];
  const std::int64_t past = p.past_lens[row];
  const Head h = allocate(s, queries);
  start(weights, p, angles, row, head, h);
  for (std::int64_t first = 0; first < past + queries; first += kKeyBlock) {
    const std::int64_t count = std::min(kKeyBlock, past + queries - first);
    expand(weights, p, row, head, first, count, h);
    // Queries before `first` see nothing of this block.
    const std::int64_t from = std::max<std::int64_t>(first - past, 0) / kQueryTile * kQueryTile;
    for (std::int64_t i = from; i < queries; i += kQueryTile) {
      AttendTile tile;
      tile.num_queries = std::min(kQueryTile, queries - i);
      tile.num_keys = count;
      tile.first_visible = past + i + 1 - first;
      tile.key_dim = s.nope_dim + s.rope_dim;
      tile.q = h.q + i * tile.key_dim;
      tile.keys = h.keys;
      tile.ld_keys = kKeyBlock;
      tile.values = h.values;
      tile.ld_values = h.ld_values;
      tile.scores = h.scores;
      tile.largest = h.largest + i;
      tile.total = h.total + i;
      tile.y = h.y + i * h.ld_values;
      weights.kernels().attend(tile);
    }
  }
  finish(weights, p, row, head, h);
}

}  // namespace

void attend_expanded(const PackedLatentAttention& weights, const LatentAttentionParams& p,
                     const float* angles, const Parallel& parallel) {
  const std::int64_t heads = weights.shape().num_heads;
  parallel(static_cast<std::size_t>(p.batch * heads), [&](std::size_t task) {
    const auto index = static_cast<std::int64_t>(task);
    attend_head(weights, p, angles, index / heads, index % heads);
  });
}

}  // namespace tinylm::cpu
