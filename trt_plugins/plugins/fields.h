/// @file fields.h
/// A plugin's attributes: read from what TensorRT hands over, and written for serialisation.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace tinylm::plugins {

inline constexpr const char* kNamespace = "tinylm";
inline constexpr const char* kPluginVersion = "1";
/// Version of what a plugin serialises into an engine.
inline constexpr std::int32_t kFormatVersion = 1;
inline constexpr const char* kFormatField = "format_version";

/// Reads attributes by name. Every getter throws std::invalid_argument that names the attribute,
/// the expected and the found.
class FieldReader {
 public:
  explicit FieldReader(const nvinfer1::PluginFieldCollection* fields);

  /// A whole number in [least, most].
  std::int64_t integer(const char* name, std::int64_t least, std::int64_t most) const;
  /// A finite number.
  float number(const char* name) const;
  std::string text(const char* name) const;

  /// Checks the version of a serialised plugin.
  void check_format() const;

 private:
  const nvinfer1::PluginField& find(const char* name) const;
  const nvinfer1::PluginFieldCollection* fields_;
};

/// Owns attributes for nvinfer1::PluginFieldCollection.
class FieldWriter {
 public:
  void integer(const char* name, std::int64_t value);
  void number(const char* name, float value);
  void text(const char* name, const std::string& value);
  /// The collection, valid as long as this object and until the next attribute.
  const nvinfer1::PluginFieldCollection* collection();

 private:
  std::deque<std::int32_t> integers_;  // addresses stay
  std::deque<float> numbers_;
  std::deque<std::string> texts_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace tinylm::plugins
