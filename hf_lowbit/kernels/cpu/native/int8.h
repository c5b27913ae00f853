// Products of int8 inputs with packed integer values: sums of integers per lane, scaled by group, then by input; or by
// the groups of both, where inputs have as many scales each as rows.
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
    std::vector<float> sums;   // scaled, where inputs have groups
    std::vector<float> scale;  // [batch, 1 or groups], followed by zeros for whole-vector loads

    CodeInputs(const hfl_matrix& w, const int8_t* x, const float* x_scale, int64_t x_groups, int64_t m)
        : blocks((w.columns + block - 1) / block), batch(m), groups(w.groups), scale(x_scale, x_scale + m * x_groups) {
        scale.resize(static_cast<size_t>(m * x_groups + Dot::lanes), 0.0f);
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
                const float own = x_groups > 1 ? x_scale[i * groups + g] : 1.0f;
                sums[static_cast<size_t>(i * groups + g)] = static_cast<float>(total) * own;
            }
        }
    }
};

template <int bits, int M, bool grouped>
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
            auto of_lanes = [&](const float* groups) HFL_INLINE {
                const float* first_scale = groups + geometry.first[b];
                return geometry.lane.empty()
                           ? Simd::set(*first_scale)
                           : Simd::permute(Simd::load(first_scale), Simd::load_int(geometry.lane.data() + b * Dot::lanes));
            };
            const Simd::Float scale = w.groups > 1 ? of_lanes(scales.scale.data()) : Simd::set(1.0f);
            for (int m = 0; m < M; m++) {
                Simd::Float value = Dot::to_float(sum[m]);
                if constexpr (grouped) value = Simd::multiply(value, of_lanes(x.scale.data() + (m0 + m) * x.groups));
                total[m] = Simd::multiply_add(value, scale, total[m]);
            }
        }
        const float unit = 1.0f / static_cast<float>(w.integer_multiplier);
        for (int m = 0; m < M; m++) {
            float result = Simd::sum(total[m]) * unit;
            if (w.groups == 1) result *= scales.scale[0];
            if (w.zero_kind != HFL_NO_ZERO)
                for (int64_t g = 0; g < w.groups; g++)
                    result -= scales.scale[g] * scales.zero[g] * x.sums[static_cast<size_t>((m0 + m) * x.groups + g)];
            if constexpr (!grouped) result *= x.scale[static_cast<size_t>(m0 + m)];
            store_float(y, (m0 + m) * w.rows + row, result, type);
        }
    }
}

template <int bits, bool grouped>
void linear_codes(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale, int64_t m,
                  int type, void* const* y, int threads) {
    const hfl_matrix& w0 = *matrices[0];
    const Geometry geometry(w0, Dot::lanes);
    const CodeInputs<bits> inputs(w0, x, x_scale, grouped ? w0.groups : 1, m);
    share_rows(matrices, count, threads, 1, [&](int i, int64_t first, int64_t last) {
        const hfl_matrix& w = *matrices[i];
        int8_t values[256];
        for (int c = 0; c < (1 << bits); c++)
            values[c] = static_cast<int8_t>(std::lround(w.table[c] * static_cast<float>(w.integer_multiplier)));
        const typename Dot::template Weights<bits> weights(values);
        int64_t k = 0;
        for (; k + 4 <= m; k += 4)
            multiply_codes<bits, 4, grouped>(w, geometry, inputs, weights, k, first, last, y[i], type);
        for (; k < m; k++) multiply_codes<bits, 1, grouped>(w, geometry, inputs, weights, k, first, last, y[i], type);
    });
}

inline bool share_codes(const hfl_matrix& a, const hfl_matrix& b) {
    return a.bits == b.bits && a.groups == b.groups && a.zero_kind == b.zero_kind;
}

inline int linear_int8(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale,
                       int64_t x_groups, int64_t m, int type, void* const* y, int threads) {
    for (int i = 0; i < count; i++)
        if (!multiplies_int8(matrices[i]) || (x_groups != 1 && x_groups != matrices[i]->groups)) return -1;
    auto multiply = [&](auto bits, int i, int n) {
        constexpr int width = decltype(bits)::value;
        const auto linear = x_groups > 1 ? linear_codes<width, true> : linear_codes<width, false>;
        linear(matrices + i, n, x, x_scale, m, type, y + i, threads);
    };
    for (int i = 0, end; i < count; i = end) {  // neighbours of one format together
        for (end = i + 1; end < count && share_codes(*matrices[i], *matrices[end]);) end++;
        switch (matrices[i]->bits) {
            case 1: multiply(std::integral_constant<int, 1>(), i, end - i); break;
            case 2: multiply(std::integral_constant<int, 2>(), i, end - i); break;
            case 4: multiply(std::integral_constant<int, 4>(), i, end - i); break;
            default: multiply(std::integral_constant<int, 8>(), i, end - i);
        }
    }
    return 0;
}

}  // namespace
