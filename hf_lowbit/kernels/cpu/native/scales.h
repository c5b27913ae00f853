// The scales and zero points of rows.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "aligned.h"
#include "floats.h"
#include "unpack.h"

namespace {

inline int64_t scale_bytes(const hfl_matrix& w) { return w.scale_type == HFL_FLOAT32 ? 4 : 2; }

// Of a row, packed zero points as codes. `out` has room for eight more.
inline void unpack_zeros(const hfl_matrix& w, int64_t row, uint8_t* out) {
    const int64_t words = (w.groups * w.bits + 31) / 32;
    unpack_dense(w.bits, static_cast<const uint32_t*>(w.zeros) + row * words, words, w.groups, out);
}

// Those of one row in floats.
struct RowScales {
    AlignedVector<float> scale, zero;
    const hfl_matrix& w;

    explicit RowScales(const hfl_matrix& matrix) : w(matrix) {
        scale.resize(static_cast<size_t>(w.groups));
        if (w.zero_kind != HFL_NO_ZERO) zero.resize(static_cast<size_t>(w.groups));
        if (w.zero_kind == HFL_PACKED_ZERO) codes_.resize(static_cast<size_t>(w.groups + 8));
        if (w.one_scale) read(0);
    }
    void select(int64_t row) {
        if (!w.one_scale) read(row);
    }

  private:
    void read(int64_t row) {
        const int64_t bytes = w.groups * scale_bytes(w);
        const char* next = static_cast<const char*>(w.scales) + (row + 1) * bytes;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
        load_floats(scale.data(), w.scales, row * w.groups, w.groups, w.scale_type);
        if (w.zero_kind == HFL_REAL_ZERO) load_floats(zero.data(), w.zeros, row * w.groups, w.groups, w.scale_type);
        if (w.zero_kind != HFL_PACKED_ZERO) return;
        unpack_zeros(w, row, codes_.data());
        for (size_t g = 0; g < zero.size(); g++) zero[g] = w.table[codes_[g]];
    }

    std::vector<uint8_t> codes_;
};

}  // namespace
