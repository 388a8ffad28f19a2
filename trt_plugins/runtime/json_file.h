/// @file json_file.h
/// A JSON object of a model's directory, with messages that name the file. Private to the library:
/// no public header includes it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>

namespace tinylm {

using Json = nlohmann::json;

/// A JSON object with its path, for error messages.
class JsonFile {
 public:
  /// Reads a file.
  /// @param path The file.
  /// @param way_out What to do about a bad one, for messages.
  /// @throws std::runtime_error Missing, or not a JSON object.
  JsonFile(const std::filesystem::path& path, std::string way_out)
      : path_(path), way_out_(std::move(way_out)) {
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
    return std::runtime_error(path_.string() + ": " + message + " " + way_out_);
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
  std::string way_out_;
  Json values_;
};

}  // namespace tinylm
