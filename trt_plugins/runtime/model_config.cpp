#include "model_config.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace tinylm {
namespace {

using Json = nlohmann::json;

constexpr const char* kModelType = "tinylm";
constexpr int kFormatVersion = 1;
constexpr const char* kWayOut = " Make a directory with `tinylm-export onnx CKPT --out DIR`.";

/// A JSON object with its path, for error messages.
class JsonFile {
 public:
  explicit JsonFile(const std::filesystem::path& path) : path_(path) {
    std::ifstream file(path);
    if (!file) throw error("not found or not readable.");
    try {
      values_ = Json::parse(file);
    } catch (const Json::exception& reason) {
      throw error(std::string("not valid JSON (") + reason.what() + ").");
    }
    if (!values_.is_object()) throw error("a JSON object expected, found " + values_.dump() + ".");
  }

  std::runtime_error error(const std::string& message) const {
    return std::runtime_error(path_.string() + ": " + message + kWayOut);
  }

  const Json& field(const char* name) const {
    const auto found = values_.find(name);
    if (found == values_.end()) throw error(std::string(name) + " is missing.");
    return *found;
  }

  void require(const char* name, const Json& expected) const {
    const Json& found = field(name);
    if (found == expected) return;
    throw error(std::string(name) + " " + expected.dump() + " expected, found " + found.dump() +
                ".");
  }

  std::int64_t positive(const char* name) const {
    const Json& found = field(name);
    if (found.is_number_integer() && found.get<std::int64_t>() >= 1) return found;
    throw error(std::string(name) + " must be a positive integer, found " + found.dump() + ".");
  }

  /// A token id; absent or null where the tokenizer has none.
  std::optional<std::int64_t> token(const char* name, std::int64_t vocab_size) const {
    const auto entry = values_.find(name);
    if (entry == values_.end() || entry->is_null()) return std::nullopt;
    if (entry->is_number_integer()) {
      const auto id = entry->get<std::int64_t>();
      if (id >= 0 && id < vocab_size) return id;
    }
    throw error(std::string(name) + " must be an integer from 0 to below vocab_size " +
                std::to_string(vocab_size) + ", found " + entry->dump() + ".");
  }

 private:
  std::filesystem::path path_;
  Json values_;
};

}  // namespace

ModelConfig ModelConfig::load(const std::filesystem::path& path) {
  const JsonFile json(path);
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
  const JsonFile json(path);
  const Json& task = json.field("task");
  const Json& all_logits = json.field("all_logits");
  if (!task.is_string()) throw json.error("task must be a string, found " + task.dump() + ".");
  if (!all_logits.is_boolean()) {
    throw json.error("all_logits must be true or false, found " + all_logits.dump() + ".");
  }
  return ExportInfo{task, all_logits};
}

}  // namespace tinylm
