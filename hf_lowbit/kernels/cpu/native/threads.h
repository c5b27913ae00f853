// Work shared out in small pieces: a thread that is held up by other work on the machine takes fewer of them.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "lowbit.h"

extern hfl_runner hfl_run;  // null: one thread

// Runs of at most so many pieces, smaller ones towards the end: what lies side by side in memory is read fastest by one
// thread.
template <class Work>  // void(int64_t first piece, int64_t last)
void share_runs(int64_t pieces, int64_t most, int threads, Work& work) {
    if (threads > pieces) threads = static_cast<int>(pieces);
    if (threads <= 1 || !hfl_run) return work(0, pieces);
    struct Job {
        Work& work;
        std::atomic<int64_t> next;
        int64_t pieces, most, threads;
        static void run(void* data) {
            Job& job = *static_cast<Job*>(data);
            for (int64_t first = job.next.load(std::memory_order_relaxed), last; first < job.pieces;) {
                const int64_t share = (job.pieces - first) / (4 * job.threads);
                last = first + std::max<int64_t>(1, std::min(share, job.most));
                if (!job.next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
                job.work(first, last);
                first = job.next.load(std::memory_order_relaxed);
            }
        }
    } job{work, {0}, pieces, most, threads};
    hfl_run(&Job::run, &job, static_cast<unsigned>(threads), 0);
}

template <class Work>  // void(int64_t piece)
void share(int64_t pieces, int threads, Work& work) {
    auto one_by_one = [&](int64_t first, int64_t last) {
        for (; first < last; first++) work(first);
    };
    share_runs(pieces, 1, threads, one_by_one);
}
