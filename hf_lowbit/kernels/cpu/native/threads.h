// Work shared out in small pieces: a thread that is held up by other work on the machine takes fewer of them.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "lowbit.h"

extern hfl_runner hfl_run;  // null: one thread

// Each thread begins with a stretch of its own, of which it takes runs of at most so many pieces, then takes from the
// end of what others have left. What lies side by side in memory is read by one thread: processors read on beyond the end
// of a run, and what another thread has read, too, is read in vain.
template <class Work>  // void(int64_t first piece, int64_t last)
void share_runs(int64_t pieces, int64_t most, int threads, Work& work) {
    if (threads > pieces) threads = static_cast<int>(pieces);
    if (threads <= 1 || !hfl_run) return work(0, pieces);
    struct alignas(64) Stretch {
        std::atomic<uint64_t> left;  // the first piece, and above it the one after the last
        // Some pieces, those at the beginning or at the end; none: an empty run.
        std::pair<int64_t, int64_t> take(bool is_own, int64_t most) {
            for (uint64_t now = left.load(std::memory_order_relaxed);;) {
                const auto first = static_cast<uint32_t>(now), last = static_cast<uint32_t>(now >> 32);
                if (first == last) return {0, 0};
                const auto n = static_cast<uint32_t>(std::min<int64_t>((last - first + 1) / 2, most));
                const uint64_t then = is_own ? now + n : now - (uint64_t{n} << 32);
                if (!left.compare_exchange_weak(now, then, std::memory_order_relaxed)) continue;
                return is_own ? std::pair<int64_t, int64_t>{first, first + n} : std::pair<int64_t, int64_t>{last - n, last};
            }
        }
    };
    struct Job {
        Work& work;
        int64_t most;
        std::vector<Stretch> stretches;
        std::atomic<size_t> begun;
        static void run(void* data) {
            Job& job = *static_cast<Job*>(data);
            const size_t own = job.begun.fetch_add(1, std::memory_order_relaxed), count = job.stretches.size();
            for (size_t k = 0; k < count;) {
                const auto [first, last] = job.stretches[(own + k) % count].take(k == 0, job.most);
                if (first == last) k++;
                else job.work(first, last);
            }
        }
    } job{work, most, std::vector<Stretch>(static_cast<size_t>(threads)), {0}};
    for (int64_t t = 0; t < threads; t++)
        job.stretches[t].left = static_cast<uint64_t>(pieces * t / threads) |
                                static_cast<uint64_t>(pieces * (t + 1) / threads) << 32;
    hfl_run(&Job::run, &job, static_cast<unsigned>(threads), 0);
}

template <class Work>  // void(int64_t piece)
void share(int64_t pieces, int threads, Work& work) {
    auto one_by_one = [&](int64_t first, int64_t last) {
        for (; first < last; first++) work(first);
    };
    share_runs(pieces, 1, threads, one_by_one);
}
