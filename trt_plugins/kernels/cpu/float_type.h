/// @file float_type.h
/// The floating point types that tensors may have.
#pragma once

namespace tinylm::cpu {

/// Element type of x, y, q, kv and the rope cache.
enum class FloatType { kFloat, kFloat16, kBFloat16 };

/// Bytes of one element.
inline constexpr int float_size(FloatType type) { return type == FloatType::kFloat ? 4 : 2; }

}  // namespace tinylm::cpu
