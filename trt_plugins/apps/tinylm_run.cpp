/// @file tinylm_run.cpp
/// Continues a prompt with a TensorRT engine and prints the new ids: tinylm-run --help.
#include <cstdlib>
#include <exception>
#include <iostream>
#include <optional>

#include "run_arguments.h"
#include "runtime/generate.h"
#include "runtime/trt_model.h"

namespace {

constexpr const char* kPluginsVariable = "TINYLM_TRT_LIBRARY";

void run(const tinylm::RunArguments& arguments) {
  tinylm::TrtOptions options;
  options.cuda_graph = arguments.cuda_graph;
  options.plugins = arguments.plugins;
  if (const char* named = std::getenv(kPluginsVariable);
      named != nullptr && options.plugins.empty()) {
    options.plugins = named;
  }
  tinylm::TrtModel model(arguments.engine, options);
  const auto eos = arguments.ignore_eos ? std::nullopt : model.config().eos_token_id;
  const auto print = [](std::int64_t token) {
    std::cout << token << std::endl;  // at once, for whoever reads along
    return true;
  };
  tinylm::generate(model, arguments.prompt_ids, arguments.max_new_tokens, eos, print);
}

}  // namespace

int main(int argc, char** argv) try {
  const auto arguments = tinylm::parse_run_arguments({argv + 1, argv + argc});
  if (arguments.help) {
    std::cout << tinylm::kRunUsage;
  } else {
    run(arguments);
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "tinylm-run: " << error.what() << '\n';
  return 2;
}
