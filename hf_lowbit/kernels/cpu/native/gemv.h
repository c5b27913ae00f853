// Products of a few inputs with packed matrices, decoded in registers: the speed of reading the codes once.
#pragma once
#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "decode.h"
#include "geometry.h"
#include "threads.h"
#include "values.h"

namespace {

#if defined(__GNUC__)
#define HFL_INLINE __attribute__((always_inline))
#else
#define HFL_INLINE
#endif

// use(constant 0), ..., use(constant n - 1): a loop whose counter is a constant.
template <class Use, int... i> HFL_INLINE inline void repeat(Use&& use, std::integer_sequence<int, i...>) {
    (use(Constant<i>()), ...);
}

// Additions to one sum wait for each other: a few sums side by side keep the multipliers busy.
template <int M> constexpr int chains = M == 1 ? 4 : M <= 4 ? 2 : 1;

template <int bits, int decoder>
constexpr bool uses_planes = Simd::has_planes && bits == 4 && decoder == HFL_TABLE;

// How many of the remaining inputs go together through one pass over the codes.
inline int64_t together(int64_t remaining) {
    return Simd::max_batch >= 8 && remaining >= 8 ? 8 : remaining >= 4 ? 4 : 1;
}

// Inputs in the order of the codes, for each pass [block][j][input][lane]: read from front to back. And their sums per
// group where values are shifted.
struct Inputs {
    std::vector<float> values, sums;
    int64_t stride, batch, groups;

    template <int bits, int decoder>
    Inputs(const hfl_matrix& w, const Geometry& geometry, const void* x, int type, int64_t m, int64_t row_stride,
           Constant<bits>, Constant<decoder>)
        : stride(geometry.blocks * geometry.block), batch(m), groups(w.groups + Simd::lanes) {
        using V = Values<bits, decoder>;
        constexpr int codes = Lane<bits>::codes;
        std::vector<float> row(static_cast<size_t>(stride), 0.0f);
        values.resize(static_cast<size_t>(m * stride));
        if (w.zero_kind != HFL_NO_ZERO || V::shift(w) != 0) sums.resize(static_cast<size_t>(m * groups), 0.0f);
        for (int64_t i = 0, pass = 0, M = together(m); i < m; i++) {
            if (i == pass + M) pass = i, M = together(m - i);
            load_floats(row.data(), x, i * row_stride, w.columns, type);
            float* out = values.data() + pass * stride + (i - pass) * Simd::lanes;
            for (int64_t b = 0; b < geometry.blocks; b++) {
                const float* in = row.data() + b * geometry.block;
                for (int j = 0; j < codes; j++, out += M * Simd::lanes) {
                    const float place = V::place(j);
                    for (int lane = 0; lane < Simd::lanes; lane++)
                        out[lane] = place * in[position<bits, decoder>(j, lane)];
                }
            }
            const int64_t group = w.columns / w.groups;
            for (int64_t g = 0; !sums.empty() && g < w.groups; g++) {
                double total = 0;  // a shift of 128 multiplies its rounding error
                for (int64_t k = 0; k < group; k++) total += row[g * group + k];
                sums[static_cast<size_t>(i * groups + g)] = static_cast<float>(total);
            }
        }
    }

