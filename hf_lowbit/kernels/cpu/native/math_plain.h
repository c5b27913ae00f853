// What state-space mixers need of eight lanes beside simd_plain.h, in standard C++.
#pragma once
#include <cmath>

#include "floats.h"
#include "lowbit.h"
#include "simd_plain.h"

namespace {

struct Math {
    using Float = Simd::Float;

    template <int type> static Float load(const void* p) {
        if constexpr (type == HFL_FLOAT32) return Simd::load(static_cast<const float*>(p));
        else if constexpr (type == HFL_INT8)
            return Simd::make([&](int i) { return static_cast<float>(static_cast<const int8_t*>(p)[i]); });
        else return Simd::make([&](int i) { return load_as_float(p, i, type); });
    }
    // int8: of -127..127, rounded to whole numbers, half to even.
    template <int type> static void store(void* p, Float a) {
        if constexpr (type == HFL_INT8) a = round(a);
        for (int i = 0; i < Simd::lanes; i++)
            if constexpr (type == HFL_INT8) static_cast<int8_t*>(p)[i] = static_cast<int8_t>(a.lane[i]);
            else store_float(p, i, a.lane[i], type);
    }
    static Float divide(Float a, Float b) { return Simd::make([&](int i) { return a.lane[i] / b.lane[i]; }); }
    static Float magnitude(Float a) { return Simd::make([&](int i) { return std::fabs(a.lane[i]); }); }
    // A NaN in v stays.
    static Float at_least(float limit, Float v) {
        return Simd::make([&](int i) { return v.lane[i] < limit ? limit : v.lane[i]; });
    }
    static Float at_most(float limit, Float v) {
        return Simd::make([&](int i) { return v.lane[i] > limit ? limit : v.lane[i]; });
    }
    static Float larger(Float a, Float b) {
        return Simd::make([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static Float zero_if_nan(Float a) {
        return Simd::make([&](int i) { return a.lane[i] == a.lane[i] ? a.lane[i] : 0.0f; });
    }
    // Half to even, of magnitudes below 2^22: what lies behind the last bit of the sum is rounded away.
    static Float round(Float a) {
        return Simd::make([&](int i) { return (a.lane[i] + 12582912.0f) - 12582912.0f; });
    }
    // v less round(v); and p times two to the power of a whole number, within the range of normal floats.
    static Float fraction(Float v, Float whole) { return Simd::subtract(v, whole); }
    static Float times_power(Float p, Float whole) {
        return Simd::make([&](int i) {
            const float w = whole.lane[i];
            const int power = w == w ? static_cast<int>(w) : 0;  // where it is NaN, so is p
            return p.lane[i] * float_of(static_cast<uint32_t>(power + 127) << 23);
        });
    }
    static Float in_range_of_powers(Float v) { return at_least(-126.0f, at_most(127.0f, v)); }

    // to[i] += the sum of the lanes of the i-th argument.
    static void add_sums(float* to, Float a, Float b, Float c, Float d) {
        to[0] += Simd::sum(a), to[1] += Simd::sum(b), to[2] += Simd::sum(c), to[3] += Simd::sum(d);
    }
};

}  // namespace
