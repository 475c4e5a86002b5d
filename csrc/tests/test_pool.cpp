// SPDX-License-Identifier: Apache-2.0
//
// The pool of threads: every item of every phase runs once, phases do not overlap, also with more threads than processors, with several
// callers at once and in a forked child; and threads without work sleep.
#include "thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <thread>
#include <vector>

using v2drop::parallel;
using v2drop::Phase;

namespace {

std::atomic<int> failures{0};
void check(bool ok, const char* what) {
  if (!ok && ++failures <= 20) std::printf("%s\n", what);
}

// Phases of all kinds of sizes: what one writes the next one reads, in plain memory, which ThreadSanitizer would report.
void count_items(int threads, int64_t most) {
  const std::vector<int64_t> counts = {0, most, 1, 0, most / 2, 3, 0};
  std::vector<std::vector<int>> seen;
  for (int64_t count : counts) seen.emplace_back(static_cast<size_t>(count), 0);
  std::vector<Phase> phases;
  for (size_t p = 0; p < counts.size(); ++p) {
    phases.push_back({counts[p], [&seen, p](int64_t i) {
                        ++seen[p][static_cast<size_t>(i)];
                        for (size_t before = 0; before < p; ++before) {
                          for (int n : seen[before]) check(n == 1, "a phase began before the one before it had ended");
                        }
                      }});
  }
  parallel(phases, threads);
  for (const std::vector<int>& of_phase : seen) {
    for (int n : of_phase) check(n == 1, "an item did not run once");
  }
}

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void idle() {
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double used = cpu_seconds() - before;
  check(used < 0.05, "threads without work do not sleep");
}

}  // namespace

int main() {
  for (int threads : {1, 2, 7, 3, 40}) {
    for (int i = 0; i < 50; ++i) count_items(threads, 1 + i * 3);
    idle();  // the next call has to wake them
  }
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([c] {
      for (int i = 0; i < 100; ++i) count_items(2 + c, 20);
    });
  }
#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer cannot start threads in the child of a process that had some
  int status = -1;
  const pid_t child = fork();  // while threads run: those of the parent do not exist there
  if (child == 0) {
    const int before = failures;
    for (int i = 0; i < 10; ++i) count_items(3, 20);
    _exit(failures == before ? 0 : 1);
  }
  waitpid(child, &status, 0);
  check(status == 0, "a forked child failed");
#endif
  for (std::thread& caller : callers) caller.join();

  check(v2drop::useful_threads(2, 100) == 1, "small work is split");
  check(v2drop::useful_threads(1, int64_t{1} << 40) == 1 && v2drop::useful_threads(1000, int64_t{1} << 40) <= 256, "too many threads");
  std::printf("pool: %s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
