// The rows of several matrices, shared out among threads.
#pragma once
#include <algorithm>
#include <vector>

#include "threads.h"

namespace {

// Calls work(matrix index, first row, last row) for pieces of all matrices on all threads: about 32 kB of codes, and
// a multiple of `step` rows.
template <class Work>
void share_rows(const hfl_matrix* const* matrices, int count, int threads, int64_t step, Work work) {
    auto piece_rows = [&](const hfl_matrix& w) { return (8191 / w.words / step + 1) * step; };
    std::vector<int64_t> ends(static_cast<size_t>(count));
    int64_t pieces = 0, words = 0;
    for (int i = 0; i < count; i++) {
        pieces += (matrices[i]->rows + piece_rows(*matrices[i]) - 1) / piece_rows(*matrices[i]);
        words += matrices[i]->rows * matrices[i]->words;
        ends[i] = pieces;
    }
    if (words < 16384) threads = 1;  // waking a thread takes longer
    auto run = [&](int64_t piece) {
        const int i = static_cast<int>(std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin());
        const int64_t rows = piece_rows(*matrices[i]), first = (piece - (i ? ends[i - 1] : 0)) * rows;
        work(i, first, std::min(matrices[i]->rows, first + rows));
    };
    share(pieces, threads, run);
}

}  // namespace
