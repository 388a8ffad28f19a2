#include "flash_mla_op.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace tinylm::ort {
namespace {

enum Input : std::size_t {
  kQ = 0,
  kKv,
  kKvNormWeight,
  kKvB,
  kKvBScale,
  kPastLens,
  kSeqLens,
  kPastLatent,
  kPastScale,
  kPastRope,
};
enum Output : std::size_t { kY = 0, kPresentLatent, kPresentScale, kPresentRope };

/// Gives an output the past's contents. Where both are bound to one buffer, it has them already.
void* present(const Context& context, std::size_t index, const Tensor& past, std::int64_t size) {
  void* data = context.output(index, past.shape);
  const auto bytes = static_cast<std::size_t>(past.count() * size);
  if (data != past.data && bytes != 0) std::memcpy(data, past.data, bytes);
  return data;
}

void check_lens(const cpu::LatentAttentionParams& p) {
  for (std::int64_t row = 0; row < p.batch; ++row) {
    const std::int64_t past = p.past_lens[row];
    const std::int64_t added = p.seq_lens[row];
    const std::string where = "row " + std::to_string(row) + ": ";
    if (added < 0 || added > p.length) {
      throw std::runtime_error(where + "seq_lens must be 0 to S = " + std::to_string(p.length) +
                               ", found " + std::to_string(added) + ".");
    }
    if (past < 0 || past + added > p.capacity) {
      throw std::runtime_error(where + "the cache holds " + std::to_string(p.capacity) +
                               " tokens, past_lens says that " + std::to_string(past) +
                               " are taken and " + std::to_string(added) +
                               " more were given. Make the cache larger or the input shorter.");
    }
  }
}

}  // namespace

FlashMLAKernel::FlashMLAKernel(const NodeInfo& node, cpu::FloatType type) : type_(type) {
  cpu::LatentAttentionShape shape;
  shape.num_heads = node.int_attribute("num_heads");
  shape.nope_dim = node.int_attribute("nope_dim");
  shape.rope_dim = node.int_attribute("rope_dim");
  shape.value_dim = node.int_attribute("value_dim");
  shape.theta = node.float_attribute("theta", 10000.0F);
  shape.eps = node.float_attribute("eps", 1e-5F);
  shape.softmax_scale = node.float_attribute("softmax_scale");
  const Tensor norm = node.constant(kKvNormWeight, "kv_norm_weight");
  if (norm.shape.size() != 1) {
    throw std::runtime_error("kv_norm_weight: expected [R], found " + shape_text(norm.shape) + ".");
  }
  shape.latent_rank = norm.shape[0];
  const std::int64_t rows = shape.num_heads * (shape.nope_dim + shape.value_dim);
  const Tensor kv_b = node.constant(kKvB, "kv_b");
  require_shape("kv_b", kv_b, {rows, shape.latent_rank / 4}, "[H*(nope+Dv), R/4]");
  const Tensor scale = node.constant(kKvBScale, "kv_b_scale");
  require_shape("kv_b_scale", scale, {rows}, "[H*(nope+Dv)]");
  weights_ = cpu::LatentAttentionWeights::pack(shape, kv_b.as<std::uint8_t>(), scale.as<float>(),
                                               norm.as<float>());
  release_pages(kv_b, kv_b.count());
}

void FlashMLAKernel::compute(const Context& context) const {
  const cpu::LatentAttentionShape& s = weights_->shape();
  const Tensor q = context.input(kQ);
  const Tensor kv = context.input(kKv);
  const Tensor past_lens = context.input(kPastLens);
  const Tensor seq_lens = context.input(kSeqLens);
  const Tensor latent = context.input(kPastLatent);
  const Tensor scale = context.input(kPastScale);
  const Tensor rope = context.input(kPastRope);
  if (q.shape.size() != 3 || scale.shape.size() != 2) {
    throw std::runtime_error("q: expected [B, S, H*D] and past_scale [B, C], found " +
                             shape_text(q.shape) + " and " + shape_text(scale.shape) + ".");
  }
  cpu::LatentAttentionParams p;
  p.batch = q.shape[0];
  p.length = q.shape[1];
  p.capacity = scale.shape[1];
  p.type = type_;
  require_shape("q", q, {p.batch, p.length, s.num_heads * (s.nope_dim + s.rope_dim)},
                "[B, S, H*D]");
  require_shape("kv", kv, {p.batch, p.length, s.latent_rank + s.rope_dim}, "[B, S, R+P]");
  require_shape("past_lens", past_lens, {p.batch}, "[B]");
  require_shape("seq_lens", seq_lens, {p.batch}, "[B]");
  require_shape("past_latent", latent, {p.batch, p.capacity, s.latent_rank}, "[B, C, R]");
  require_shape("past_scale", scale, {p.batch, p.capacity}, "[B, C]");
  require_shape("past_rope", rope, {p.batch, p.capacity, s.rope_dim}, "[B, C, P]");
  p.q = q.data;
  p.kv = kv.data;
  p.past_lens = past_lens.as<std::int32_t>();
  p.seq_lens = seq_lens.as<std::int32_t>();
  check_lens(p);
  p.latent = static_cast<std::int8_t*>(present(context, kPresentLatent, latent, 1));
  p.scale = static_cast<float*>(present(context, kPresentScale, scale, 4));
  p.rope = present(context, kPresentRope, rope, cpu::float_size(type_));
  p.y = context.output(kY, {p.batch, p.length, s.num_heads * s.value_dim});
  cpu::latent_attention(*weights_, p, context.parallel());
}

const OpSpec& flash_mla_spec() {
  static const OpSpec spec{"FlashMLA",
                           {{"q", "T", "[B, S, H*D]"},
                            {"kv", "T", "[B, S, R+P]"},
                            {"kv_norm_weight", "tensor(float)", "[R]"},
                            {"kv_b", "tensor(uint8)", "[H*(nope+Dv), R/4]"},
                            {"kv_b_scale", "tensor(float)", "[H*(nope+Dv)]"},
                            {"past_lens", "tensor(int32)", "[B]"},
                            {"seq_lens", "tensor(int32)", "[B]"},
                            {"past_latent", "tensor(int8)", "[B, C, R]"},
                            {"past_scale", "tensor(float)", "[B, C]"},
                            {"past_rope", "T", "[B, C, P]"}},
                           {{"y", "T", "[B, S, H*Dv]"},
                            {"present_latent", "tensor(int8)", "[B, C, R]"},
                            {"present_scale", "tensor(float)", "[B, C]"},
                            {"present_rope", "T", "[B, C, P]"}},
                           {{"num_heads", "int", nullptr},
                            {"nope_dim", "int", nullptr},
                            {"rope_dim", "int", nullptr},
                            {"value_dim", "int", nullptr},
                            {"theta", "float", "10000.0"},
                            {"eps", "float", "1e-05"},
                            {"softmax_scale", "float", nullptr}}};
  return spec;
}

}  // namespace tinylm::ort
