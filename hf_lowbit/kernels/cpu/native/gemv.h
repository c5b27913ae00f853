// Products of a few inputs with packed matrices, decoded in registers: the speed of reading the codes once.
#pragma once
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "inputs.h"
#include "prefetch.h"
#include "rows.h"
#include "tile_scales.h"
#include "ways.h"

namespace {

constexpr int tile_rows = 16;
constexpr int64_t short_words = 128;   // of a row, less: what begins and ends with it counts

// Rows of y = x w^T for the inputs m0..m0+M, in tiles of sixteen. Two rows go together, four where they are short or have
// narrow codes: they share inputs in registers, but memory is better read in few places at once. Where the inputs do not
// fit into the first-level cache, a tile shares a stretch of them while it is there.
template <class Way, int M> class TileProduct {
  public:
    TileProduct(const hfl_matrix& w, const Geometry& geometry, const Inputs& x, int64_t m0)
        : w_(w), geometry_(geometry), x_(x), m0_(m0), way_(w), value_shift_(Way::shift(w)),
          scales_(w, rows), reads_on_(w.words % Way::block_words && (Way::is_integer || is_finite(w))) {}

    void operator()(int64_t first, int64_t last, void* y, int type) {
        for (; first < last; first += rows) multiply_tile(first, std::min(last, first + rows), y, type);
    }

  private:
    using Float = Simd::Float;
    using Sum = typename Way::Sum;
    using Loaded = decltype(std::declval<const Way&>().template load<M>(nullptr));
    static constexpr int rows = tile_rows;
    static constexpr bool is_small = sizeof(Loaded) <= 3 * sizeof(Float);  // else they do not fit into registers
    static constexpr int rows_together = M == 1 && is_small ? Simd::rows_together : 1;
    static constexpr bool may_pass = M <= 4 || Way::is_integer;  // codes with eight floats each wait for arithmetic
    static constexpr int block = Way::steps * Simd::lanes;  // of inputs, or pairs of them
    static constexpr int64_t first_level_bytes = Simd::lanes * 2048;  // of inputs, in the first-level cache
    static constexpr int64_t block_bytes = (block + Way::is_integer * Simd::lanes) * M * 4;  // with where sums start
    static constexpr int64_t stretch = std::max<int64_t>(1, first_level_bytes / block_bytes);  // of blocks

    void multiply_tile(int64_t first, int64_t last, void* y, int type) {
        scales_.select(first, last - first);
        for (int r = 0; r < rows; r++)
            for (int m = 0; m < M; m++) {
                if (w_.groups == 1) partial_[r][m].sum = start(x_.starts_of(m0_, M, 0), m);
                else partial_[r][m].total = Simd::zero();
            }
        for (int64_t b = 0; b < geometry_.blocks; b += stretch) {
            const int64_t end = std::min(b + stretch, geometry_.blocks);
            int64_t row = first;
            if constexpr (rows_together > 1) {
                if (w_.bits <= 2 || w_.words < short_words)
                    for (; row + rows_together <= last; row += rows_together)
                        add_blocks<rows_together>(row, row - first, b, end);
                for (; row + 2 <= last; row += 2) add_blocks<2>(row, row - first, b, end);
            }
            for (; row < last; row++) add_blocks<1>(row, row - first, b, end);
        }
        for (int m = 0; m < std::min<int64_t>(M, x_.batch - m0_); m++) {
            float results[rows];
            finish(m, static_cast<int>(last - first), results);
            store_floats(y, (m0_ + m) * w_.rows + first, results, last - first, type);
        }
    }

    // Adds blocks first..last of R rows, which are those of the tile from `at` on.
    template <int R> void add_blocks(int64_t row, int64_t at, int64_t first, int64_t last) {
        // Words beyond a row are the next one's, and their inputs are zeros; beyond the matrix there are none.
        const bool is_within = reads_on_ && (row + R - 1) * w_.words + last * Way::block_words <= w_.rows * w_.words;
        const int64_t whole = is_within ? last : std::min(last, w_.words / Way::block_words);
        const uint32_t* words = w_.codes + row * w_.words;
        if constexpr (M == 1)  // what more inputs wait for is arithmetic
            prefetch_pages(words + first * Way::block_words + ahead_.words, R * (last - first) * Way::block_words * 4);
        add_scaled<R>(words + first * Way::block_words, w_.words, at, first, whole);
        if (whole == last) return;
        uint32_t tail[R * Way::block_words] = {};  // the last block is not all there
        for (int r = 0; r < R; r++)
            std::memcpy(tail + r * Way::block_words, words + r * w_.words + whole * Way::block_words,
                        static_cast<size_t>(w_.words - whole * Way::block_words) * 4);
        add_scaled<R>(tail, Way::block_words, at, whole, last);
    }

    // Where the sum of a block, or of a row that has one scale, begins.
    HFL_INLINE static Sum start(const int32_t* starts, int m) {
        if constexpr (Way::is_integer) return Way::start(starts + m * Simd::lanes);
        else return Way::zero();
    }

    enum Scaling { per_row, per_block, per_lane };

    template <int R> void add_scaled(const uint32_t* words, int64_t row_words, int64_t at, int64_t first, int64_t last) {
        if (w_.groups == 1) add_scaled<R, per_row>(words, row_words, at, first, last);
        else if (geometry_.lane.empty()) add_scaled<R, per_block>(words, row_words, at, first, last);
        else add_scaled<R, per_lane>(words, row_words, at, first, last);
    }

    template <int R, Scaling scaling>
    void add_scaled(const uint32_t* words, int64_t row_words, int64_t at, int64_t first, int64_t last) {
        constexpr int chains = std::max(1, Way::template chains<M> / R), sums = R * M;
        const float* inputs = x_.values.data() + m0_ * x_.stride + first * block * M;
        const int32_t *groups = geometry_.first.data(), *lanes = geometry_.lane.data();
        // Rows that come next, in the order in which they lie, which memory answers fastest.
        const int64_t rows_words = R * row_words;
        const uint32_t* next = words + ((ahead_.words - 1) / rows_words + 1) * rows_words;
        const uint32_t* near = words + ((near_words - 1) / rows_words + 1) * rows_words;
        const ReadAhead::Into into = ahead_.into;
        const Way way = way_;  // in registers
        const int type = w_.scale_type;
        const char* scale[R];
        Float total[sums];
        Sum sum[sums * chains];
        for (int r = 0; r < R; r++) {
            scale[r] = scales_.row(at + r);
            for (int m = 0; m < M; m++)
                if constexpr (scaling == per_row) sum[r * M + m] = partial_[at + r][m].sum;
                else total[r * M + m] = partial_[at + r][m].total;
        }
        for (int k = sums; k < sums * chains; k++) sum[k] = Way::zero();
        const int32_t* starts = x_.starts_of(m0_, M, first);
        for (int64_t b = first; b < last; b++, words += Way::block_words, inputs += block * M) {
            for (int k = 0; k < R * Way::block_words; k += 16) prefetch(next + k, near + k, into);
            next += R * Way::block_words;
            near += R * Way::block_words;
            if constexpr (scaling == per_row) {
                add_block<R, chains>(way, words, row_words, inputs, sum);
                continue;
            }
            for (int k = 0; k < sums * chains; k++) sum[k] = k < sums ? start(starts, k % M) : Way::zero();
            starts += M * Simd::lanes;
            add_block<R, chains>(way, words, row_words, inputs, sum);
            for (int k = sums; k < sums * chains; k++) sum[k % sums] = Way::add(sum[k % sums], sum[k]);
            auto of_lanes = [&](const void* of_groups, int type) HFL_INLINE {
                if constexpr (scaling == per_block) return broadcast(of_groups, groups[b], type);
                return pick(of_groups, groups[b], Simd::load_int(lanes + b * Simd::lanes), type);
            };
            for (int r = 0; r < R; r++) {
                const Float factor = of_lanes(scale[r], type);
                for (int m = 0; m < M; m++) {
                    Float value = Way::to_float(sum[r * M + m]);
                    if constexpr (Way::has_input_groups)
                        value = Simd::multiply(value, of_lanes(x_.scales(m0_ + m), HFL_FLOAT32));
                    total[r * M + m] = Simd::multiply_add(value, factor, total[r * M + m]);
                }
            }
        }
        if constexpr (scaling == per_row)
            for (int k = sums; k < sums * chains; k++) sum[k % sums] = Way::add(sum[k % sums], sum[k]);
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                if constexpr (scaling == per_row) partial_[at + r][m].sum = sum[r * M + m];
                else partial_[at + r][m].total = total[r * M + m];
    }

    // Adds a block's values times the inputs to sum[(chain * R + row) * M + m].
    template <int R, int chains>
    HFL_INLINE static void add_block(const Way& way, const uint32_t* words, int64_t row_words, const float* in, Sum* sum) {
        Loaded loaded[R];
        for (int r = 0; r < R; r++) loaded[r] = way.template load<M>(words + r * row_words);
        repeat<Way::steps>([&](auto j) HFL_INLINE {
            Sum* chain = sum + j.value % chains * R * M;
            for (int r = 0; r < R; r++) {
                const auto v = way.template at<decltype(j)::value>(loaded[r]);
                for (int m = 0; m < M; m++)
                    chain[r * M + m] = Way::multiply_add(v, in + (j.value * M + m) * Simd::lanes, chain[r * M + m]);
            }
        });
    }

    // The results of the tile's first `count` rows for its m-th input.
    void finish(int m, int count, float* results) const {
        Float total[rows];
        const Float factor = Simd::set(Way::is_integer && !x_.has_groups ? x_.scales(m0_ + m)[0] : 1.0f);
        for (int r = 0; r < rows; r++) total[r] = r < count ? finish(r, m) : Simd::zero();
        for (int r = 0; r < rows; r += Simd::lanes) {
            const Float values = Simd::sums(total + r);
            Simd::store(results + r, Way::is_integer ? Simd::multiply(values, factor) : values);
        }
    }

    Float finish(int64_t at, int m) const {
        const int type = w_.scale_type;
        const char* scale = scales_.row(at);
        const float* sums = x_.sums.data() + (m0_ + m) * x_.groups;
        Float total;
        if (w_.groups > 1) total = partial_[at][m].total;
        else total = Simd::multiply(Way::to_float(partial_[at][m].sum), broadcast(scale, 0, type));
        if constexpr (Way::is_integer)
            total = Simd::multiply(total, Simd::set(1.0f / static_cast<float>(w_.integer_multiplier)));
        if (w_.zero_kind == HFL_NO_ZERO && value_shift_ == 0) return total;
        for (int64_t g = 0; g < w_.groups; g += Simd::lanes) {
            Float shift = Simd::set(value_shift_);
            if (w_.zero_kind != HFL_NO_ZERO) shift = Simd::add(shift, scales_.zeros(at, g));
            shift = Simd::multiply(shift, load_vector(scale, g, type));
            total = Simd::subtract(total, Simd::multiply(shift, Simd::load(sums + g)));
        }
        return total;
    }

    const hfl_matrix& w_;
    const Geometry& geometry_;
    const Inputs& x_;
    int64_t m0_;
    const Way way_;
    float value_shift_;
    TileScales scales_;
    const bool reads_on_;  // beyond the end of a row
    const ReadAhead ahead_ = ReadAhead::of_codes(may_pass && x_.batch <= M);  // no further pass reads codes again
    union {
        Float total;  // of scaled blocks
        Sum sum;      // where rows have one scale
    } partial_[rows][M];
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
        M = together<Way>(x.batch - m);
        if constexpr (Way::max_batch >= 8)
            if (M == 8) multiply_rows<Way, 8>(w, geometry, x, m, first, last, y, type);
        if constexpr (Way::max_batch >= 4)
            if (M == 4) multiply_rows<Way, 4>(w, geometry, x, m, first, last, y, type);
        if (M == 1) multiply_rows<Way, 1>(w, geometry, x, m, first, last, y, type);
    }
}

