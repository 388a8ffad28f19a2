#include "swiglu.h"

#include <algorithm>

#include "kernel_table.h"

namespace tinylm::cpu {

void swiglu(const void* gate, const void* up, void* y, std::int64_t count, FloatType type,
            const Parallel& parallel) {
  constexpr std::int64_t kCountATask = 4096;
  const KernelTable& kernels = kernel_table(active_isa());
  const std::int64_t tasks = (count + kCountATask - 1) / kCountATask;
  parallel(static_cast<std::size_t>(tasks), [&](std::size_t task) {
    const std::int64_t first = static_cast<std::int64_t>(task) * kCountATask;
    const std::int64_t offset = first * float_size(type);
    kernels.swiglu(static_cast<const char*>(gate) + offset, static_cast<const char*>(up) + offset,
                   static_cast<char*>(y) + offset, std::min(kCountATask, count - first), type);
  });
}

}  // namespace tinylm::cpu
