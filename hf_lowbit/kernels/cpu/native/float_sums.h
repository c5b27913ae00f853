// What ways have in common whose values are multiplied and added as floats.
#pragma once
#include "geometry.h"
#include "unroll.h"

namespace {

struct FloatSums {
    using Sum = Simd::Float;
    static constexpr int lanes = Simd::lanes, max_batch = Simd::max_batch;
    static constexpr bool is_integer = false, has_input_groups = false;
    static int lane_codes(const hfl_matrix& w) { return codes_per_lane(w); }
    HFL_INLINE static Sum zero() { return Simd::zero(); }
    HFL_INLINE static Sum add(Sum a, Sum b) { return Simd::add(a, b); }
    HFL_INLINE static Sum to_float(Sum a) { return a; }
};

}  // namespace
