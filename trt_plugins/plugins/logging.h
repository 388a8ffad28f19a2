/// @file logging.h
/// Messages to TensorRT's logger, and the edge between exceptions and TensorRT.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace tinylm::plugins {

/// Where TensorRT says that its logger is; set for plugins that travel inside an engine.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

/// Logs an error: to the logger of the engine or context, else to TensorRT's own, else to stderr.
void log_error(const std::string& message) noexcept;

/// Calls f at a noexcept edge.
/// @param node Name of the network's layer, for the message.
/// @return What f returns, or `failure` after it has thrown and the message has been logged.
template <typename R, typename F>
R guarded(const std::string& node, R failure, F f) noexcept {
  try {
    return f();
  } catch (const std::exception& error) {
    log_error("tinylm: node '" + node + "': " + error.what());
  } catch (...) {
    log_error("tinylm: node '" + node + "': an exception that is no std::exception");
  }
  return failure;
}

}  // namespace tinylm::plugins
