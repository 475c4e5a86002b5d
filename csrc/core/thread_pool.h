// SPDX-License-Identifier: Apache-2.0
//
// One small persistent pool of threads. No OpenMP: a second OpenMP runtime beside the caller's would oversubscribe the machine.
#ifndef V2DROP_CORE_THREAD_POOL_H_
#define V2DROP_CORE_THREAD_POOL_H_

#include <cstdint>
#include <functional>

namespace v2drop {

// Calls body(i) for every i in [0, count), on up to `threads` threads, the caller's included, and returns when all are done. Chunks are
// handed out as threads become free. If the pool is busy with another caller's work, the caller does all of it alone.
// body must not throw.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

// How many of `threads` threads (0: all) are worth waking for work that moves this many bytes.
int useful_threads(int32_t threads, int64_t bytes);

}  // namespace v2drop

#endif  // V2DROP_CORE_THREAD_POOL_H_
