/// @file parallel.h
/// How a kernel asks its caller for threads, without knowing whose they are.
#pragma once

#include <cstddef>

namespace tinylm::cpu {

/// A thread pool seen through one function pointer. ONNX Runtime's own pool stands behind it in the
/// ops; a default-constructed object runs the tasks one after the other.
struct Parallel {
  /// Calls task(data, i) for every i in [0, count), in any order, on any thread, and returns when
  /// all are done. nullptr for the calling thread alone.
  void (*run)(void* pool, std::size_t count, void (*task)(void* data, std::size_t i),
              void* data) = nullptr;
  void* pool = nullptr;

  /// Runs body(i) for every i in [0, count).
  template <typename Body>
  void operator()(std::size_t count, const Body& body) const {
    if (run == nullptr || count <= 1) {
      for (std::size_t i = 0; i < count; ++i) body(i);
      return;
    }
    run(
        pool, count, [](void* data, std::size_t i) { (*static_cast<const Body*>(data))(i); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace tinylm::cpu
