// How threads share a forward. Work is taken in small pieces from a counter, and a phase ends when its pieces are done,
// not when every thread has arrived: a thread that lost its core to another process holds up at most its own piece.
// A pool of its own rather than OpenMP's, whose threads spin for milliseconds between steps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <sched.h>
#include <thread>

#include "common.h"

namespace onebase {

constexpr int SPINS = 1000;  // about 40 us: longer than a phase of a decoding step, shorter than a time slice

template <typename Condition> void wait_until(Condition reached) {
    for (int i = 0; !reached(); i++) {
        if (i > SPINS) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

// Threads that sleep between jobs. The caller is thread 0. A job returns when the caller's part does: whatever it
// refers to must live as long as the shared pointer, since other threads may still be looking for work in it.
class Pool {
  public:
    using Job = std::function<void(int thread)>;

    void run(int threads, std::shared_ptr<const Job> job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            threads_ = threads;
            for (; started_ < threads - 1; started_++) std::thread(&Pool::work, this, started_ + 1, epoch_.load()).detach();
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (threads > 1) wake_.notify_all();
        (*job)(0);
    }
    static Pool& shared() {
        static Pool* pool = new Pool;  // never destroyed: its threads outlive static destructors
        return *pool;
    }

  private:
    void work(int thread, uint64_t seen) {
        for (;;) {
            for (int i = 0; i < SPINS && epoch_.load(std::memory_order_acquire) == seen; i++) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
            std::shared_ptr<const Job> job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
                seen = epoch_.load(std::memory_order_relaxed);
                if (thread < threads_) job = job_;
            }
            if (job) (*job)(thread);
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> epoch_{0};
    std::shared_ptr<const Job> job_;
    int threads_ = 0, started_ = 0;
};

// The phases of one job. Every thread walks the same phases in the same order.
class Schedule {
    struct Phase {
        std::atomic<int> next{0}, done{0};
    };
    std::unique_ptr<Phase[]> phases_;
    std::atomic<bool> finished_{false};

  public:
    explicit Schedule(int phases) : phases_(new Phase[phases]()) {}

    // Calls body(begin, end) for pieces of at most `grain` of `total`; returns when all pieces are done.
    template <typename Body> void run(int& phase, int total, int grain, Body body) {
        Phase& own = phases_[phase++];
        const int pieces = (total + grain - 1) / grain;
        for (int piece; (piece = own.next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            const int begin = piece * grain;
            body(begin, begin + grain < total ? begin + grain : total);
            own.done.fetch_add(1, std::memory_order_acq_rel);
        }
        wait_until([&] { return own.done.load(std::memory_order_acquire) >= pieces; });
    }

    // Set by the caller's thread when the job is over: stragglers leave instead of walking the remaining phases.
    void finish() { finished_.store(true, std::memory_order_release); }
    bool finished() const { return finished_.load(std::memory_order_acquire); }
};

}  // namespace onebase
