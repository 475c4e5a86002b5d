// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
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

// How long a thread without work looks for more before it sleeps: longer than the caller needs from one call to the next, and than a
// selection between a score and a gather, shorter than what a processor could do for others in the time that waking a thread takes.
constexpr std::chrono::microseconds kSpin(40);

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

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `ready` became true within kSpin.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

void run_alone(const std::vector<Phase>& phases) {
  const DefaultFloats floats;
  for (const Phase& phase : phases) {
    for (int64_t i = 0; i < phase.count; ++i) phase.body(i);
  }
}

// What the threads of one call share. It lives on the caller's stack: whoever has taken an item may use it until that item is counted as
// done, and whoever counts the last item of a phase until it has begun the next one, or ended the job.
struct Job {
  const std::vector<Phase>& phases;
  const int threads;
  size_t now = 0;  // the phase
  std::atomic<int64_t> done{0};
};

class Pool {
 public:
  // The pool of this process. A fork copies the object but not its threads, so the child makes its own; the old one is never destroyed
  // (no more is one at exit, when threads may still be inside it).
  static Pool& get() {
    static std::atomic<Pool*> current{nullptr};
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    static_cast<void>(registered);
    Pool* pool = current.load();
    if (pool) return *pool;
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;  // another thread was quicker
    return *pool;
  }

  void run(const std::vector<Phase>& phases, int threads) {
    if (busy_.exchange(true, std::memory_order_acquire)) return run_alone(phases);
    const DefaultFloats floats;
    grow(threads - 1);
    Job job{phases, threads};
    job_ = &job;
    ended_.store(false, std::memory_order_relaxed);
    begin(job, 0);
    Seat& seat = seats_[0];
    const auto ready = [this] { return ended_.load() || has_work(0); };
    while (!ended_.load(std::memory_order_acquire)) {
      if (!take(0) && !spin_until(ready)) sleep(seat, ready);
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  // Of one thread. Number 0 is whichever thread calls.
  struct alignas(64) Seat {
    std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable wake;
    uint64_t seen = 0;  // the last phase that this thread worked on
  };

  void grow(int workers) {  // only called by the owner of busy_
    sigset_t all, old;      // signals are for the application's threads
    if (workers_ >= workers) return;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    try {
      for (; workers_ < workers; ++workers_) {
        const int id = workers_ + 1;
        std::thread([this, id] { serve(id); }).detach();
      }
    } catch (const std::system_error&) {  // the system gives no more threads: do with fewer
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }

  void serve(int id) {
    const DefaultFloats floats;
    const auto ready = [this, id] { return has_work(id); };
    for (;;) {
      if (!take(id) && !spin_until(ready)) sleep(seats_[id], ready);
    }
  }

  // Begins the first phase from `phase` on that has items, or ends the job.
  void begin(Job& job, size_t phase) {
    while (phase < job.phases.size() && job.phases[phase].count == 0) ++phase;
    if (phase == job.phases.size()) {
      ended_.store(true);
      wake(0);
      return;
    }
    const int64_t count = job.phases[phase].count;
    job.now = phase;
    job.done.store(0, std::memory_order_relaxed);
    ++phase_;
    tickets_.store(static_cast<uint64_t>(std::min<int64_t>(job.threads, count)) << 32 | static_cast<uint64_t>(count));
    wake(0);
    wake_below(0);
  }

  // Threads 2 i + 1 and 2 i + 2 are woken by thread i, so that no thread makes more than two system calls.
  void wake_below(int id) {
    for (int i = 2 * id + 1; i <= 2 * id + 2; ++i) {
      if (has_work(i)) wake(i);
    }
  }

  void wake(int id) {
    if (id >= kMaxThreads) return;
    Seat& seat = seats_[id];
    if (!seat.asleep.load() || !seat.asleep.exchange(false)) return;
    {
      const std::lock_guard<std::mutex> lock(seat.mutex);
    }  // it sleeps by now, or will see what it waits for
    seat.wake.notify_one();
  }

  template <class Ready>
  static void sleep(Seat& seat, const Ready& ready) {
    std::unique_lock<std::mutex> lock(seat.mutex);
    for (;;) {
      seat.asleep.store(true);  // before the last look: whoever publishes work looks here afterwards
      if (ready()) break;
      seat.wake.wait(lock);
    }
    seat.asleep.store(false);
  }

  bool has_work(int id) const {
    const uint64_t tickets = tickets_.load();
    return (tickets & kLeft) != 0 && static_cast<uint64_t>(id) < tickets >> 32;
  }

  // Takes one item and works on it, if there is one.
  bool take(int id) {
    uint64_t tickets = tickets_.load(std::memory_order_acquire);
    do {
      if ((tickets & kLeft) == 0 || static_cast<uint64_t>(id) >= tickets >> 32) return false;
    } while (!tickets_.compare_exchange_weak(tickets, tickets - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    if (seats_[id].seen != phase_) {
      seats_[id].seen = phase_;
      wake_below(id);
    }
    Job& job = *job_;
    const Phase& phase = job.phases[job.now];
    const int64_t count = phase.count;
    phase.body(count - static_cast<int64_t>(tickets & kLeft));
    if (job.done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) begin(job, job.now + 1);
    return true;
  }

  static constexpr uint64_t kLeft = 0xffffffffu;
  // Of the phase that is running: how many threads may take part, in the upper half, and the items that none has taken yet. Whoever
  // takes one by decrementing it keeps the phase, and what follows, from changing: these are not atomic.
  alignas(64) std::atomic<uint64_t> tickets_{0};
  Job* job_ = nullptr;
  uint64_t phase_ = 0;  // counted over all jobs
  std::atomic<bool> ended_{true};
  alignas(64) std::atomic<bool> busy_{false};
  int workers_ = 0;
  Seat seats_[kMaxThreads];
};

int processors() {
#if defined(__linux__)
  cpu_set_t set;  // those that this thread may run on
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

void parallel(const std::vector<Phase>& phases, int threads) {
  int64_t most = 0;
  for (const Phase& phase : phases) most = std::max(most, phase.count);
  threads = static_cast<int>(std::min<int64_t>({threads, most, kMaxThreads}));
  if (threads > 1 && most <= UINT32_MAX) {
    Pool::get().run(phases, threads);
  } else {
    run_alone(phases);
  }
}

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body) { parallel({{count, body}}, threads); }

int useful_threads(int32_t threads, int64_t bytes) {
  // Waking a sleeping thread costs about as much as moving this many bytes.
  constexpr int64_t kBytesPerThread = 1 << 20;
  const int64_t worth = bytes / kBytesPerThread;
  if (worth < 2 || threads == 1) return 1;
  const int64_t most = processors();  // more threads than processors only wait for each other
  return static_cast<int>(std::min<int64_t>({threads > 0 ? std::min<int64_t>(threads, most) : most, kMaxThreads, worth}));
}

}  // namespace v2drop
