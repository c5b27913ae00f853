// The scales and zero points of a tile of rows, for products of few inputs. They are read where they lie: copying them to
// floats for every tile takes far longer where codes come from memory than it does in the cache.
#pragma once
#include <algorithm>

#include "scales.h"
#include "unroll.h"

namespace {

// Vector of the numbers from `first` on.
HFL_INLINE inline Simd::Float load_vector(const void* numbers, int64_t first, int type) {
    if (type == HFL_FLOAT32) return Simd::load(static_cast<const float*>(numbers) + first);
    return Simd::load_halves(static_cast<const uint16_t*>(numbers) + first, type == HFL_BFLOAT16);
}

// Number `at` in every lane.
HFL_INLINE inline Simd::Float broadcast(const void* numbers, int64_t at, int type) {
    if (type == HFL_FLOAT32) return Simd::set(static_cast<const float*>(numbers)[at]);
    return Simd::set_half(static_cast<const uint16_t*>(numbers) + at, type == HFL_BFLOAT16);
}

// In lane i number first + at[i], where `at` is less than a vector's lanes.
HFL_INLINE inline Simd::Float pick(const void* numbers, int64_t first, Simd::Int at, int type) {
    if (type == HFL_BFLOAT16) return Simd::pick_bfloat16(static_cast<const uint16_t*>(numbers) + first, at);
    return Simd::permute(load_vector(numbers, first, type), at);
}

class TileScales {
  public:
    TileScales(const hfl_matrix& w, int64_t rows) : w_(w), scales_(w, w.groups * scale_bytes(w)), zeros_(w, scales_.bytes) {
        if (w.zero_kind != HFL_PACKED_ZERO) return;
        codes_.resize(static_cast<size_t>(rows * w.groups + std::max(8, Simd::lanes)));
        for (int c = 0; c < 1 << w.bits; c++) counts_ = counts_ && w.table[c] == w.table[0] + static_cast<float>(c);
    }
    // Rows first..first+count are the tile's from now on; those that follow are asked for.
    void select(int64_t first, int64_t count) {
        if (w_.one_scale) first = 0, count = 1;
        scales_.select(w_.scales, first, count);
        if (w_.zero_kind == HFL_REAL_ZERO) zeros_.select(w_.zeros, first, count);
        for (int64_t r = 0; w_.zero_kind == HFL_PACKED_ZERO && r < count; r++)
            unpack_zeros(w_, first + r, codes_.data() + r * w_.groups);
    }
    // The scales of the tile's r-th row, of the matrix's type: a vector may be loaded from any of them.
    const char* row(int64_t r) const { return scales_.row(r); }

    // The zero points of the groups from `group` on; what lies beyond the last one is finite if all are.
    Simd::Float zeros(int64_t r, int64_t group) const {
        if (w_.zero_kind == HFL_REAL_ZERO) return load_vector(zeros_.row(r), group, w_.scale_type);
        const Simd::Int code = Simd::widen(codes_.data() + (w_.one_scale ? 0 : r) * w_.groups + group);
        if (counts_) return Simd::add(Simd::to_float(code), Simd::set(w_.table[0]));
        return typename Simd::template Table<8>(w_.table)(code);
    }

  private:
    // Rows of numbers where they lie, or copied where vectors would read beyond the last one.
    struct Rows {
        int64_t rows, bytes, stride;
        const char* at = nullptr;
        std::vector<char> copy;

        Rows(const hfl_matrix& w, int64_t row_bytes)
            : rows(w.one_scale ? 1 : w.rows), bytes(row_bytes), stride(w.one_scale ? 0 : row_bytes) {}
        void select(const void* all, int64_t first, int64_t count) {
            at = static_cast<const char*>(all) + first * bytes;
            for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(at + count * bytes + i);
            constexpr int64_t beyond = Simd::lanes * 4;
            if ((first + count) * bytes + beyond <= rows * bytes) return;
            copy.resize(static_cast<size_t>(count * bytes + beyond));
            std::memcpy(copy.data(), at, static_cast<size_t>(count * bytes));
            at = copy.data();
        }
        const char* row(int64_t r) const { return at + r * stride; }
    };

    const hfl_matrix& w_;
    Rows scales_, zeros_;
    std::vector<uint8_t> codes_;  // of packed zero points
    bool counts_ = true;          // each value of the table is the last one and 1
};

}  // namespace
