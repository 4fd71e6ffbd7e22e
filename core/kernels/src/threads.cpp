#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

constexpr auto AWAKE = std::chrono::microseconds(200);  // after the last job
constexpr int32_t MOST = 256;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  int64_t pieces;
  void (*work)(void*, int64_t);
  void* context;
  int32_t helpers;  // that may join
  std::atomic<int64_t> next{0};
};

struct Pool {
  std::mutex callers;  // one at a time has the threads
  std::atomic<Job*> job{nullptr};
  std::atomic<uint64_t> number{0};  // of jobs so far
  std::atomic<int32_t> inside{0};   // threads that may be looking at `job`
  std::atomic<int32_t> asleep{0};
  std::mutex sleeping;
  std::condition_variable wake;
  int32_t started = 0;

  static void run(Job& job) {
    for (int64_t piece; (piece = job.next.fetch_add(1, std::memory_order_relaxed)) < job.pieces;) job.work(job.context, piece);
  }

  void help(int32_t own) {
    uint64_t seen = 0;
    for (;;) {
      auto until = std::chrono::steady_clock::now() + AWAKE;
      for (int spins = 0; number.load() == seen; spins++) {
        pause();
        if (spins % 64 == 63 && std::chrono::steady_clock::now() > until) {
          std::unique_lock<std::mutex> held(sleeping);
          asleep.fetch_add(1);
          wake.wait(held, [&] { return number.load() != seen; });
          asleep.fetch_sub(1);
        }
      }
      seen = number.load();
      inside.fetch_add(1);
      if (Job* current = job.load(); current && own < current->helpers) run(*current);
      inside.fetch_sub(1);
    }
  }

  void start(int32_t helpers) {  // those that the system does not give are done without
    for (; started < helpers; started++) {
      try {
        std::thread([this, own = started] { help(own); }).detach();
      } catch (const std::system_error&) {
        return;
      }
    }
  }

  void share(Job& given) {
    start(given.helpers);
    job.store(&given);
    number.fetch_add(1);
    if (asleep.load() > 0) {
      std::lock_guard<std::mutex> held(sleeping);
      wake.notify_all();
    }
    run(given);
    job.store(nullptr);
    while (inside.load() > 0) pause();  // who is inside may still be at a piece; who comes now finds no job
  }
};

Pool* pool = new Pool;  // never deleted: its threads outlive static destruction

#if defined(__unix__) || defined(__APPLE__)
// A child has the memory of the pool and none of its threads: it takes a new one, and leaves the old as it lies.
const int registered = pthread_atfork(nullptr, nullptr, [] { pool = new (std::nothrow) Pool; });
#endif

}  // namespace

void share(int64_t pieces, int32_t threads, void (*work)(void*, int64_t), void* context) {
  Pool* here = pool;
  if (threads > 1 && pieces > 1 && here && here->callers.try_lock()) {
    std::lock_guard<std::mutex> held(here->callers, std::adopt_lock);
    Job job{pieces, work, context, (threads < MOST ? threads : MOST) - 1, {}};
    here->share(job);
    return;
  }
  for (int64_t piece = 0; piece < pieces; piece++) work(context, piece);
}
