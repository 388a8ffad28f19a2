/// @file generate_ort.cpp
/// Continues a prompt with an exported ONNX directory: generate_ort DIR OPS_LIBRARY 1,2,3 [MAX].
#include <charconv>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "runtime/generate.h"
#include "runtime/ort_model.h"

namespace {

std::int64_t to_int(const std::string& text) {
  std::int64_t value = 0;
  const auto end = text.data() + text.size();
  if (const auto [rest, error] = std::from_chars(text.data(), end, value);
      rest == end && error == std::errc())
    return value;
  throw std::invalid_argument("an integer expected, found '" + text + "'. Give ids as 1,2,3.");
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4 && argc != 5)
    throw std::invalid_argument("usage: generate_ort DIR OPS_LIBRARY|- 1,2,3 [MAX_NEW_TOKENS]");
  tinylm::OrtOptions options;
  if (std::string(argv[2]) != "-") options.ops_library = argv[2];  // -: the function bodies
  tinylm::OrtModel model(argv[1], options);
  std::vector<std::int64_t> prompt;
  std::istringstream ids(argv[3]);
  for (std::string id; std::getline(ids, id, ',');) prompt.push_back(to_int(id));
  const std::int64_t max_new_tokens = argc == 5 ? to_int(argv[4]) : 64;
  for (const auto id : tinylm::generate(model, prompt, max_new_tokens, model.config().eos_token_id))
    std::cout << id << '\n';
  return 0;
} catch (const std::exception& error) {
  std::cerr << "generate_ort: " << error.what() << '\n';
  return 2;
}
