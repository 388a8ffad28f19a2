#include "logging.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <string>

namespace tinylm::plugins {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

/// TensorRT's logger from the library that is loaded already; nothing is linked, so that the
/// plugins load beside any release.
nvinfer1::ILogger* global_logger() {
  using GetLogger = nvinfer1::ILogger* (*)();
  static const auto get = [] {
    const std::string name = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    for (const std::string& candidate : {name, std::string("libnvinfer.so.10")}) {
      void* library = dlopen(candidate.c_str(), RTLD_LAZY | RTLD_NOLOAD);
      void* symbol = library == nullptr ? nullptr : dlsym(library, "getLogger");
      if (symbol != nullptr) return reinterpret_cast<GetLogger>(symbol);
    }
    return static_cast<GetLogger>(nullptr);
  }();
  return get == nullptr ? nullptr : get();
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log_error(const std::string& message) noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder;
  nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger == nullptr) logger = global_logger();
  if (logger == nullptr) {
    std::fprintf(stderr, "%s\n", message.c_str());
    return;
  }
  logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
}

}  // namespace tinylm::plugins
