// How a row's codes lie in vector lanes, and which scale each lane of a block needs.
//
// In most ways a lane owns the smallest run of whole 32-bit words that holds whole codes: one word for 1, 2, 4 and 8 bits, three
// words (16 codes) for 6 bits, `bits` words (32 codes) for 3, 5 and 7. A block is one such run per lane. The j-th codes
// of all lanes come out of the words together, and inputs are put into that order. In base 3 a lane owns a byte.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "floats.h"
#include "lowbit.h"

namespace {

template <int bits> struct Lane {
    static constexpr int words = bits == 3 || bits == 5 || bits == 7 ? bits : bits == 6 ? 3 : 1;
    static constexpr int codes = words * 32 / bits;
};

inline int codes_per_lane(const hfl_matrix& w) {
    const int bits = w.bits;
    if (w.packing == HFL_BASE3) return 5;  // a byte
    return bits == 3 || bits == 5 || bits == 7 ? 32 : bits == 6 ? 16 : 32 / bits;
}

struct Geometry {
    int64_t blocks, block;        // blocks per row, codes per block
    std::vector<int32_t> first;   // [blocks] first group of each block, or some groups before it
    AlignedVector<int32_t> lane;  // [blocks, lanes] group of each lane, less the block's first; empty if always 0

    Geometry(const hfl_matrix& w, int lanes, int codes) {
        const int64_t columns = w.columns, groups = w.groups;
        block = static_cast<int64_t>(codes) * lanes;
        blocks = (columns + block - 1) / block;
        if (groups == 1) return;
        const int64_t group = columns / groups, group_lanes = group / codes;
        first.resize(static_cast<size_t>(blocks));
        const bool is_aligned = group % block == 0;
        if (!is_aligned) lane.resize(static_cast<size_t>(blocks * lanes));
        int64_t left = group_lanes;  // of the group at hand: counted, because division takes longer than the rest
        int32_t at = 0;
        const auto last_group = static_cast<int32_t>(groups - 1);
        for (int64_t b = 0; b < blocks; b++) {
            first[b] = at;
            if (is_aligned) {
                if ((left -= lanes) == 0) left = group_lanes, at++;
                continue;
            }
            int32_t* own = lane.data() + b * lanes;
            for (int i = 0; i < lanes; i++) {
                own[i] = std::min(at, last_group);  // lanes beyond the columns: their inputs are zeros
                if (--left == 0) left = group_lanes, at++;
            }
            const int32_t aligned = first[b] / lanes * lanes;  // a vector that crosses cache lines is loaded twice
            if (own[lanes - 1] < aligned + lanes) first[b] = aligned;
            for (int i = 0; i < lanes; i++) own[i] -= first[b];
        }
    }
};

// Whether every lane of every block lies within one group.
inline bool lanes_fit_groups(const hfl_matrix& w) {
    return w.groups == 1 || (w.columns / w.groups) % codes_per_lane(w) == 0;
}

}  // namespace
