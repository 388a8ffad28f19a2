#include "run_arguments.h"

#include <charconv>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>

namespace tinylm {

const char* const kRunUsage =
    "usage: tinylm-run --engine DIR --prompt-ids 1,2,3 [options]\n"
    "\n"
    "Continues a prompt with the most probable tokens and prints their ids, one a line.\n"
    "\n"
    "  --engine DIR          what `tinylm-export trt` wrote\n"
    "  --prompt-ids IDS      token ids with commas between them\n"
    "  --max-new-tokens N    most new tokens; fewer where the context or the text ends (64)\n"
    "  --plugins FILE        libtinylm_trt.so, unless the engine holds its plugins;\n"
    "                        default: what TINYLM_TRT_LIBRARY names\n"
    "  --ignore-eos          go on after the end of the text\n"
    "  --no-cuda-graph       launch each decode step's kernels one by one; the same ids\n"
    "  --help                show this\n"
    "\n"
    "Example: tinylm-run --engine trt --prompt-ids 1,306,4658 --plugins libtinylm_trt.so\n"
    "Exit codes: 0 done, 2 bad usage or input.\n";

namespace {

constexpr const char* kSeeHelp = " See tinylm-run --help.";

std::int64_t to_integer(const std::string& option, const std::string& text) {
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (rest == end && error == std::errc()) return value;
  throw std::invalid_argument(option + ": an integer expected, found '" + text + "'." + kSeeHelp);
}

std::vector<std::int64_t> to_ids(const std::string& option, const std::string& text) {
  std::vector<std::int64_t> ids;
  std::size_t start = 0;
  while (true) {
    const std::size_t comma = text.find(',', start);
    ids.push_back(to_integer(option, text.substr(start, comma - start)));
    if (comma == std::string::npos) return ids;
    start = comma + 1;
  }
}

std::filesystem::path to_path(const std::string& option, const std::string& text) {
  if (text.empty()) throw std::invalid_argument(option + ": a path expected." + kSeeHelp);
  return text;
}

}  // namespace

RunArguments parse_run_arguments(const std::vector<std::string>& arguments) {
  RunArguments found;
  const std::map<std::string, std::function<void()>> switches = {
      {"--ignore-eos", [&] { found.ignore_eos = true; }},
      {"--no-cuda-graph", [&] { found.cuda_graph = false; }},
      {"--help", [&] { found.help = true; }},
  };
  using Take = std::function<void(const std::string& option, const std::string& value)>;
  const std::map<std::string, Take> options = {
      {"--engine", [&](auto& option, auto& value) { found.engine = to_path(option, value); }},
      {"--plugins", [&](auto& option, auto& value) { found.plugins = to_path(option, value); }},
      {"--prompt-ids",
       [&](auto& option, auto& value) { found.prompt_ids = to_ids(option, value); }},
      {"--max-new-tokens",
       [&](auto& option, auto& value) { found.max_new_tokens = to_integer(option, value); }},
  };
  std::set<std::string> given;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::size_t equals = arguments[i].find('=');
    const std::string name = arguments[i].substr(0, equals);
    if (!given.insert(name).second) {
      throw std::invalid_argument(name + ": given twice." + kSeeHelp);
    }
    if (const auto found_switch = switches.find(name); found_switch != switches.end()) {
      if (equals != std::string::npos) {
        throw std::invalid_argument(name + ": takes no value." + kSeeHelp);
      }
      found_switch->second();
      continue;
    }
    const auto option = options.find(name);
    if (option == options.end()) {
      throw std::invalid_argument("unknown argument '" + arguments[i] + "'." + kSeeHelp);
    }
    if (equals != std::string::npos) {
      option->second(name, arguments[i].substr(equals + 1));
    } else if (i + 1 < arguments.size()) {
      option->second(name, arguments[++i]);
    } else {
      throw std::invalid_argument(name + ": a value expected." + kSeeHelp);
    }
  }
  if (found.help) return found;
  for (const char* required : {"--engine", "--prompt-ids"}) {
    if (given.count(required) == 0) {
      throw std::invalid_argument(std::string(required) + " is missing." + kSeeHelp);
    }
  }
  if (found.max_new_tokens < 0) {
    throw std::invalid_argument("--max-new-tokens must be 0 or more, found " +
                                std::to_string(found.max_new_tokens) + "." + kSeeHelp);
  }
  return found;
}

}  // namespace tinylm
