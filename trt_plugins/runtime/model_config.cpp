#include "model_config.h"

#include "json_file.h"

namespace tinylm {
namespace {

constexpr const char* kModelType = "tinylm";
constexpr int kFormatVersion = 1;
constexpr const char* kWayOut = "Make a directory with `tinylm-export onnx CKPT --out DIR`.";

}  // namespace

ModelConfig ModelConfig::load(const std::filesystem::path& path) {
  const JsonFile json(path, kWayOut);
  json.require("model_type", kModelType);
  json.require("format_version", kFormatVersion);
  ModelConfig config;
  config.vocab_size = json.positive("vocab_size");
  config.num_layers = json.positive("num_layers");
  config.max_seq_len = json.positive("max_seq_len");
  config.latent_rank = json.positive("latent_rank");
  config.rope_dim = json.positive("rope_dim");
  config.bos_token_id = json.token("bos_token_id", config.vocab_size);
  config.eos_token_id = json.token("eos_token_id", config.vocab_size);
  config.pad_token_id = json.token("pad_token_id", config.vocab_size);
  return config;
}

ExportInfo ExportInfo::load(const std::filesystem::path& path) {
  const JsonFile json(path, kWayOut);
  const Json& task = json.field("task");
  const Json& all_logits = json.field("all_logits");
  if (!task.is_string()) throw json.error("task must be a string, found " + task.dump() + ".");
  if (!all_logits.is_boolean()) {
    throw json.error("all_logits must be true or false, found " + all_logits.dump() + ".");
  }
  return ExportInfo{task, all_logits};
}

}  // namespace tinylm
