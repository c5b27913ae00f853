// Products of a few inputs with packed matrices, decoded in registers: the speed of reading the codes once.
#pragma once
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "decode.h"
#include "inputs.h"
#include "rows.h"
#include "ways.h"

namespace {

// Rows of y = x w^T for the inputs m0..m0+M. Where these do not fit into the first-level cache, a tile of rows shares a
// stretch of them while it is there.
template <class Way, int M> class TileProduct {
  public:
    TileProduct(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t m0)
        : w_(w), geometry_(geometry), x_(x), m0_(m0), way_(w), value_shift_(Way::shift(w)),
          tile_rows_(geometry.blocks <= stretch ? 1 : rows) {
        for (int r = 0; r < tile_rows_; r++) scales_.emplace_back(w, Simd::lanes);
    }

    void operator()(int64_t first, int64_t last, void* y, int type) {
        for (; first < last; first += tile_rows_) multiply_tile(first, std::min(last, first + tile_rows_), y, type);
    }

  private:
    static constexpr int rows = 16;  // of a tile
    using Float = Simd::Float;
    static constexpr int block = Way::steps * Simd::lanes;  // of inputs, or pairs of them
    static constexpr int64_t first_level_bytes = 16384;  // half of the smallest first-level cache
    static constexpr int64_t stretch = std::max<int64_t>(1, first_level_bytes / (block * M * 4));  // of blocks

    void multiply_tile(int64_t first, int64_t last, void* y, int type) {
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

    void add_blocks(int64_t row, int64_t first, int64_t last, const RowScales& scales, Float* totals) {
        const int64_t whole = std::min(last, w_.words / Way::block_words);
        const uint32_t* words = w_.codes + row * w_.words + first * Way::block_words;
        if (w_.groups == 1) add_scaled<per_row>(words, first, whole, scales, totals);
        else if (geometry_.lane.empty()) add_scaled<per_block>(words, first, whole, scales, totals);
        else add_scaled<per_lane>(words, first, whole, scales, totals);
        if (whole == last) return;
        words = w_.codes + row * w_.words + whole * Way::block_words;  // the last block is not all there
        std::memcpy(tail_, words, static_cast<size_t>(w_.words - whole * Way::block_words) * 4);
        if (w_.groups == 1) add_scaled<per_row>(tail_, whole, last, scales, totals);
        else if (geometry_.lane.empty()) add_scaled<per_block>(tail_, whole, last, scales, totals);
        else add_scaled<per_lane>(tail_, whole, last, scales, totals);
    }

    enum Scaling { per_row, per_block, per_lane };

    // Adds blocks first..last, whose words are given, to the totals.
    template <Scaling scaling>
    void add_scaled(const uint32_t* words, int64_t first, int64_t last, const RowScales& scales, Float* totals) const {
        const float* inputs = x_.values.data() + m0_ * x_.stride + first * block * M;
        const float* scale = scales.scale.data();
        const int32_t *groups = geometry_.first.data(), *lanes = geometry_.lane.data();
        const Way way = way_;  // in registers
        Float total[M];
        for (int m = 0; m < M; m++) total[m] = totals[m];
        for (int64_t b = first; b < last; b++, words += Way::block_words, inputs += block * M) {
            __builtin_prefetch(words + 512);
            Float sum[M * Way::template chains<M>];
            for (Float& chain : sum) chain = Simd::zero();
            add_block(way, words, inputs, sum);
            for (int k = M; k < M * Way::template chains<M>; k++) sum[k % M] = Simd::add(sum[k % M], sum[k]);
            Float factor;
            if constexpr (scaling == per_block) factor = Simd::set(scale[groups[b]]);
            if constexpr (scaling == per_lane)
                factor = Simd::permute(Simd::load(scale + groups[b]), Simd::load_int(lanes + b * Simd::lanes));
            for (int m = 0; m < M; m++)
                total[m] = scaling == per_row ? Simd::add(total[m], sum[m]) : Simd::multiply_add(sum[m], factor, total[m]);
        }
        for (int m = 0; m < M; m++) totals[m] = total[m];
    }

    // Adds a block's values times the inputs to sum[chain * M + m].
    HFL_INLINE static void add_block(const Way& way, const uint32_t* words, const float* in, Float* sum) {
        const auto loaded = way.load(words);
        repeat(
            [&](auto j) HFL_INLINE {
                const auto v = way.template at<decltype(j)::value>(loaded);
                Float* chain = sum + j.value % Way::template chains<M> * M;
                for (int m = 0; m < M; m++)
                    chain[m] = Way::multiply_add(v, in + (j.value * M + m) * Simd::lanes, chain[m]);
            },
            std::make_integer_sequence<int, Way::steps>());
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
    const Way way_;
    float value_shift_;
    const int64_t tile_rows_;
    std::vector<RowScales> scales_;
    Float total_[rows][M];
    uint32_t tail_[Way::block_words] = {};
};

template <class Way, int M>
void multiply_rows(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t m0, int64_t first,
                   int64_t last, void* y, int type) {
    TileProduct<Way, M>(w, geometry, x, m0)(first, last, y, type);
}

template <class Way>
void multiply_batch(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t first, int64_t last, void* y,
                    int type) {
    for (int64_t m = 0, M; m < x.batch; m += M) {
        M = together(x.batch - m);
        if constexpr (Simd::max_batch >= 8)
            if (M == 8) multiply_rows<Way, 8>(w, geometry, x, m, first, last, y, type);
        if (M == 4) multiply_rows<Way, 4>(w, geometry, x, m, first, last, y, type);
        if (M == 1) multiply_rows<Way, 1>(w, geometry, x, m, first, last, y, type);
    }
}

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
    struct Prepared {
        Geometry geometry;
        Inputs inputs;
        bool pairs;
    };
    // Matrices of one format and grouping, as siblings mostly are, share their inputs.
    std::vector<std::shared_ptr<Prepared>> prepared(static_cast<size_t>(count));
    for (int i = 0; i < count; i++) {
        const hfl_matrix& w = *matrices[i];
        if (!multiplies_in_lanes(w)) continue;
        const bool pairs = multiplies_pairs(w, type);
        for (int k = 0; k < i && !prepared[i]; k++)
            if (prepared[k] && matrices[k]->bits == w.bits && matrices[k]->groups == w.groups &&
                matrices[k]->decoder == w.decoder && matrices[k]->zero_kind == w.zero_kind &&
                matrices[k]->packing == w.packing && prepared[k]->pairs == pairs)
                prepared[i] = prepared[k];
        if (prepared[i]) continue;
        Geometry geometry(w, Simd::lanes);
        with_way(w, pairs, [&](auto way) {
            Inputs inputs(way, w, geometry, x, type, m, stride);
            prepared[i] = std::make_shared<Prepared>(Prepared{std::move(geometry), std::move(inputs), pairs});
        });
    }
    share_rows(matrices, count, threads, 1, [&](int i, int64_t first, int64_t last) {
        const hfl_matrix& w = *matrices[i];
        if (!prepared[i]) return multiply_decoded(w, x, type, m, stride, first, last, y[i], type);
        with_way(w, prepared[i]->pairs, [&](auto way) {
            using Way = typename decltype(way)::type;
            multiply_batch<Way>(w, prepared[i]->geometry, prepared[i]->inputs, first, last, y[i], type);
        });
    });
    return 0;
}

}  // namespace
