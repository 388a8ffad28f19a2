/// @file generate.h
/// Greedy generation, as tinylm/generate.py does it with temperature 0.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "cached_model.h"

namespace tinylm {

/// Called with each new token as soon as it is chosen; false ends the generation.
using TokenCallback = std::function<bool(std::int64_t token)>;

/// Continues one prompt with the most probable tokens.
/// @param model Its cache is started anew.
/// @param prompt_ids At least one token.
/// @param max_new_tokens Most tokens to generate; fewer where the context ends.
/// @param eos Token that ends the text; none never ends it.
/// @param on_token Called for each new token, `eos` too.
/// @return The new tokens, `eos` included where it was chosen.
/// @throws std::invalid_argument The prompt is empty, holds an id that is not in the vocabulary, or
///     leaves no room in the context; or max_new_tokens is negative.
/// @throws std::runtime_error The runtime failed.
std::vector<std::int64_t> generate(CachedModel& model, const std::vector<std::int64_t>& prompt_ids,
                                   std::int64_t max_new_tokens,
                                   std::optional<std::int64_t> eos = std::nullopt,
                                   const TokenCallback& on_token = nullptr);

}  // namespace tinylm
