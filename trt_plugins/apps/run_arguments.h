/// @file run_arguments.h
/// The command line of tinylm-run.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace tinylm {

/// What the user asked for.
struct RunArguments {
  std::filesystem::path engine;          ///< What `tinylm-export trt` wrote.
  std::filesystem::path plugins;         ///< libtinylm_trt.so; empty if the engine holds them.
  std::vector<std::int64_t> prompt_ids;  ///< At least one.
  std::int64_t max_new_tokens = 64;
  bool ignore_eos = false;
  bool cuda_graph = true;
  bool help = false;  ///< Nothing else counts then.
};

/// What `--help` prints.
extern const char* const kRunUsage;

/// Reads the arguments behind the program's name: `--name value` or `--name=value`, each once.
/// @throws std::invalid_argument An option is unknown, given twice, without its value or with a bad
///     one, or a required one is missing.
RunArguments parse_run_arguments(const std::vector<std::string>& arguments);

}  // namespace tinylm
