#include "fields.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace tinylm::plugins {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

FieldReader::FieldReader(const nvinfer1::PluginFieldCollection* fields) : fields_(fields) {
  if (fields == nullptr) throw std::invalid_argument("attributes expected, found none at all.");
}

const PluginField& FieldReader::find(const char* name) const {
  std::string found;
  for (std::int32_t i = 0; i < fields_->nbFields; ++i) {
    const PluginField& field = fields_->fields[i];
    if (std::string(field.name) == name && field.data != nullptr) return field;
    found += (found.empty() ? "" : ", ") + std::string(field.name);
  }
  throw std::invalid_argument("attribute '" + std::string(name) + "' is required, found " +
                              (found.empty() ? "none" : found) +
                              ". Export the model again with this version of tinylm.");
}

std::int64_t FieldReader::integer(const char* name, std::int64_t least, std::int64_t most) const {
  const PluginField& field = find(name);
  std::int64_t value = 0;
  if (field.type == PluginFieldType::kINT32 && field.length == 1) {
    value = *static_cast<const std::int32_t*>(field.data);
  } else if (field.type == PluginFieldType::kINT64 && field.length == 1) {
    value = *static_cast<const std::int64_t*>(field.data);
  } else {
    throw std::invalid_argument("attribute '" + std::string(name) + "' must be one integer.");
  }
  if (value < least || value > most) {
    throw std::invalid_argument("attribute '" + std::string(name) + "' must be " +
                                std::to_string(least) + " .. " + std::to_string(most) + ", found " +
                                std::to_string(value) + ".");
  }
  return value;
}

float FieldReader::number(const char* name) const {
  const PluginField& field = find(name);
  if (field.type != PluginFieldType::kFLOAT32 || field.length != 1) {
    throw std::invalid_argument("attribute '" + std::string(name) + "' must be one float.");
  }
  const float value = *static_cast<const float*>(field.data);
  if (!std::isfinite(value)) {
    throw std::invalid_argument("attribute '" + std::string(name) + "' must be finite, found " +
                                std::to_string(value) + ".");
  }
  return value;
}

std::string FieldReader::text(const char* name) const {
  const PluginField& field = find(name);
  if (field.type != PluginFieldType::kCHAR) {
    throw std::invalid_argument("attribute '" + std::string(name) + "' must be a string.");
  }
  std::string value(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
  const std::size_t end = value.find('\0');  // some callers count the end of the string
  return end == std::string::npos ? value : value.substr(0, end);
}

void FieldReader::check_format() const {
  const std::int64_t found = integer(kFormatField, 0, INT32_MAX);
  if (found != kFormatVersion) {
    throw std::invalid_argument("the engine holds plugins of format " + std::to_string(found) +
                                ", this library reads format " + std::to_string(kFormatVersion) +
                                ". Build the engine again with `tinylm-export trt`.");
  }
}

void FieldWriter::integer(const char* name, std::int64_t value) {
  integers_.push_back(static_cast<std::int32_t>(value));
  fields_.emplace_back(name, &integers_.back(), PluginFieldType::kINT32, 1);
}

void FieldWriter::number(const char* name, float value) {
  numbers_.push_back(value);
  fields_.emplace_back(name, &numbers_.back(), PluginFieldType::kFLOAT32, 1);
}

void FieldWriter::text(const char* name, const std::string& value) {
  texts_.push_back(value);
  fields_.emplace_back(name, texts_.back().data(), PluginFieldType::kCHAR,
                       static_cast<std::int32_t>(value.size()));
}

const nvinfer1::PluginFieldCollection* FieldWriter::collection() {
  collection_.nbFields = static_cast<std::int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

}  // namespace tinylm::plugins
