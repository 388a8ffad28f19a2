/// @file plugin_base.h
/// What plugins do alike: names, capabilities, clones, serialisation.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "fields.h"
#include "logging.h"

namespace tinylm::plugins {

/// A plugin without state beyond its attributes, so that clones and contexts may run at once.
/// @tparam Derived Has `static constexpr const char* kName`, `Derived(const FieldReader&)`,
///     `void write(FieldWriter&) const` and `void check(const PluginTensorDesc*, std::int32_t)
///     const`, which throws std::invalid_argument where the inputs don't fit the attributes.
/// @tparam Build nvinfer1::IPluginV3OneBuild or V2.
template <typename Derived, typename Build>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public Build,
                   public nvinfer1::IPluginV3OneRuntime {
 public:
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<Build*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded<nvinfer1::IPluginV3*>(node_, nullptr, [&] {
      auto copy = std::make_unique<Derived>(self());
      copy->serialized_.reset();
      return copy.release();
    });
  }

  const char* getPluginName() const noexcept override { return Derived::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded<const nvinfer1::PluginFieldCollection*>(node_, nullptr, [&] {
      auto writer = std::make_shared<FieldWriter>();
      writer->integer(kFormatField, kFormatVersion);
      self().write(*writer);
      serialized_ = writer;
      return writer->collection();
    });
  }

  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t count,
                               const nvinfer1::DynamicPluginTensorDesc*,
                               std::int32_t) noexcept override {
    return guarded(node_, -1, [&] {
      std::vector<nvinfer1::PluginTensorDesc> tensors;
      for (std::int32_t i = 0; i < count; ++i) tensors.push_back(in[i].desc);
      self().check(tensors.data(), count);
      return 0;
    });
  }

  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, std::int32_t count,
                             const nvinfer1::PluginTensorDesc*, std::int32_t) noexcept override {
    return guarded(node_, -1, [&] {
      self().check(in, count);
      return 0;
    });
  }

  /// Name of the network's layer, for messages.
  void set_node(const std::string& node) { node_ = node; }

 protected:
  std::string node_;

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  std::shared_ptr<FieldWriter> serialized_;  // lives until the next call
};

/// Makes plugins from an ONNX node's attributes or from an engine.
template <typename Plugin>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    Plugin::describe(names_);
    for (auto& field : names_) field.data = nullptr;
    collection_.nbFields = static_cast<std::int32_t>(names_.size());
    collection_.fields = names_.data();
  }

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    const std::string node = name == nullptr ? "" : name;
    return guarded<nvinfer1::IPluginV3*>(node, nullptr, [&] {
      const FieldReader reader(fields);
      if (phase == nvinfer1::TensorRTPhase::kRUNTIME) reader.check_format();
      auto plugin = std::make_unique<Plugin>(reader);
      plugin->set_node(node);
      return plugin.release();
    });
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Plugin::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<nvinfer1::PluginField> names_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace tinylm::plugins