    template <int bits, int decoder> static constexpr int position(int j, int lane) {
        if constexpr (uses_planes<bits, decoder>) return Simd::plane_position(j, lane);
        return lane * Lane<bits>::codes + j;
    }
};

// Adds a block's values times the inputs to sum[chain * M + m].
template <int bits, int decoder, int M> struct BlockProduct {
    Values<bits, decoder> values;
    explicit BlockProduct(const hfl_matrix& w) : values(w) {}

    HFL_INLINE void operator()(const uint32_t* words, const float* in, Simd::Float* sum) const {
        constexpr int lane_words = Lane<bits>::words, codes = Lane<bits>::codes;
        Simd::Int lane[lane_words];
        repeat([&](auto q) HFL_INLINE { lane[q.value] = Simd::strided<lane_words, decltype(q)::value>(words); },
                           std::make_integer_sequence<int, lane_words>());
        repeat(
            [&](auto j) HFL_INLINE {
                const Simd::Float v = values.template at<decltype(j)::value>(lane);
                Simd::Float* chain = sum + j.value % chains<M> * M;
                for (int m = 0; m < M; m++)
                    chain[m] = Simd::multiply_add(v, Simd::load(in + (j.value * M + m) * Simd::lanes), chain[m]);
            },
            std::make_integer_sequence<int, codes>());
    }
};

template <int M> struct PlaneProduct {
    typename Simd::Planes planes;
    explicit PlaneProduct(const hfl_matrix& w) : planes(w.table) {}

    HFL_INLINE void operator()(const uint32_t* words, const float* in, Simd::Float* sum) const {
        Simd::Float v[8];
        planes(Simd::load_int(words), v);
        repeat(
            [&](auto j) HFL_INLINE {
                Simd::Float* chain = sum + j.value % chains<M> * M;
                for (int m = 0; m < M; m++)
                    chain[m] = Simd::multiply_add(v[j.value], Simd::load(in + (j.value * M + m) * Simd::lanes), chain[m]);
            },
            std::make_integer_sequence<int, 8>());
    }
};

// Rows of y = x w^T for the inputs m0..m0+M. A tile of rows shares a stretch of the inputs while it is in the
// first-level cache.
template <int bits, int decoder, int M> class TileProduct {
  public:
    static constexpr int rows = 16;

    TileProduct(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t m0)
        : w_(w), geometry_(geometry), x_(x), m0_(m0), product_(w), value_shift_(Values<bits, decoder>::shift(w)) {
        for (int r = 0; r < rows; r++) scales_.emplace_back(w, Simd::lanes);
    }

    void operator()(int64_t first, int64_t last, void* y, int type) {
        const int64_t stretch = std::max<int64_t>(1, first_level_bytes / (geometry_.block * M * 4));
        for (int64_t row = first; row < last; row++) {
            scales_[row - first].select(row);
            for (Float& total : total_[row - first]) total = Simd::zero();
        }
        for (int64_t b = 0; b < geometry_.blocks; b += stretch)
            for (int64_t row = first; row < last; row++)
                add_blocks(row, b, std::min(b + stretch, geometry_.blocks), scales_[row - first], total_[row - first]);
        for (int64_t row = first; row < last; row++)
            for (int m = 0; m < M; m++)
                store_float(y, (m0_ + m) * w_.rows + row, finish(total_[row - first][m], scales_[row - first], m0_ + m),
                            type);
    }

  private:
    using Float = Simd::Float;
    static constexpr int block_words = Lane<bits>::words * Simd::lanes;
    static constexpr int64_t first_level_bytes = 16384;  // half of the smallest first-level cache

    void add_blocks(int64_t row, int64_t first, int64_t last, const RowScales& scales, Float* totals) {
        const uint32_t* words = w_.codes + row * w_.words;
        const float* inputs = x_.values.data() + m0_ * x_.stride;
        Float total[M];
        for (int m = 0; m < M; m++) total[m] = totals[m];
        for (int64_t b = first; b < last; b++) {
            const uint32_t* p = words + b * block_words;
            __builtin_prefetch(p + 512);
            if ((b + 1) * block_words > w_.words) {
                std::memcpy(tail_, p, static_cast<size_t>(w_.words - b * block_words) * 4);
                p = tail_;
            }
            Float sum[M * chains<M>];
            for (Float& chain : sum) chain = Simd::zero();
            product_(p, inputs + b * geometry_.block * M, sum);
            for (int k = M; k < M * chains<M>; k++) sum[k % M] = Simd::add(sum[k % M], sum[k]);
            const Float scale = w_.groups == 1 ? Simd::set(1.0f) : block_scale(scales.scale.data(), b);
            for (int m = 0; m < M; m++) total[m] = Simd::multiply_add(sum[m], scale, total[m]);
        }
        for (int m = 0; m < M; m++) totals[m] = total[m];
    }

    HFL_INLINE Float block_scale(const float* scale, int64_t b) const {
        const float* first = scale + geometry_.first[b];
        if (geometry_.lane.empty()) return Simd::set(*first);
        return Simd::permute(Simd::load(first), Simd::load_int(geometry_.lane.data() + b * Simd::lanes));
    }

    float finish(Float total, const RowScales& scales, int64_t m) const {
        float result = Simd::sum(total);
        if (w_.groups == 1) result *= scales.scale[0];
        if (w_.zero_kind == HFL_NO_ZERO && value_shift_ == 0) return result;
        const float* sums = x_.sums.data() + m * x_.groups;
        Float taken = Simd::zero();
        for (int64_t g = 0; g < w_.groups; g += Simd::lanes) {
            Float shift = Simd::set(value_shift_);
            if (w_.zero_kind != HFL_NO_ZERO) shift = Simd::add(shift, Simd::load(scales.zero.data() + g));
            shift = Simd::multiply(shift, Simd::load(scales.scale.data() + g));
            taken = Simd::multiply_add(shift, Simd::load(sums + g), taken);
        }
        return result - Simd::sum(taken);
    }

    const hfl_matrix& w_;
    const Geometry& geometry_;
    const Inputs& x_;
    int64_t m0_;
    const std::conditional_t<uses_planes<bits, decoder>, PlaneProduct<M>, BlockProduct<bits, decoder, M>> product_;
    float value_shift_;
    std::vector<RowScales> scales_;
    Float total_[rows][M];
    uint32_t tail_[block_words] = {};
};

template <int bits, int decoder, int M>
void multiply_rows(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t m0, int64_t first,
                   int64_t last, void* y, int type) {
    TileProduct<bits, decoder, M> tile(w, geometry, x, m0);
    for (int64_t row = first; row < last; row += tile.rows) tile(row, std::min(last, row + tile.rows), y, type);
}

template <int bits, int decoder>
void multiply_batch(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t first, int64_t last, void* y,
                    int type) {
    for (int64_t m = 0, M; m < x.batch; m += M) {
        M = together(x.batch - m);
        if constexpr (Simd::max_batch >= 8)
            if (M == 8) multiply_rows<bits, decoder, 8>(w, geometry, x, m, first, last, y, type);
        if (M == 4) multiply_rows<bits, decoder, 4>(w, geometry, x, m, first, last, y, type);
        if (M == 1) multiply_rows<bits, decoder, 1>(w, geometry, x, m, first, last, y, type);
    }
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

inline bool multiplies_in_lanes(const hfl_matrix& w) {
    const int64_t group = w.columns / w.groups;
    const bool planes_fit = !Simd::has_planes || w.bits != 4 || w.groups == 1 || group % 32 == 0;
    return w.packing == HFL_DENSE && lanes_fit_groups(w) && planes_fit;
}

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
    // Matrices of one format and grouping, as siblings mostly are, share their inputs.
    std::vector<std::shared_ptr<Prepared>> prepared(static_cast<size_t>(count));
    for (int i = 0; i < count; i++) {
        const hfl_matrix& w = *matrices[i];
        if (!multiplies_in_lanes(w)) continue;
        for (int k = 0; k < i && !prepared[i]; k++)
            if (prepared[k] && matrices[k]->bits == w.bits && matrices[k]->groups == w.groups &&
                matrices[k]->decoder == w.decoder && matrices[k]->zero_kind == w.zero_kind)
                prepared[i] = prepared[k];
        if (prepared[i]) continue;
        Geometry geometry(w.columns, w.groups, w.bits, Simd::lanes);
        with_values(w, [&](auto bits, auto decoder) {
            Inputs inputs(w, geometry, x, type, m, stride, bits, decoder);
            prepared[i] = std::make_shared<Prepared>(Prepared{std::move(geometry), std::move(inputs)});
        });
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
