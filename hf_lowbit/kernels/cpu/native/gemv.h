// Products of a few inputs with packed matrices, decoded in registers: the speed of reading the codes once.
#pragma once
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "decode.h"
#include "geometry.h"
#include "threads.h"
#include "values.h"

namespace {

template <int n, class Use, int... i> inline void repeat(Use&& use, std::integer_sequence<int, i...>) {
    (use(Constant<i>()), ...);
}

// j-th codes of all lanes, in the low bits (what lies above them is left to the decoder).
template <int bits, int j> inline Simd::Int codes_at(const Simd::Int* words) {
    constexpr int word = j * bits / 32, shift = j * bits % 32;
    const Simd::Int low = Simd::shift_right(words[word], shift);
    if constexpr (shift + bits > 32) return Simd::either(low, Simd::shift_left(words[word + 1], 32 - shift));
    return low;
}

// Inputs in the order of the codes, [batch][block][j][lane], and their sums per group where there are zero points.
struct Inputs {
    std::vector<float> values, sums;
    int64_t stride, batch;

    Inputs(const hfl_matrix& w, const Geometry& geometry, const void* x, int type, int64_t m, int64_t row_stride)
        : stride(geometry.blocks * geometry.block), batch(m) {
        const int codes = codes_per_lane(w.bits);
        std::vector<float> row(static_cast<size_t>(stride), 0.0f);
        values.resize(static_cast<size_t>(m * stride));
        if (w.zero_kind != HFL_NO_ZERO) sums.resize(static_cast<size_t>(m * (w.groups + Simd::lanes)), 0.0f);
        for (int64_t i = 0; i < m; i++) {
            load_floats(row.data(), x, i * row_stride, w.columns, type);
            float* out = values.data() + i * stride;
            for (int64_t b = 0; b < geometry.blocks; b++) {
                const float* in = row.data() + b * geometry.block;
                for (int j = 0; j < codes; j++)
                    for (int lane = 0; lane < Simd::lanes; lane++) *out++ = in[lane * codes + j];
            }
            const int64_t group = w.columns / w.groups;
            for (int64_t g = 0; !sums.empty() && g < w.groups; g++) {
                float total = 0;
                for (int64_t k = 0; k < group; k++) total += row[g * group + k];
                sums[static_cast<size_t>(i * (w.groups + Simd::lanes) + g)] = total;
            }
        }
    }
};

// Rows first..last of y = x w^T for inputs m0..m0+M.
template <int bits, int decoder, int M>
void multiply_rows(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t m0, int64_t first,
                   int64_t last, void* y, int type) {
    using Float = Simd::Float;
    constexpr int lane_words = Lane<bits>::words, codes = Lane<bits>::codes, block_words = lane_words * Simd::lanes;
    const Values<bits, decoder> values(w);
    RowScales scales(w, Simd::lanes);
    uint32_t tail[block_words] = {};
    const float* inputs = x.values.data() + m0 * x.stride;
    for (int64_t row = first; row < last; row++) {
        scales.select(row);
        const uint32_t* words = w.codes + row * w.words;
        Float total[M];
        for (int m = 0; m < M; m++) total[m] = Simd::zero();
        for (int64_t b = 0; b < geometry.blocks; b++) {
            const uint32_t* p = words + b * block_words;
            __builtin_prefetch(p + 512);
            if ((b + 1) * block_words > w.words) {
                std::memcpy(tail, p, static_cast<size_t>(w.words - b * block_words) * 4);
                p = tail;
            }
            Simd::Int lane[lane_words];
            repeat<lane_words>([&](auto q) { lane[q.value] = Simd::strided<lane_words, decltype(q)::value>(p); },
                               std::make_integer_sequence<int, lane_words>());
            Float sum[M];
            for (int m = 0; m < M; m++) sum[m] = Simd::zero();
            const float* in = inputs + b * geometry.block;
            repeat<codes>(
                [&](auto j) {
                    const Float v = values(codes_at<bits, decltype(j)::value>(lane));
                    for (int m = 0; m < M; m++)
                        sum[m] = Simd::multiply_add(v, Simd::load(in + m * x.stride + j.value * Simd::lanes), sum[m]);
                },
                std::make_integer_sequence<int, codes>());
            if (w.groups == 1) {
                for (int m = 0; m < M; m++) total[m] = Simd::add(total[m], sum[m]);
            } else {
                const Float scale = Simd::permute(Simd::load(scales.scale.data() + geometry.first[b]),
                                                  Simd::load_int(geometry.lane.data() + b * Simd::lanes));
                for (int m = 0; m < M; m++) total[m] = Simd::multiply_add(sum[m], scale, total[m]);
            }
        }
        for (int m = 0; m < M; m++) {
            float result = Simd::sum(total[m]);
            if (w.groups == 1) result *= scales.scale[0];
            if (w.zero_kind != HFL_NO_ZERO) {
                const float* sums = x.sums.data() + (m0 + m) * (w.groups + Simd::lanes);
                Float shift = Simd::zero();
                for (int64_t g = 0; g < w.groups; g += Simd::lanes)
                    shift = Simd::multiply_add(
                        Simd::multiply(Simd::load(scales.scale.data() + g), Simd::load(scales.zero.data() + g)),
                        Simd::load(sums + g), shift);
                result -= Simd::sum(shift);
            }
            store_float(y, (m0 + m) * w.rows + row, result, type);
        }
    }
}

template <int bits, int decoder>
void multiply_batch(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t first, int64_t last, void* y,
                    int type) {
    int64_t m = 0;
    if constexpr (Simd::max_batch >= 8)
        for (; m + 8 <= x.batch; m += 8) multiply_rows<bits, decoder, 8>(w, geometry, x, m, first, last, y, type);
    for (; m + 4 <= x.batch; m += 4) multiply_rows<bits, decoder, 4>(w, geometry, x, m, first, last, y, type);
    for (; m < x.batch; m++) multiply_rows<bits, decoder, 1>(w, geometry, x, m, first, last, y, type);
}

// Layouts whose groups cut lanes, and base 3: a row is decoded into the first-level cache, then multiplied.
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

inline bool multiplies_in_lanes(const hfl_matrix& w) { return w.packing == HFL_DENSE && lanes_fit_groups(w); }

// Rows per piece of work: about 32 kB of codes.
inline int64_t piece_rows(const hfl_matrix& w) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, w.words)); }

