// Inputs become integer codes with a scale of each token's own, or of each of its groups.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "floats.h"
#include "functions.h"

namespace {

// The largest magnitude; NaN if there is one: the bits of magnitudes are in the order of their values, NaN above all.
inline float largest_magnitude(const float* x, int64_t n) {
    int32_t most = 0;
    for (int64_t k = 0; k < n; k++) {
        int32_t bits;
        std::memcpy(&bits, x + k, 4);
        most = std::max(most, bits & 0x7fffffff);
    }
    float result;
    std::memcpy(&result, &most, 4);
    return result;
}

// x [m, columns] of `type` to codes of -limit..limit and scales [m, groups]: hf_lowbit.kernels.quantize_tokens to the last
// bit. A group with NaN or infinity has such a scale.
inline void quantize(const void* x, int type, int64_t m, int64_t columns, int64_t groups, int limit, int8_t* codes,
                     float* scales) {
    const int64_t group = columns / groups;
    std::vector<float> row(static_cast<size_t>(columns));
    const float most = static_cast<float>(limit);
    for (int64_t i = 0; i < m; i++, codes += columns) {
        load_floats(row.data(), x, i * columns, columns, type);
        for (int64_t g = 0; g < groups; g++) {
            const float* values = row.data() + g * group;
            const float scale = scales[i * groups + g] = largest_magnitude(values, group) / most;
            const Simd::Float step = Simd::set(scale == 0 ? 1.0f : scale);
            for (int64_t k = 0; k < group; k += Simd::lanes) {
                const Simd::Float steps = Math::zero_if_nan(Math::divide(load_first<HFL_FLOAT32>(values + k, group - k), step));
                store_first<HFL_INT8>(codes + g * group + k, Math::at_least(-most, Math::at_most(most, steps)), group - k);
            }
        }
    }
}

}  // namespace
