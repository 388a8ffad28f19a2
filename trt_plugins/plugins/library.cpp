/// @file library.cpp
/// What TensorRT and Python look up in libtinylm_trt.so.
#include <NvInferRuntime.h>

#include "bit_linear_plugin.h"
#include "flash_mla_plugin.h"
#include "lm_head_plugin.h"

#define TINYLM_EXPORT extern "C" __attribute__((visibility("default")))
#define TINYLM_TEXT_(x) #x
#define TINYLM_TEXT(x) TINYLM_TEXT_(x)

using tinylm::plugins::BitLinearPlugin;
using tinylm::plugins::Creator;
using tinylm::plugins::FlashMlaPlugin;
using tinylm::plugins::LmHeadPlugin;

/// Called by TensorRT when it loads the library or an engine that holds it.
TINYLM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  tinylm::plugins::set_logger_finder(finder);
}

/// Called by IPluginRegistry::loadLibrary.
TINYLM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  static Creator<BitLinearPlugin> bit_linear;
  static Creator<FlashMlaPlugin> flash_mla;
  static Creator<LmHeadPlugin> lm_head;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&bit_linear, &flash_mla, &lm_head};
  count = 3;
  return creators;
}

/// The version of TinyLM, as the Python package's.
TINYLM_EXPORT const char* tinylm_version() { return TINYLM_VERSION; }

/// What the library was built with.
TINYLM_EXPORT const char* tinylm_trt_build_info() {
  return "TensorRT headers " TINYLM_TEXT(NV_TENSORRT_MAJOR) "." TINYLM_TEXT(
      NV_TENSORRT_MINOR) "." TINYLM_TEXT(NV_TENSORRT_PATCH) ", CUDA " TINYLM_TEXT(CUDART_VERSION);
}
