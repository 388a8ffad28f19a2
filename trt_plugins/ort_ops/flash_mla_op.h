/// @file flash_mla_op.h
/// Kernel of tinylm::FlashMLA.
#pragma once

#include <memory>

#include "custom_op.h"
#include "latent_attention.h"

namespace tinylm::ort {

class FlashMLAKernel {
 public:
  /// Re-packs kv_b, which must be constant.
  /// @throws std::exception Bad attributes, shapes or codes.
  FlashMLAKernel(const NodeInfo& node, cpu::FloatType type);
  void compute(const Context& context) const;
  static const OpSpec& spec() { return flash_mla_spec(); }

 private:
  std::unique_ptr<cpu::LatentAttentionWeights> weights_;
  cpu::FloatType type_;
};

}  // namespace tinylm::ort
