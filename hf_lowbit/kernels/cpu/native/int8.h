// Products of int8 inputs with packed integer values: sums of integers within a group, scaled by the group, then by the
// input; or by the groups of both, where inputs have as many scales each as rows.
#pragma once
#include <cmath>
#include <type_traits>

#include "gemv.h"
#include "integers_as_floats.h"

namespace {

constexpr int64_t most_summed_columns = 1 << 20;  // of one scale: sums of 127 * 128 fit into 32 bits

// Widths whose codes do not cross bytes, groups of whole lanes (four bytes).
inline bool lie_in_bytes(const hfl_matrix& w) {
    return w.packing == HFL_DENSE && 8 % w.bits == 0 && lanes_fit_groups(w) && (w.bits < 8 || w.decoder == HFL_INTEGER);
}

// Other widths, groups of whole lanes (eight or four codes).
inline bool lie_in_quads(const hfl_matrix& w) {
    const int codes = 4 * (w.bits == 3 ? Dot::Quads<3>::steps : 1);
    return Dot::has_quads && w.packing == HFL_DENSE && 8 % w.bits != 0 &&
           (w.groups == 1 || w.columns / w.groups % codes == 0);
}

// Tables that are integers, in these layouts.
inline int multiplies_int8(const hfl_matrix* w) {
    if (w->integer_multiplier <= 0) return false;
    if (lie_in_bytes(*w) || lie_in_quads(*w)) return w->columns / w->groups <= most_summed_columns;
    return are_exact_as_floats(*w);
}

// A decoder of bytes from the integers that a matrix' table stands for.
template <int bits, class Weights> Weights integer_weights(const hfl_matrix& w) {
    int8_t values[1 << bits];
    for (int c = 0; c < (1 << bits); c++)
        values[c] = static_cast<int8_t>(std::lround(w.table[c] * static_cast<float>(w.integer_multiplier)));
    return Weights(values);
}

// What ways have in common whose values are bytes: four to a lane; inputs of one scale, or with groups.
template <bool grouped> struct CodeSums {
    using Input = int8_t;
    using Sum = Dot::Int;
    static constexpr bool is_integer = true, has_input_groups = grouped;
    static constexpr int lanes = Dot::lanes, max_batch = Simd::max_batch;
    template <int M> static constexpr int chains = 1;
    static_assert(Dot::lanes == Simd::lanes, "scales are vectors of floats");

    static void add_start(const float* in, int32_t* start) { Dot::add_start(in, start); }
    HFL_INLINE static Sum start(const int32_t* p) { return Dot::start(p); }
    HFL_INLINE static Sum zero() { return Dot::zero(); }
    HFL_INLINE static Sum add(Sum a, Sum b) { return Dot::sum(a, b); }
    HFL_INLINE static Simd::Float to_float(Sum a) { return Dot::to_float(a); }
    HFL_INLINE static Sum multiply_add(Sum values, const float* in, Sum sum) {
        return Dot::add(sum, values, Dot::load(in));
    }
    static float shift(const hfl_matrix&) { return 0.0f; }
};

// In each step the codes at one place in their bytes.
template <int bits, bool grouped> struct InBytes : CodeSums<grouped> {
    using Sum = Dot::Int;
    using Weights = typename Dot::template Weights<bits>;
    static constexpr int steps = 8 / bits, block_words = Dot::lanes;

    Weights weights;
    explicit InBytes(const hfl_matrix& w) : weights(integer_weights<bits, Weights>(w)) {}

    static int lane_codes(const hfl_matrix&) { return 32 / bits; }
    static void arrange(const int8_t* in, int j, float* out) {
        int8_t bytes[4 * Dot::lanes];
        for (int k = 0; k < 4 * Dot::lanes; k++) bytes[k] = in[k * steps + j];
        std::memcpy(out, bytes, sizeof bytes);
    }
    template <int M> HFL_INLINE static Sum load(const uint32_t* p) { return Dot::template load_codes<M == 1>(p); }
    template <int j> HFL_INLINE Sum at(Sum words) const { return weights.template at<j>(words); }
};

// In each step four neighbours, where codes cross bytes.
template <int bits, bool grouped> struct InQuads : CodeSums<grouped> {
    using Sum = Dot::Int;
    using Weights = typename Dot::template Quads<bits>;
    static constexpr int steps = Weights::steps, block_words = Dot::lanes * bits / 8 * steps;

    Weights weights;
    explicit InQuads(const hfl_matrix& w) : weights(integer_weights<bits, Weights>(w)) {}

    static int lane_codes(const hfl_matrix&) { return 4 * steps; }
    static void arrange(const int8_t* in, int j, float* out) {
        for (int i = 0; i < Dot::lanes; i++) std::memcpy(out + i, in + (i * steps + j) * 4, 4);
    }
    template <int M> HFL_INLINE Sum load(const uint32_t* p) const { return weights.load(p); }
    template <int j> HFL_INLINE Sum at(Sum words) const { return weights.template at<j>(words); }
};

template <int bits, bool grouped>
using AcrossBytes = std::conditional_t<Dot::has_quads, InQuads<bits, grouped>, IntegersInLanes<bits>>;

template <bool grouped, class Use> void with_code_way(const hfl_matrix& w, Use use) {
    if (w.packing == HFL_BASE3) return use(Type<IntegersInDigits>());
    switch (w.bits) {
        case 1: return use(Type<InBytes<1, grouped>>());
        case 2: return use(Type<InBytes<2, grouped>>());
        case 3: return use(Type<AcrossBytes<3, grouped>>());
        case 4: return use(Type<InBytes<4, grouped>>());
        case 5: return use(Type<AcrossBytes<5, grouped>>());
        case 6: return use(Type<AcrossBytes<6, grouped>>());
        case 7: return use(Type<AcrossBytes<7, grouped>>());
        default: return use(Type<InBytes<8, grouped>>());
    }
}

inline int linear_int8(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale,
                       int64_t x_groups, int64_t m, int type, void* const* y, int threads) {
    for (int i = 0; i < count; i++)
        if (!multiplies_int8(matrices[i]) || (x_groups != 1 && x_groups != matrices[i]->groups)) return -1;
    multiply_matrices(
        matrices, count, m, y, type, threads, [](int) { return true; },
        [&](int i, int k) { return matrices[k]->packing == matrices[i]->packing; },
        [&](int i, auto use) {
            if (x_groups > 1 && matrices[i]->groups > 1) with_code_way<true>(*matrices[i], use);
            else with_code_way<false>(*matrices[i], use);
        },
        [&](auto way, const hfl_matrix& w, const Geometry& geometry) {
            return Inputs(way, w, geometry, x, HFL_INT8, m, w.columns, {x_scale, x_groups});
        },
        [](int, int64_t, int64_t, void*) {});
    return 0;
}

}  // namespace
