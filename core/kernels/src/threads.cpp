#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
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
constexpr auto LATE = std::chrono::microseconds(500);  // of lent threads, which all are waited for
constexpr int32_t APART = 64;                          // calls with own threads after lent ones were late

using Clock = std::chrono::steady_clock;

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

// One thread gives jobs, others help.
struct Crew {
  std::atomic<Job*> job{nullptr};
  std::atomic<uint64_t> number{0};  // of jobs so far
  std::atomic<int32_t> inside{0};   // threads that may be looking at `job`

  static void run(Job& job) {
    for (int64_t piece; (piece = job.next.fetch_add(1, std::memory_order_relaxed)) < job.pieces;) job.work(job.context, piece);
  }

  // for the helper of number `own`, with the number of jobs that it has seen: at the next one, if there is one
  void help(uint64_t& seen, int32_t own) {
    const uint64_t now = number.load();
    if (now == seen) return;
    seen = now;
    inside.fetch_add(1);
    if (Job* current = job.load(); current && own < current->helpers) run(*current);
    inside.fetch_sub(1);
  }

  void give(Job& given) {
    job.store(&given);
    number.fetch_add(1);
  }

  void finish(Job& given) {
    run(given);
    job.store(nullptr);
    while (inside.load() > 0) pause();  // who is inside may still be at a piece; who comes now finds no job
  }
};

struct Pool {
  std::mutex callers;  // one at a time has the threads
  Crew crew;
  std::atomic<int32_t> asleep{0};
  std::mutex sleeping;
  std::condition_variable wake;
  int32_t started = 0;

  void help(int32_t own) {
    uint64_t seen = 0;
    for (;;) {
      auto until = Clock::now() + AWAKE;
      for (int spins = 0; crew.number.load() == seen; spins++) {
        pause();
        if (spins % 64 == 63 && Clock::now() > until) {
          std::unique_lock<std::mutex> held(sleeping);
          asleep.fetch_add(1);
          wake.wait(held, [&] { return crew.number.load() != seen; });
          asleep.fetch_sub(1);
        }
      }
      crew.help(seen, own);
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
    crew.give(given);
    if (asleep.load() > 0) {
      std::lock_guard<std::mutex> held(sleeping);
      wake.notify_all();
    }
    crew.finish(given);
  }
};

Pool* pool = new Pool;  // never deleted: its threads outlive static destruction
std::atomic<pq_parallel> parallel{nullptr};
std::atomic<int32_t> apart{0};  // calls that still are with own threads

// A caller's region: its thread gives jobs, the others of the team take them until it is over.
struct Region {
  void (*work)(void*);
  void* context;
  const std::thread::id leader;
  Clock::time_point began{}, ended{};
  Crew crew{};
  std::exception_ptr thrown{};  // by work: it does not go through the lender's own frames
  std::atomic<bool> over{false};
  std::atomic<int32_t> joined{0};
};
thread_local Region* region = nullptr;

void enter(void* given) {
  Region& own = *static_cast<Region*>(given);
  if (std::this_thread::get_id() == own.leader) {
    own.began = Clock::now();
    region = &own;
    try {
      own.work(own.context);
    } catch (...) {
      own.thrown = std::current_exception();
    }
    region = nullptr;
    own.over.store(true);
    own.ended = Clock::now();
    return;
  }
  const int32_t number = own.joined.fetch_add(1);
  uint64_t seen = 0;
  for (; !own.over.load(); pause()) own.crew.help(seen, number);
}

#if defined(__unix__) || defined(__APPLE__)
// A child has the memory of the pool and none of its threads: it takes a new one, and leaves the old as it lies. Nor has it
// the threads of a library that was lent.
const int registered = pthread_atfork(nullptr, nullptr, [] {
  pool = new (std::nothrow) Pool;
  parallel.store(nullptr);
});
#endif

}  // namespace

void borrow(pq_parallel from) { parallel.store(from); }

void together(int32_t threads, void (*work)(void*), void* context) {
  const pq_parallel lent = parallel.load();
  if (threads < 2 || !lent || region || apart.load() > 0) {
    if (apart.load() > 0) apart.fetch_sub(1);
    return work(context);
  }
  Region own{work, context, std::this_thread::get_id()};
  const auto asked = Clock::now();
  lent(enter, &own, static_cast<unsigned>(threads), 0);
  if ((own.began - asked) + (Clock::now() - own.ended) > LATE) apart.store(APART);  // other work has their cores
  if (own.thrown) std::rethrow_exception(own.thrown);
}

void share(int64_t pieces, int32_t threads, void (*work)(void*, int64_t), void* context) {
  if (Pool* here = pool; threads > 1 && pieces > 1) {
    Job job{pieces, work, context, (threads < MOST ? threads : MOST) - 1, {}};
    if (region) {
      region->crew.give(job);
      return region->crew.finish(job);
    }
    if (here && here->callers.try_lock()) {
      std::lock_guard<std::mutex> held(here->callers, std::adopt_lock);
      return here->share(job);
    }
  }
  for (int64_t piece = 0; piece < pieces; piece++) work(context, piece);
}
