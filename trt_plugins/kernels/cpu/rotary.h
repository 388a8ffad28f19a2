/// @file rotary.h
/// Cosine and sine of the rotary angles, kept for as many positions as have been asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace tinylm::cpu {

/// The angles of one (theta, rope_dim). Shared by the layers of a model.
class RotaryTable {
 public:
  /// cos [P / 2] and sin [P / 2] of each position, one after the other: float32 values.
  using Angles = std::vector<float>;

  RotaryTable(float theta, std::int64_t rope_dim);

  /// Returns the process's table for these parameters.
  static std::shared_ptr<RotaryTable> shared(float theta, std::int64_t rope_dim);

  /// Returns angles for at least `num_positions` positions.
  std::shared_ptr<const Angles> angles(std::int64_t num_positions);

 private:
  std::vector<float> frequencies_;
  std::mutex mutex_;
  std::shared_ptr<const Angles> angles_;
};

}  // namespace tinylm::cpu
