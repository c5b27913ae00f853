// Inputs of a product in the order in which a way's codes come out of their words, and their sums per group.
#pragma once
#include <vector>

#include "aligned.h"
#include "ways.h"

namespace {

// How many of the remaining inputs go together through one pass over the codes. One place may stay empty: three passes
// take at least as long as that of four inputs.
template <class Way> int64_t together(int64_t remaining) {
    return Way::max_batch >= 8 && remaining >= 7 ? 8 : Way::max_batch >= 4 && remaining >= 3 ? 4 : 1;
}

// The places of all passes.
template <class Way> int64_t places(int64_t batch) {
    int64_t all = 0;
    while (all < batch) all += together<Way>(batch - all);
    return all;
}

inline void load_inputs(float* out, const void* x, int64_t first, int64_t n, int type) {
    load_floats(out, x, first, n, type);
}
inline void load_inputs(int8_t* out, const void* x, int64_t first, int64_t n, int) {
    std::memcpy(out, static_cast<const int8_t*>(x) + first, static_cast<size_t>(n));
}
inline void load_inputs(uint16_t* out, const void* x, int64_t first, int64_t n, int) {
    std::memcpy(out, static_cast<const uint16_t*>(x) + first, static_cast<size_t>(n) * 2);
}
inline float as_float(float value) { return value; }
inline float as_float(int8_t value) { return value; }
inline float as_float(uint16_t bfloat16) { return from_bfloat16(bfloat16); }

// The scales of int8 inputs [batch, groups]: one per input, or as many as its matrices have.
struct InputScales {
    const float* values = nullptr;
    int64_t groups = 0;
    float of(int64_t input, int64_t group) const { return values[groups > 1 ? input * groups + group : input]; }
};

// For each pass [block][j][input][lane]: read from front to back. A lane is a float, a pair of bfloat16 numbers, or four
// int8 codes; zeros in empty places.
struct Inputs {
    int64_t stride, batch, groups, starts_per_input = 0;
    Aligned<float> values;
    AlignedVector<float> sums;      // [batch, groups + lanes], where values are shifted; of codes scaled by their groups
    AlignedVector<int32_t> starts;  // of integer sums: for each pass [block][input][lane], one block for rows of one scale
    AlignedVector<float> scale;     // of int8 inputs [batch, 1 or groups + lanes]
    int64_t scale_stride = 0;
    bool has_groups = false;  // their sums are scaled by group, by what is in `scale` too

    template <class Way>
    Inputs(Type<Way>, const hfl_matrix& w, const Geometry& geometry, const void* x, int type, int64_t m,
           int64_t row_stride, InputScales scales = {})
        : stride(geometry.blocks * Way::steps * Simd::lanes), batch(m), groups(w.groups + Simd::lanes),
          values(places<Way>(m) * stride) {
        using Input = typename Way::Input;
        const int64_t all = places<Way>(m);
        std::vector<Input> row(static_cast<size_t>(geometry.blocks * geometry.block));
        if constexpr (Way::is_integer) {
            starts_per_input = w.groups == 1 ? 1 : geometry.blocks;
            starts.resize(static_cast<size_t>(all * starts_per_input * Simd::lanes), 0);
            has_groups = Way::has_input_groups && w.groups > 1;
            const int64_t of_input = has_groups ? w.groups : 1;
            scale_stride = of_input + Simd::lanes;
            scale.resize(static_cast<size_t>(all * scale_stride), 0.0f);
            for (int64_t i = 0; i < m; i++)
                for (int64_t g = 0; g < of_input; g++) scale[i * scale_stride + g] = scales.of(i, g);
        }
        if (w.zero_kind != HFL_NO_ZERO || Way::shift(w) != 0) sums.resize(static_cast<size_t>(m * groups), 0.0f);
        for (int64_t i = 0, pass = 0, M = together<Way>(m); i < all; i++) {
            if (i == pass + M) pass = i, M = together<Way>(m - i);
            if (i < m) load_inputs(row.data(), x, i * row_stride, w.columns, type);
            else std::fill(row.begin(), row.end(), Input{});
            float* out = values.data() + pass * stride + (i - pass) * Simd::lanes;
            for (int64_t b = 0; b < geometry.blocks; b++)
                for (int j = 0; j < Way::steps; j++, out += M * Simd::lanes) {
                    Way::arrange(row.data() + b * geometry.block, j, out);
                    if constexpr (Way::is_integer)
                        Way::add_start(out, starts.data() + start_at(pass, M, b) + (i - pass) * Simd::lanes);
                }
            const int64_t group = w.columns / w.groups;
            for (int64_t g = 0; i < m && !sums.empty() && g < w.groups; g++) {
                double total = 0;  // a shift of 128 multiplies its rounding error
                for (int64_t k = 0; k < group; k++) total += as_float(row[g * group + k]);
                if (has_groups) total *= scales.of(i, g);
                sums[static_cast<size_t>(i * groups + g)] = static_cast<float>(total);
            }
        }
    }

    // Where the starts of a block of M inputs from `pass` on lie.
    const int32_t* starts_of(int64_t pass, int64_t M, int64_t block) const {
        return starts.data() + start_at(pass, M, block);
    }
    const float* scales(int64_t input) const { return scale.data() + input * scale_stride; }

  private:
    int64_t start_at(int64_t pass, int64_t M, int64_t block) const {
        return (pass * starts_per_input + (starts_per_input > 1 ? block * M : 0)) * Simd::lanes;
    }
};

}  // namespace
