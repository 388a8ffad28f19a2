#include "cached_model.h"

#include <stdexcept>
#include <string>

namespace tinylm {

void check_start(std::int64_t batch_size, std::int64_t capacity, std::int64_t max_capacity) {
  if (batch_size < 1) {
    throw std::invalid_argument("batch_size must be at least 1, found " +
                                std::to_string(batch_size) + ".");
  }
  if (capacity < 1 || capacity > max_capacity) {
    throw std::invalid_argument(
        "capacity must be from 1 to max_seq_len = " + std::to_string(max_capacity) + ", found " +
        std::to_string(capacity) + ".");
  }
}

void check_step(std::int64_t vocab_size, const std::vector<std::int32_t>& past_lens,
                std::int64_t capacity, const std::vector<std::int64_t>& ids, std::int64_t length,
                const std::vector<std::int32_t>& seq_lens) {
  const auto batch_size = static_cast<std::int64_t>(past_lens.size());
  if (seq_lens.size() != past_lens.size() || seq_lens.empty()) {
    throw std::invalid_argument("the cache has " + std::to_string(batch_size) +
                                " rows and the input " + std::to_string(seq_lens.size()) +
                                ". Call start() with the batch size first.");
  }
  if (length < 1 || static_cast<std::int64_t>(ids.size()) != batch_size * length) {
    throw std::invalid_argument("ids must hold batch_size * length tokens, " +
                                std::to_string(batch_size) + " * " + std::to_string(length) +
                                ", and at least one a row, found " + std::to_string(ids.size()) +
                                ".");
  }
  for (std::size_t row = 0; row < seq_lens.size(); ++row) {
    if (seq_lens[row] < 0 || seq_lens[row] > length) {
      throw std::invalid_argument("seq_lens of row " + std::to_string(row) +
                                  " must be from 0 to length = " + std::to_string(length) +
                                  ", found " + std::to_string(seq_lens[row]) + ".");
    }
    const std::int64_t needed = std::int64_t{past_lens[row]} + seq_lens[row];
    if (needed > capacity) {
      throw std::invalid_argument("the cache holds " + std::to_string(capacity) +
                                  " tokens a row and row " + std::to_string(row) + " needs " +
                                  std::to_string(needed) +
                                  ". Start with a larger capacity or give fewer tokens.");
    }
  }
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      throw std::invalid_argument(
          "ids must be from 0 to below vocab_size " + std::to_string(vocab_size) + ", found " +
          std::to_string(ids[i]) + " at position " +
          std::to_string(static_cast<std::int64_t>(i) % length) + " of row " +
          std::to_string(static_cast<std::int64_t>(i) / length) +
          ". Use the tokenizer of the model's directory.");
    }
  }
}

}  // namespace tinylm
