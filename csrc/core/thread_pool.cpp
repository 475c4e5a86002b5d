// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace v2drop {
namespace {

constexpr int kMaxThreads = 256;

// Subnormals count, whatever the caller's thread was set to: a worker thread would not have that setting, and results must not depend
// on who computes them.
class DefaultFloats {
#if defined(__x86_64__)
 public:
  DefaultFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloats() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  DefaultFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~DefaultFloats() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
 public:
  DefaultFloats() {}
#endif
};

struct Job {
  const std::function<void(int64_t)>& body;
  const int64_t count;
  std::atomic<int64_t> next{0};
  int seats;       // workers that may still join
  int inside = 0;  // workers that have joined and not left; guarded by the pool's mutex, like seats

  void work() {
    const DefaultFloats floats;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  }
};

class Pool {
 public:
  // The pool of this process. A fork copies the object but not its threads, so the child makes its own; the old one is never destroyed
  // (no more is one at exit, when threads may still be inside it).
  static Pool& get() {
    static std::atomic<Pool*> current{nullptr};
    Pool* pool = current.load();
    if (pool && pool->process_ == getpid()) return *pool;
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;  // another thread was quicker
    return *pool;
  }

  void run(int64_t count, int threads, const std::function<void(int64_t)>& body) {
    Job job{body, count, {}, threads - 1};
    if (busy_.exchange(true, std::memory_order_acquire)) {
      job.work();
      return;
    }
    grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
    }
    for (int i = 1; i < threads; ++i) wake_.notify_one();
    job.work();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      job_ = nullptr;  // whoever has not come by now is not waited for
      left_.wait(lock, [&] { return job.inside == 0; });
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  void grow(int workers) {  // only called by the owner of busy_
    sigset_t all, old;      // signals are for the application's threads
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    try {
      for (; workers_ < workers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // the system gives no more threads: do with fewer
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ && job_->seats > 0; });
      Job& job = *job_;
      --job.seats;
      ++job.inside;
      lock.unlock();
      job.work();
      lock.lock();
      if (--job.inside == 0) left_.notify_one();
    }
  }

  const pid_t process_ = getpid();
  std::atomic<bool> busy_{false};
  int workers_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  Job* job_ = nullptr;
};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads > 1) {
    Pool::get().run(count, threads, body);
  } else {
    Job{body, count, {}, 0}.work();
  }
}

int useful_threads(int32_t threads, int64_t bytes) {
  // Waking a sleeping thread costs about as much as moving this many bytes.
  constexpr int64_t kBytesPerThread = 1 << 20;
  const int64_t most = threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency());
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({most, kMaxThreads, bytes / kBytesPerThread})));
}

}  // namespace v2drop
