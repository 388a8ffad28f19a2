/// @file ort_model_steps.cpp
/// Runs the steps that standard input tells and writes their logits to standard output, float32 in
/// machine order; tests/test_cpp_runtime.py compares them with export/ort_session.py.
///
///   ort_model_steps DIR OPS_LIBRARY|-
///
/// Standard input holds numbers: batch_size, capacity, then for each step S, seq_lens [B] and
/// ids [B, S].
#include <cstdio>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "runtime/ort_model.h"

namespace {

template <typename T>
std::vector<T> read_numbers(std::int64_t count) {
  std::vector<T> numbers(static_cast<std::size_t>(count));
  for (T& number : numbers) std::cin >> number;
  return numbers;
}

void run(tinylm::OrtModel& model) {
  std::int64_t batch_size = 0;
  std::int64_t capacity = 0;
  std::cin >> batch_size >> capacity;
  model.start(batch_size, capacity);
  for (std::int64_t length = 0; std::cin >> length;) {
    const auto seq_lens = read_numbers<std::int32_t>(batch_size);
    const auto ids = read_numbers<std::int64_t>(batch_size * length);
    const tinylm::Logits logits = model.step(ids, length, seq_lens);
    const auto count = logits.batch_size * logits.length * logits.vocab_size;
    std::fwrite(logits.data, sizeof(float), static_cast<std::size_t>(count), stdout);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) return 2;
  tinylm::OrtOptions options;
  options.num_threads = 1;
  if (std::string(argv[2]) != "-") options.ops_library = argv[2];
  tinylm::OrtModel model(argv[1], options);
  run(model);
  return 0;
} catch (const std::exception& error) {
  std::cerr << "ort_model_steps: " << error.what() << '\n';
  return 2;
}
