// Inputs of a product in the order in which a way's codes come out of their words, and their sums per group.
#pragma once
#include <vector>

#include "aligned.h"
#include "ways.h"

namespace {

// How many of the remaining inputs go together through one pass over the codes.
inline int64_t together(int64_t remaining) {
    return Simd::max_batch >= 8 && remaining >= 8 ? 8 : remaining >= 4 ? 4 : 1;
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
};

// For each pass [block][j][input][lane]: read from front to back. A lane is a float, a pair of bfloat16 numbers, or four
// int8 codes.
struct Inputs {
    int64_t stride, batch, groups, starts_per_input = 0;
    Aligned<float> values;
    AlignedVector<float> sums;      // [batch, groups + lanes], where values are shifted; of codes scaled by their groups
    AlignedVector<int32_t> starts;  // of integer sums: for each pass [block][input][lane], one block for rows of one scale
    AlignedVector<float> scale;     // of int8 inputs [batch, groups of scales + lanes]
    int64_t scale_stride = 0;

    template <class Way>
    Inputs(Type<Way>, const hfl_matrix& w, const Geometry& geometry, const void* x, int type, int64_t m,
           int64_t row_stride, InputScales scales = {})
        : stride(geometry.blocks * Way::steps * Simd::lanes), batch(m), groups(w.groups + Simd::lanes),
          values(m * stride) {
        using Input = typename Way::Input;
        std::vector<Input> row(static_cast<size_t>(geometry.blocks * geometry.block));
        if constexpr (Way::is_integer) {
            starts_per_input = w.groups == 1 ? 1 : geometry.blocks;
            starts.resize(static_cast<size_t>(m * starts_per_input * Simd::lanes), 0);
            scale_stride = scales.groups + Simd::lanes;
            scale.resize(static_cast<size_t>(m * scale_stride), 0.0f);
            for (int64_t i = 0; i < m; i++)
                std::copy_n(scales.values + i * scales.groups, scales.groups, scale.data() + i * scale_stride);
        }
        if (w.zero_kind != HFL_NO_ZERO || Way::shift(w) != 0) sums.resize(static_cast<size_t>(m * groups), 0.0f);
        for (int64_t i = 0, pass = 0, M = together(m); i < m; i++) {
            if (i == pass + M) pass = i, M = together(m - i);
            load_inputs(row.data(), x, i * row_stride, w.columns, type);
            float* out = values.data() + pass * stride + (i - pass) * Simd::lanes;
            for (int64_t b = 0; b < geometry.blocks; b++)
                for (int j = 0; j < Way::steps; j++, out += M * Simd::lanes) {
                    Way::arrange(row.data() + b * geometry.block, j, out);
                    if constexpr (Way::is_integer)
                        Way::add_start(out, starts.data() + start_at(pass, M, b) + (i - pass) * Simd::lanes);
                }
            const int64_t group = w.columns / w.groups;
            for (int64_t g = 0; !sums.empty() && g < w.groups; g++) {
                double total = 0;  // a shift of 128 multiplies its rounding error
                for (int64_t k = 0; k < group; k++) total += as_float(row[g * group + k]);
                if (scales.groups > 1) total *= scales.values[i * scales.groups + g];
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
