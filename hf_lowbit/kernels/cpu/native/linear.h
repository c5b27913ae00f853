// Products of inputs of any type, a float at a time.
#pragma once
#include <vector>

#include "decode.h"
#include "gemv.h"

namespace {

// Layouts whose groups cut lanes: a row is decoded into the first-level cache, then multiplied.
inline void multiply_decoded(const hfl_matrix& w, const void* x, int x_type, int64_t m, int64_t stride, int64_t first,
                             int64_t last, void* y, int type) {
    RowDecoder decode_row(w);
    std::vector<float> row(static_cast<size_t>(w.columns)), in(static_cast<size_t>(m * w.columns));
    for (int64_t i = 0; i < m; i++) load_floats(in.data() + i * w.columns, x, i * stride, w.columns, x_type);
    for (int64_t r = first; r < last; r++) {
        decode_row(r, row.data());
        for (int64_t i = 0; i < m; i++) {
            const float* a = in.data() + i * w.columns;
            Simd::Float total = Simd::zero();
            int64_t k = 0;
            for (; k + Simd::lanes <= w.columns; k += Simd::lanes)
                total = Simd::multiply_add(Simd::load(row.data() + k), Simd::load(a + k), total);
            float result = Simd::sum(total);
            for (; k < w.columns; k++) result += row[k] * a[k];
            store_float(y, i * w.rows + r, result, type);
        }
    }
}

inline bool multiplies_in_lanes(const hfl_matrix& w) {
    if (!lanes_fit_groups(w)) return false;
    if (w.packing == HFL_BASE3) return InDigits::fits(w);
    return !Simd::has_planes || w.bits != 4 || w.groups == 1 || w.columns / w.groups % 32 == 0;
}

inline int linear(const hfl_matrix* const* matrices, int count, const void* x, int type, int64_t m, int64_t stride,
                  void* const* y, int threads) {
    multiply_matrices(
        matrices, count, m, y, type, threads, [&](int i) { return multiplies_in_lanes(*matrices[i]); },
        [&](int i, int k) {
            return matrices[k]->decoder == matrices[i]->decoder && matrices[k]->packing == matrices[i]->packing;
        },
        [&](int i, auto use) { with_way(*matrices[i], use); },
        [&](auto way, const hfl_matrix& w, const Geometry& geometry) {
            return Inputs(way, w, geometry, x, type, m, stride);
        },
        [&](int i, int64_t first, int64_t last, void* out) {
            multiply_decoded(*matrices[i], x, type, m, stride, first, last, out, type);
        });
    return 0;
}

}  // namespace
