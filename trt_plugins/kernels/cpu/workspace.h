/// @file workspace.h
/// Scratch memory that a thread keeps, so that no kernel allocates once it has seen its sizes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace tinylm::cpu {

/// What a buffer is for. Two that are in use at once must differ.
enum class Scratch {
  kQuantized,  ///< caller of linear(): activations
  kRowScales,  ///< caller of linear(): multipliers and corrections
  kPanel,      ///< a task of linear(): unpacked weights
  kSums,       ///< a task of linear(): integer sums of fp8 digits
  kNormed,     ///< a row in the quantiser
  kCaller,     ///< caller of latent_attention()
  kTask,       ///< a task of latent_attention()
  kCount,
};

/// Returns the calling thread's buffer for that purpose, of at least `bytes`, 64-byte aligned. It
/// stays valid until the thread asks for more under the same name.
/// @throws std::bad_alloc There is no memory.
inline void* scratch(Scratch name, std::size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    std::size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
  Buffer& buffer = buffers[static_cast<int>(name)];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, rounded);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = rounded;
  }
  return buffer.data;
}

/// The same, as elements of T.
template <typename T>
T* scratch_of(Scratch name, std::int64_t count) {
  return static_cast<T*>(scratch(name, static_cast<std::size_t>(count) * sizeof(T)));
}

inline constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace tinylm::cpu
