/// @file flash_mla_plugin.h
/// TensorRT plugin FlashMLA; inputs and attributes: export/plugin_ops.py. The present cache is the
/// past one: its outputs alias its inputs.
#pragma once

#include "latent_attention.h"
#include "plugin_base.h"

namespace tinylm::plugins {

class FlashMlaPlugin final : public PluginBase<FlashMlaPlugin, nvinfer1::IPluginV3OneBuildV2> {
 public:
  static constexpr const char* kName = "FlashMLA";

  /// @throws std::invalid_argument An attribute is missing or out of range, or no kernel serves the
  ///     sizes.
  explicit FlashMlaPlugin(const FieldReader& fields);
  static void describe(std::vector<nvinfer1::PluginField>& fields);
  void write(FieldWriter& fields) const;
  void check(const nvinfer1::PluginTensorDesc* in, std::int32_t count) const;

  std::int32_t getNbOutputs() const noexcept override { return 4; }
  std::int32_t getAliasedInput(std::int32_t output) noexcept override;
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
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t num_inputs,
                               const nvinfer1::DynamicPluginTensorDesc* out,
                               std::int32_t num_outputs) const noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override;

 private:
  cuda::LatentAttentionShape shape_;
};

}  // namespace tinylm::plugins
