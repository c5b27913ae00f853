// Work shared out in small pieces: a thread that is held up by other work on the machine takes fewer of them.
#pragma once
#include <atomic>
#include <cstdint>

#include "lowbit.h"

extern hfl_runner hfl_run;  // null: one thread

template <class Work>  // void(int64_t piece)
void share(int64_t pieces, int threads, Work& work) {
    struct Job {
        Work& work;
        std::atomic<int64_t> next;
        int64_t pieces;
        static void run(void* data) {
            Job& job = *static_cast<Job*>(data);
            for (int64_t piece; (piece = job.next.fetch_add(1, std::memory_order_relaxed)) < job.pieces;)
                job.work(piece);
        }
    } job{work, {0}, pieces};
    if (threads > pieces) threads = static_cast<int>(pieces);
    if (threads <= 1 || !hfl_run)
        Job::run(&job);
    else
        hfl_run(&Job::run, &job, static_cast<unsigned>(threads), 0);
}
