// Threads that share the work of one product. They wait awake for a moment, since the next product comes at once, then asleep.
#pragma once
#include <cstdint>

#include "polyquant_kernels.h"

// Calls work(context, i) once for each i from 0 to pieces - 1, in up to `threads` threads, this one among them, and returns
// when all are done. A thread that has no core takes no piece: nobody waits for one that has not begun. Where another caller
// has the threads, this one does all of it. Safe after fork.
void share(int64_t pieces, int32_t threads, void (*work)(void* context, int64_t piece), void* context);

template <class Work> void share(int64_t pieces, int32_t threads, const Work& work) {
  share(pieces, threads, [](void* context, int64_t piece) { (*static_cast<const Work*>(context))(piece); },
        const_cast<void*>(static_cast<const void*>(&work)));
}

// Whose threads `together` takes; null: nobody's. Never in the child of a fork, which has none of them.
void borrow(pq_parallel from);

// Calls work(context) in this thread, while lent threads wait awake for what it shares. Where none are lent, it just calls.
void together(int32_t threads, void (*work)(void* context), void* context);

template <class Work> void together(int32_t threads, const Work& work) {
  together(threads, [](void* context) { (*static_cast<const Work*>(context))(); },
           const_cast<void*>(static_cast<const void*>(&work)));
}
