#include "generate.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tinylm {

std::vector<std::int64_t> generate(CachedModel& model, const std::vector<std::int64_t>& prompt_ids,
                                   std::int64_t max_new_tokens, std::optional<std::int64_t> eos,
                                   const TokenCallback& on_token) {
  const auto prompt_length = static_cast<std::int64_t>(prompt_ids.size());
  const std::int64_t context = model.config().max_seq_len;
  if (prompt_length == 0) {
    throw std::invalid_argument(
        "the prompt is empty. Give at least one token, such as the beginning-of-sequence token.");
  }
  if (prompt_length >= context) {
    throw std::invalid_argument("the prompt has " + std::to_string(prompt_length) +
                                " tokens, and the context of " + std::to_string(context) +
                                " must hold at least one more. Shorten the prompt.");
  }
  if (max_new_tokens < 0) {
    throw std::invalid_argument("max_new_tokens must be 0 or more, found " +
                                std::to_string(max_new_tokens) + ".");
  }
  max_new_tokens = std::min(max_new_tokens, context - prompt_length);
  model.start(1, prompt_length + max_new_tokens);
  std::vector<std::int64_t> input = prompt_ids;
  std::vector<std::int64_t> generated;
  while (static_cast<std::int64_t>(generated.size()) < max_new_tokens) {
    const auto length = static_cast<std::int64_t>(input.size());
    const Logits logits = model.step(input, length, {static_cast<std::int32_t>(length)});
    const float* last = logits.at(0, logits.length - 1);
    const std::int64_t token = std::max_element(last, last + logits.vocab_size) - last;
    generated.push_back(token);
    if ((on_token && !on_token(token)) || token == eos) break;
    input = {token};
  }
  return generated;
}

}  // namespace tinylm