// Products of several matrices. fits(i): whether the i-th has a way, other(i, first, last, y) computes rows of one that
// has none; alike(i, k): they can share inputs; with_way(i, use) calls use(Type<the way>); make(way, w, geometry): inputs.
template <class Fits, class Alike, class WithWay, class Make, class Other>
void multiply_matrices(const hfl_matrix* const* matrices, int count, int64_t m, void* const* y, int type, int threads,
                       Fits fits, Alike alike, WithWay with_way, Make make, Other other) {
    struct Prepared {
        Geometry geometry;
        Inputs inputs;
    };
    std::vector<std::shared_ptr<Prepared>> prepared(static_cast<size_t>(count));
    for (int i = 0; i < count; i++) {
        if (!fits(i)) continue;
        for (int k = 0; k < i && !prepared[i]; k++)  // siblings mostly have one format and grouping
            if (prepared[k] && matrices[k]->bits == matrices[i]->bits && matrices[k]->groups == matrices[i]->groups &&
                matrices[k]->zero_kind == matrices[i]->zero_kind && alike(i, k))
                prepared[i] = prepared[k];
        if (prepared[i]) continue;
        with_way(i, [&](auto way) {
            using Way = typename decltype(way)::type;
            Geometry geometry(*matrices[i], Way::lanes, Way::lane_codes(*matrices[i]));
            Inputs inputs = make(way, *matrices[i], geometry);
            prepared[i] = std::make_shared<Prepared>(Prepared{std::move(geometry), std::move(inputs)});
        });
    }
    share_rows(matrices, count, m, threads, tile_rows, [&](int i, int64_t first, int64_t last) {
        if (!prepared[i]) return other(i, first, last, y[i]);
        with_way(i, [&](auto way) {
            using Way = typename decltype(way)::type;
            multiply_batch<Way>(*matrices[i], prepared[i]->geometry, prepared[i]->inputs, first, last, y[i], type);
        });
    });
}

}  // namespace