// Calls work(matrix index, first row, last row) for pieces of all matrices on all threads.
template <class Work> void share_rows(const hfl_matrix* const* matrices, int count, int threads, Work work) {
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

inline int linear(const hfl_matrix* const* matrices, int count, const void* x, int type, int64_t m, int64_t stride,
                  void* const* y, int threads) {
    struct Prepared {
        Geometry geometry;
        Inputs inputs;
    };
    // Matrices of one width and grouping, as siblings mostly are, share their inputs.
    std::vector<std::shared_ptr<Prepared>> prepared(static_cast<size_t>(count));
    for (int i = 0; i < count; i++) {
        const hfl_matrix& w = *matrices[i];
        if (!multiplies_in_lanes(w)) continue;
        for (int k = 0; k < i && !prepared[i]; k++)
            if (prepared[k] && matrices[k]->bits == w.bits && matrices[k]->groups == w.groups &&
                (w.zero_kind == HFL_NO_ZERO || matrices[k]->zero_kind != HFL_NO_ZERO))
                prepared[i] = prepared[k];
        if (prepared[i]) continue;
        Geometry geometry(w.columns, w.groups, w.bits, Simd::lanes);
        Inputs inputs(w, geometry, x, type, m, stride);
        prepared[i] = std::make_shared<Prepared>(Prepared{std::move(geometry), std::move(inputs)});
    }
    share_rows(matrices, count, threads, [&](int i, int64_t first, int64_t last) {
        const hfl_matrix& w = *matrices[i];
        if (!prepared[i]) return multiply_decoded(w, x, type, m, stride, first, last, y[i], type);
        with_values(w, [&](auto bits, auto decoder) {
            multiply_batch<decltype(bits)::value, decltype(decoder)::value>(w, prepared[i]->geometry,
                                                                           prepared[i]->inputs, first, last, y[i], type);
        });
    });
    return 0;
}

}  // namespace
