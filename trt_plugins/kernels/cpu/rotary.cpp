#include "rotary.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

namespace tinylm::cpu {

RotaryTable::RotaryTable(float theta, std::int64_t rope_dim) : angles_(std::make_shared<Angles>()) {
  for (std::int64_t i = 0; i < rope_dim; i += 2) {
    const double exponent = -static_cast<double>(i) / static_cast<double>(rope_dim);
    frequencies_.push_back(static_cast<float>(std::pow(static_cast<double>(theta), exponent)));
  }
}

std::shared_ptr<RotaryTable> RotaryTable::shared(float theta, std::int64_t rope_dim) {
  static std::mutex mutex;
  static std::map<std::pair<float, std::int64_t>, std::weak_ptr<RotaryTable>> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<RotaryTable>& kept = tables[{theta, rope_dim}];
  std::shared_ptr<RotaryTable> table = kept.lock();
  if (table == nullptr) kept = table = std::make_shared<RotaryTable>(theta, rope_dim);
  return table;
}

std::shared_ptr<const RotaryTable::Angles> RotaryTable::angles(std::int64_t num_positions) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto width = static_cast<std::int64_t>(2 * frequencies_.size());
  const auto known = static_cast<std::int64_t>(angles_->size()) / width;
  if (known >= num_positions) return angles_;
  const std::int64_t wanted = std::max<std::int64_t>({num_positions, 2 * known, 256});
  auto grown = std::make_shared<Angles>(*angles_);
  grown->resize(static_cast<std::size_t>(wanted * width));
  for (std::int64_t position = known; position < wanted; ++position) {
    float* row = grown->data() + position * width;
    for (std::size_t i = 0; i < frequencies_.size(); ++i) {
      // The angle is rounded to float32, as in PyTorch, before its cosine is taken.
      const float angle = static_cast<float>(position) * frequencies_[i];
      row[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      row[frequencies_.size() + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
  angles_ = std::move(grown);
  return angles_;
}

}  // namespace tinylm::cpu
