/// @file thread_pool.h
/// A Parallel of plain threads, started anew for each call: sanitizers see every hand-over.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

#include "parallel.h"

namespace tinylm::testing {

/// Counts its calls, so that a test knows that threads were asked for.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads) : num_threads_(num_threads) {}

  cpu::Parallel parallel() { return {&ThreadPool::run, this}; }
  int num_calls() const { return num_calls_; }

 private:
  static void run(void* pool, std::size_t count, void (*task)(void* data, std::size_t i),
                  void* data) {
    auto& self = *static_cast<ThreadPool*>(pool);
    ++self.num_calls_;
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
      for (std::size_t i = next++; i < count; i = next++) task(data, i);
    };
    std::vector<std::thread> threads;
    for (int t = 1; t < self.num_threads_; ++t) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
  }

  int num_threads_;
  int num_calls_ = 0;
};

}  // namespace tinylm::testing
