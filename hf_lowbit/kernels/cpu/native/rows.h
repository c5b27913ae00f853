// The rows of several matrices, shared out among threads.
#pragma once
#include <algorithm>
#include <vector>

#include "threads.h"

namespace {

// Calls work(matrix index, first row, last row) for all matrices on all threads: runs of at most about 256 kB of codes, of
// pieces of 8 kB or more, each a multiple of `step` rows. Where codes meet many inputs pieces are smaller, and fewer of
// them are worth another thread: they count once for every four inputs.
template <class Work>
void share_rows(const hfl_matrix* const* matrices, int count, int64_t inputs, int threads, int64_t step, Work work) {
    auto work_of_row = [&](const hfl_matrix& w) { return w.words * (inputs / 4 + 1); };
    auto piece_rows = [&](const hfl_matrix& w) { return (2047 / work_of_row(w) / step + 1) * step; };
    std::vector<int64_t> ends(static_cast<size_t>(count));
    int64_t pieces = 0, words = 0, total_work = 0;
    for (int i = 0; i < count; i++) {
        pieces += (matrices[i]->rows + piece_rows(*matrices[i]) - 1) / piece_rows(*matrices[i]);
        words += matrices[i]->rows * matrices[i]->words;
        total_work += matrices[i]->rows * work_of_row(*matrices[i]);
        ends[i] = pieces;
    }
    if (total_work < 16384) threads = 1;  // waking a thread takes longer
    auto run = [&](int64_t first, int64_t last) {
        int i = static_cast<int>(std::upper_bound(ends.begin(), ends.end(), first) - ends.begin());
        for (int64_t end; first < last; first = end, i++) {
            const int64_t rows = piece_rows(*matrices[i]), begin = i ? ends[i - 1] : 0;
            end = std::min(last, ends[i]);
            work(i, (first - begin) * rows, std::min(matrices[i]->rows, (end - begin) * rows));
        }
    };
    share_runs(pieces, std::max<int64_t>(1, pieces * 65536 / words), threads, run);
}

}  // namespace
