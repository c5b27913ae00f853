// Ways of int8 inputs for codes that cross bytes or are digits: integers that meet as floats, whose sums are the same
// ones as long as they stay below 2^24.
#pragma once
#include <cmath>

#include "ways.h"

namespace {

constexpr int64_t most_exact = 1 << 24;

// Instead of a way of floats' own: inputs are codes, values are whole and lack nothing, sums start at zero.
struct WholeNumbers {
    using Input = int8_t;
    static constexpr bool is_integer = true, has_input_groups = true;
    static constexpr int max_batch = Simd::max_batch_of_integers;
    static void add_start(const float*, int32_t*) {}
    HFL_INLINE static Simd::Float start(const int32_t*) { return Simd::zero(); }
    static float shift(const hfl_matrix&) { return 0.0f; }
};

// A matrix' table as the integers it stands for; decoders may go on reading it here.
template <int bits> struct WholeTable {
    float integers[1 << bits];

    explicit WholeTable(const hfl_matrix& w) {
        for (int c = 0; c < 1 << bits; c++) integers[c] = std::round(w.table[c] * static_cast<float>(w.integer_multiplier));
    }
    hfl_matrix in_place_of(hfl_matrix w) const {
        w.table = integers;
        return w;
    }
};

// 3 and 5 bits by table, which any integers may be in; 6 and 7 bits are numbers from an offset on.
template <int bits>
struct IntegersInLanes : WholeTable<bits>, InLanes<bits, bits <= 5 ? HFL_TABLE : HFL_INTEGER>, WholeNumbers {
    using Lanes = InLanes<bits, bits <= 5 ? HFL_TABLE : HFL_INTEGER>;
    using WholeNumbers::is_integer, WholeNumbers::has_input_groups, WholeNumbers::max_batch, WholeNumbers::shift;
    using typename WholeNumbers::Input;
    static_assert(32 % bits != 0, "all places are 1");

    explicit IntegersInLanes(const hfl_matrix& w) : WholeTable<bits>(w), Lanes(this->in_place_of(w)) {}
    template <int j> HFL_INLINE Simd::Float at(const typename Lanes::Loaded& loaded) const {
        return this->values(codes_at<bits, j>(loaded.lane));
    }
};

// Base 3: digits and their offset.
struct IntegersInDigits : InDigits, WholeNumbers {
    using WholeNumbers::is_integer, WholeNumbers::has_input_groups, WholeNumbers::max_batch, WholeNumbers::shift;
    using typename WholeNumbers::Input;

    Simd::Float offset;
    explicit IntegersInDigits(const hfl_matrix& w) : InDigits(w), offset(Simd::set(w.table[0])) {}
    template <int j> HFL_INLINE Simd::Float at(const Loaded& loaded) const {
        return Simd::add(InDigits::at<j>(loaded), offset);
    }
};

inline bool sums_stay_exact(const hfl_matrix& w) {
    float most = 0;
    for (int c = 0; c < 1 << w.bits; c++) most = std::max(most, std::fabs(w.table[c]));
    const int64_t in_lane = w.groups > 1 ? codes_per_lane(w) : w.columns / Simd::lanes + codes_per_lane(w);
    return static_cast<double>(in_lane) * 128 * most * w.integer_multiplier <= most_exact;
}

// Integers of these layouts.
inline bool are_exact_as_floats(const hfl_matrix& w) {
    if (!lanes_fit_groups(w) || !sums_stay_exact(w)) return false;
    if (w.packing == HFL_BASE3) return InDigits::fits(w) && w.integer_multiplier == 1;
    return 8 % w.bits != 0 && (w.bits <= 5 || w.decoder == HFL_INTEGER);
}

}  // namespace
