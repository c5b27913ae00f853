// What grids lose: the search of a clipping range asks it of many grids over the same weights.
#pragma once
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace {

// The compiler's own vectors, of one register each: those of several would be compared element by element.
#if defined(__AVX512F__)
constexpr int64_t error_lanes = 16;
#elif defined(__AVX2__)
constexpr int64_t error_lanes = 8;
#else
constexpr int64_t error_lanes = 4;
#endif
typedef float ErrorLanes __attribute__((vector_size(error_lanes * sizeof(float))));

inline ErrorLanes load_lanes(const float* p) {
    ErrorLanes lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}

// The integers first..last. Added to 1.5 * 2^23 a small float keeps no fraction, rounded half to even.
struct NearestInteger {
    float first, last;
    ErrorLanes operator()(ErrorLanes x) const {
        constexpr float no_fraction = 12582912.0f;
        x = x < first ? first + ErrorLanes{} : x;
        x = x > last ? last + ErrorLanes{} : x;
        return (x + no_fraction) - no_fraction;
    }
};

// The ascending levels of a table; what is not above a boundary falls below it.
struct NearestLevel {
    const float *levels, *boundaries;
    int64_t count;
    ErrorLanes operator()(ErrorLanes x) const {
        ErrorLanes found = levels[0] + ErrorLanes{};
        for (int64_t level = 1; level < count; level++)
            found = x > boundaries[level - 1] ? levels[level] + ErrorLanes{} : found;
        return found;
    }
};

template <class Nearest>
float group_error(const float* values, const float* importance, int64_t size, float scale, float zero,
                  const Nearest& nearest) {
    const float inverse = scale == 0.0f ? 1.0f : 1.0f / scale;
    ErrorLanes sums{};
    const auto add = [&](ErrorLanes value, ErrorLanes weight) {
        const ErrorLanes difference = value - (nearest(value * inverse + zero) - zero) * scale;
        sums += difference * difference * weight;
    };
    int64_t k = 0;
    for (; k + error_lanes <= size; k += error_lanes) add(load_lanes(values + k), load_lanes(importance + k));
    if (k < size) {  // the rest, filled up with what counts nothing
        ErrorLanes rest{}, weights{};
        std::memcpy(&rest, values + k, static_cast<size_t>(size - k) * sizeof(float));
        std::memcpy(&weights, importance + k, static_cast<size_t>(size - k) * sizeof(float));
        add(rest, weights);
    }
    for (int64_t half = error_lanes / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

template <class Nearest> void row_errors(const hfl_rounding& r, int64_t row, const Nearest& nearest) {
    for (int64_t group = 0; group < r.groups; group++) {
        const int64_t at = row * r.groups + group;
        r.errors[at] = group_error(r.values + at * r.size, r.importance + group * r.size, r.size, r.scales[at],
                                   r.zeros[at], nearest);
    }
}

void rounding_errors(const hfl_rounding& r, int threads) {
    auto work = [&](int64_t row) {
        if (r.levels)
            row_errors(r, row, NearestLevel{r.levels, r.boundaries, r.count});
        else
            row_errors(r, row, NearestInteger{static_cast<float>(r.first), static_cast<float>(r.last)});
    };
    share(r.rows, threads, work);
}

}  // namespace
