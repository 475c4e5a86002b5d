// SPDX-License-Identifier: Apache-2.0
//
// One small persistent pool of threads. No OpenMP: a second OpenMP runtime beside the caller's would oversubscribe the machine.
#ifndef V2DROP_CORE_THREAD_POOL_H_
#define V2DROP_CORE_THREAD_POOL_H_

#include <cstdint>
#include <functional>
#include <vector>

namespace v2drop {

// A loop whose items any thread may take: body(i) for every i in [0, count). body must not throw.
struct Phase {
  int64_t count;
  std::function<void(int64_t)> body;
};

// Runs phases one after the other, on up to `threads` threads, the caller's included, and returns when all are done. The items of a
// phase are handed out in order as threads become free; none begins before the last item of the phase before it has ended. The threads
// are woken once for all phases and wait between them without sleeping. If the pool is busy with another caller's work, the caller
// does all of it alone.
void parallel(const std::vector<Phase>& phases, int threads);
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

// How many of `threads` threads (0: all) are worth waking for work that moves this many bytes; never more than there are processors.
int useful_threads(int32_t threads, int64_t bytes);

}  // namespace v2drop

#endif  // V2DROP_CORE_THREAD_POOL_H_
