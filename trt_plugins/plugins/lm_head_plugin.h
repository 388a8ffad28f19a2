/// @file lm_head_plugin.h
/// TensorRT plugin LmHead; inputs and attributes: export/plugin_ops.py.
#pragma once

#include "plugin_base.h"

namespace tinylm::plugins {

class LmHeadPlugin final : public PluginBase<LmHeadPlugin, nvinfer1::IPluginV3OneBuild> {
 public:
  static constexpr const char* kName = "LmHead";

  /// @throws std::invalid_argument An attribute is missing or out of range.
  explicit LmHeadPlugin(const FieldReader& fields);
  static void describe(std::vector<nvinfer1::PluginField>& fields);
  void write(FieldWriter& fields) const;
  void check(const nvinfer1::PluginTensorDesc* in, std::int32_t count) const;

  std::int32_t getNbOutputs() const noexcept override { return 1; }
  std::int32_t getOutputDataTypes(nvinfer1::DataType* out, std::int32_t num_outputs,
                                  const nvinfer1::DataType* in,
                                  std::int32_t num_inputs) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t num_inputs,
                               const nvinfer1::DimsExprs* shape_inputs,
                               std::int32_t num_shape_inputs, nvinfer1::DimsExprs* out,
                               std::int32_t num_outputs,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t pos, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 std::int32_t num_inputs,
                                 std::int32_t num_outputs) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override;

 private:
  float eps_;
};

}  // namespace tinylm::plugins
