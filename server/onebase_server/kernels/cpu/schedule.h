// How threads share a forward: work is taken in small pieces from a counter, and phases end at a barrier.
// Other processes may hold a core at any moment, so nobody is dealt a fixed share, and waiting threads give way.
#pragma once

#include <atomic>
#include <memory>
#include <sched.h>

#include "common.h"

namespace onebase {

class Barrier {
    std::atomic<int> arrived_{0}, generation_{0};
    const int threads_;

  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        const int generation = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; generation_.load(std::memory_order_acquire) == generation; i++) {
            if (i > 1000) sched_yield();
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }
};

// One counter a phase. Every thread walks the same phases in the same order.
class Schedule {
    std::unique_ptr<std::atomic<int>[]> counters_;
    Barrier barrier_;

  public:
    Schedule(int phases, int threads) : counters_(new std::atomic<int>[phases]()), barrier_(threads) {}

    // Calls body(begin, end) for pieces of at most `grain` of `total`, shared by all threads; then the barrier.
    template <typename Body> void run(int& phase, int total, int grain, Body body) {
        std::atomic<int>& counter = counters_[phase++];
        for (int begin; (begin = counter.fetch_add(grain, std::memory_order_relaxed)) < total;)
            body(begin, begin + grain < total ? begin + grain : total);
        barrier_.wait();
    }
};

}  // namespace onebase
