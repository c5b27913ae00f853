// Products of int8 inputs with packed integer values: sums of integers per lane, scaled by group, then by input.
#pragma once
#include <cmath>
#include <vector>

#include "gemv.h"

namespace {

// Widths whose codes do not cross bytes, tables that are integers, groups of whole lanes (four bytes).
inline int multiplies_int8(const hfl_matrix* w) {
    return w->integer_multiplier > 0 && w->packing == HFL_DENSE && 8 % w->bits == 0 && lanes_fit_groups(*w) &&
           (w->bits < 8 || w->decoder == HFL_INTEGER);
}

// Inputs in the order [batch][block][j][byte], and -128 times the sum of each lane's inputs.
template <int bits> struct CodeInputs {
    static constexpr int codes = 8 / bits, bytes = 4 * Dot::lanes, block = bytes * codes;
    int64_t blocks, batch, groups;
    std::vector<int8_t> values;
    std::vector<int32_t> minus_sums;
    std::vector<float> sums;
    const float* scale;

    CodeInputs(const hfl_matrix& w, const int8_t* x, const float* x_scale, int64_t m)
        : blocks((w.columns + block - 1) / block), batch(m), groups(w.groups), scale(x_scale) {
        values.resize(static_cast<size_t>(m * blocks * block));
        minus_sums.resize(static_cast<size_t>(m * blocks * Dot::lanes));
        if (w.zero_kind != HFL_NO_ZERO) sums.resize(static_cast<size_t>(m * groups));
        std::vector<int8_t> row(static_cast<size_t>(blocks * block), 0);
        const int64_t group = w.columns / groups;
        for (int64_t i = 0; i < m; i++) {
            std::memcpy(row.data(), x + i * w.columns, static_cast<size_t>(w.columns));
            for (int64_t b = 0; b < blocks; b++) {
                const int8_t* in = row.data() + b * block;
                int8_t* out = values.data() + (i * blocks + b) * block;
                int32_t* minus = minus_sums.data() + (i * blocks + b) * Dot::lanes;
                for (int j = 0; j < codes; j++)
                    for (int k = 0; k < bytes; k++) {
                        out[j * bytes + k] = in[k * codes + j];
                        minus[k / 4] -= 128 * in[k * codes + j];
                    }
            }
            for (int64_t g = 0; !sums.empty() && g < groups; g++) {
                int32_t total = 0;
                for (int64_t k = 0; k < group; k++) total += row[g * group + k];
                sums[static_cast<size_t>(i * groups + g)] = static_cast<float>(total);
            }
        }
    }
};

template <int bits, int M>
void multiply_codes(const hfl_matrix& w, const Geometry& geometry, const CodeInputs<bits>& x,
                    const typename Dot::template Weights<bits>& weights, int64_t m0, int64_t first, int64_t last,
                    void* y, int type) {
    using Inputs = CodeInputs<bits>;
    constexpr int block_words = Dot::lanes;
    RowScales scales(w, Dot::lanes);
    uint32_t tail[block_words] = {};
    for (int64_t row = first; row < last; row++) {
        scales.select(row);
        const uint32_t* words = w.codes + row * w.words;
        Simd::Float total[M];
        for (int m = 0; m < M; m++) total[m] = Simd::zero();
        for (int64_t b = 0; b < x.blocks; b++) {
            const uint32_t* p = words + b * block_words;
            __builtin_prefetch(p + 512);
            if ((b + 1) * block_words > w.words) {
                std::memcpy(tail, p, static_cast<size_t>(w.words - b * block_words) * 4);
                p = tail;
            }
            const typename Dot::Int codes = Dot::load(p);
            typename Dot::Int sum[M];
            for (int m = 0; m < M; m++)
                sum[m] = Dot::start(x.minus_sums.data() + ((m0 + m) * x.blocks + b) * Dot::lanes);
            repeat(
                [&](auto j) HFL_INLINE {
                    const typename Dot::Int v = weights.template at<decltype(j)::value>(codes);
                    for (int m = 0; m < M; m++)
                        sum[m] = Dot::add(sum[m], v, Dot::load(x.values.data() + ((m0 + m) * x.blocks + b) * Inputs::block +
                                                               j.value * Inputs::bytes));
                },
                std::make_integer_sequence<int, Inputs::codes>());
            Simd::Float scale = Simd::set(1.0f);
            if (w.groups > 1) {
                const float* first_scale = scales.scale.data() + geometry.first[b];
                scale = geometry.lane.empty()
                            ? Simd::set(*first_scale)
                            : Simd::permute(Simd::load(first_scale), Simd::load_int(geometry.lane.data() + b * Dot::lanes));
            }
            for (int m = 0; m < M; m++) total[m] = Simd::multiply_add(Dot::to_float(sum[m]), scale, total[m]);
        }
        const float unit = 1.0f / static_cast<float>(w.integer_multiplier);
        for (int m = 0; m < M; m++) {
            float result = Simd::sum(total[m]) * unit;
            if (w.groups == 1) result *= scales.scale[0];
            if (w.zero_kind != HFL_NO_ZERO)
                for (int64_t g = 0; g < w.groups; g++)
                    result -= scales.scale[g] * scales.zero[g] * x.sums[static_cast<size_t>((m0 + m) * x.groups + g)];
            store_float(y, (m0 + m) * w.rows + row, result * x.scale[m0 + m], type);
        }
    }
}

template <int bits>
void linear_codes(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale, int64_t m,
                  int type, void* const* y, int threads) {
    const hfl_matrix& w0 = *matrices[0];
    const Geometry geometry(w0, Dot::lanes);
    const CodeInputs<bits> inputs(w0, x, x_scale, m);
    share_rows(matrices, count, threads, 1, [&](int i, int64_t first, int64_t last) {
        const hfl_matrix& w = *matrices[i];
        int8_t values[256];
        for (int c = 0; c < (1 << bits); c++)
            values[c] = static_cast<int8_t>(std::lround(w.table[c] * static_cast<float>(w.integer_multiplier)));
        const typename Dot::template Weights<bits> weights(values);
        int64_t k = 0;
        for (; k + 4 <= m; k += 4) multiply_codes<bits, 4>(w, geometry, inputs, weights, k, first, last, y[i], type);
        for (; k < m; k++) multiply_codes<bits, 1>(w, geometry, inputs, weights, k, first, last, y[i], type);
    });
}

inline bool share_codes(const hfl_matrix& a, const hfl_matrix& b) {
    return a.bits == b.bits && a.groups == b.groups && a.zero_kind == b.zero_kind;
}

inline int linear_int8(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale, int64_t m,
                       int type, void* const* y, int threads) {
    for (int i = 0; i < count; i++)
        if (!multiplies_int8(matrices[i])) return -1;
    for (int i = 0, end; i < count; i = end) {  // neighbours of one format together
        for (end = i + 1; end < count && share_codes(*matrices[i], *matrices[end]);) end++;
        switch (matrices[i]->bits) {
            case 1: linear_codes<1>(matrices + i, end - i, x, x_scale, m, type, y + i, threads); break;
            case 2: linear_codes<2>(matrices + i, end - i, x, x_scale, m, type, y + i, threads); break;
            case 4: linear_codes<4>(matrices + i, end - i, x, x_scale, m, type, y + i, threads); break;
            default: linear_codes<8>(matrices + i, end - i, x, x_scale, m, type, y + i, threads);
        }
    }
    return 0;
}

}  // namespace
