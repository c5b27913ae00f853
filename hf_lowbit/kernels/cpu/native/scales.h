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

// Those of some rows in floats, in as many places.
class RowScales {
  public:
    explicit RowScales(const hfl_matrix& w, int64_t places = 1)
        : w_(w), scale_(places * w.groups), zero_(w.zero_kind == HFL_NO_ZERO ? 0 : places * w.groups) {
        if (w.zero_kind == HFL_PACKED_ZERO) codes_.resize(static_cast<size_t>(w.groups + 8));
        for (int64_t at = 0; w.one_scale && at < places; at++) read(0, at);
    }
    void select(int64_t row, int64_t at = 0) {
        if (!w_.one_scale) read(row, at);
    }
    const float* scale(int64_t at = 0) const { return scale_.data() + at * w_.groups; }
    const float* zero(int64_t at = 0) const {  // null: there are none
        return w_.zero_kind == HFL_NO_ZERO ? nullptr : zero_.data() + at * w_.groups;
    }

  private:
    void read(int64_t row, int64_t at) {
        const int64_t bytes = w_.groups * scale_bytes(w_);
        const char* next = static_cast<const char*>(w_.scales) + (row + 1) * bytes;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
        load_floats(scale_.data() + at * w_.groups, w_.scales, row * w_.groups, w_.groups, w_.scale_type);
        float* zero = zero_.data() + at * w_.groups;
        if (w_.zero_kind == HFL_REAL_ZERO) load_floats(zero, w_.zeros, row * w_.groups, w_.groups, w_.scale_type);
        if (w_.zero_kind != HFL_PACKED_ZERO) return;
        unpack_zeros(w_, row, codes_.data());
        for (int64_t g = 0; g < w_.groups; g++) zero[g] = w_.table[codes_[static_cast<size_t>(g)]];
    }

    const hfl_matrix& w_;
    Aligned<float> scale_, zero_;
    std::vector<uint8_t> codes_;
};

}  // namespace
