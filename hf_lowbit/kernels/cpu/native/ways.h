// The ways in which a block of codes meets its inputs: which codes come out of the words together, and so in what
// order the inputs have to lie.
//
// A way offers
//   lanes, lane_codes(w): how many runs of codes that share a scale a block has, and of how many codes;
//   steps, block_words: in how many steps they come out of the block's words, and the number of these;
//   max_batch: the most inputs of a pass;
//   Input: float, uint16_t for bfloat16 numbers as they are, or int8_t for codes;
//   arrange(in, j, out): the inputs of the j-th codes of all lanes, from a block's inputs in their own order;
//   load<M>(words), at<j>(loaded): the j-th values of all lanes, for M inputs;
//   Sum, zero(), add(a, b), to_float(sum): 16 or 8 floats, or integers (is_integer; see int8.h);
//   multiply_add(values, in, sum): values times such inputs, added to a sum;
//   chains<M>: how many sums for each of M inputs, side by side;
//   shift(w): what is left to subtract from every value, which products take from the inputs' sums.
#pragma once
#include <algorithm>

#include "float_sums.h"
#include "geometry.h"
#include "values.h"

namespace {

struct OneFloat : FloatSums {
    using Input = float;
    // Additions to one sum wait for each other: a few sums side by side keep the multipliers busy.
    template <int M> static constexpr int chains = M == 1 ? std::max(4, 2 * Simd::rows_together) : M <= 4 ? 2 : 1;
    HFL_INLINE static Simd::Float multiply_add(Simd::Float value, const float* in, Simd::Float sum) {
        return Simd::multiply_add(value, Simd::load(in), sum);
    }
};

// One float per lane and step: for every width and decoder.
template <int bits, int decoder> struct InLanes : OneFloat {
    using V = Values<bits, decoder>;
    static constexpr int words = Lane<bits>::words, steps = Lane<bits>::codes, block_words = words * Simd::lanes;
    struct Loaded { Simd::Int lane[words]; };

    V values;
    explicit InLanes(const hfl_matrix& w) : values(w) {}
    template <class Number> static void arrange(const Number* in, int j, float* out) {
        for (int i = 0; i < Simd::lanes; i++) out[i] = V::place(j) * in[i * steps + j];
    }
    template <int M> HFL_INLINE static Loaded load(const uint32_t* p) {
        Loaded loaded;
        load_lanes<words, M == 1>(p, loaded.lane);
        return loaded;
    }
    template <int j> HFL_INLINE Simd::Float at(const Loaded& loaded) const { return values.template at<j>(loaded.lane); }
    static float shift(const hfl_matrix& w) { return V::shift(w); }
};

// 4-bit tables, the bytes of the floats looked up a plane at a time.
struct InPlanes : InLanes<4, HFL_TABLE> {
    struct Loaded { Simd::Float value[8]; };

    typename Simd::Planes planes;
    explicit InPlanes(const hfl_matrix& w) : InLanes(w), planes(w.table) {}
    static void arrange(const float* in, int j, float* out) {
        for (int i = 0; i < Simd::lanes; i++) out[i] = in[Simd::plane_position(j, i)];
    }
    template <int M> HFL_INLINE Loaded load(const uint32_t* p) const {
        Loaded loaded;
        planes(Simd::load_int(p), loaded.value);
        return loaded;
    }
    template <int j> HFL_INLINE static Simd::Float at(const Loaded& loaded) { return loaded.value[j]; }
};

// Base 3, five digits in a byte and a byte in a lane: digit j is b / 3^j - 3 * (b / 3^(j + 1)), exact in floats.
struct InDigits : OneFloat {
    static constexpr int steps = 5, block_words = Simd::lanes / 4;
    struct Loaded { Simd::Float quotient[5]; };

    explicit InDigits(const hfl_matrix&) {}
    static bool fits(const hfl_matrix& w) {  // values are digits and an offset
        return w.table[1] - w.table[0] == 1.0f && w.table[2] - w.table[1] == 1.0f;
    }
    template <class Number> static void arrange(const Number* in, int j, float* out) {
        for (int i = 0; i < Simd::lanes; i++) out[i] = in[i * steps + j];
    }
    template <int M> HFL_INLINE static Loaded load(const uint32_t* p) {
        constexpr int reciprocals[] = {0, 21846, 7282, 2428, 810};  // of 3^j, rounded up: exact quotients of a byte
        const Simd::Int bytes = Simd::widen(reinterpret_cast<const uint8_t*>(p));
        Loaded loaded;
        loaded.quotient[0] = Simd::to_float(bytes);
        repeat<4>([&](auto j) HFL_INLINE {
            loaded.quotient[j.value + 1] = Simd::to_float(Simd::high_product(bytes, reciprocals[j.value + 1]));
        });
        return loaded;
    }
    template <int j> HFL_INLINE static Simd::Float at(const Loaded& loaded) {
        if constexpr (j == 4) return loaded.quotient[4];
        else return Simd::multiply_add(loaded.quotient[j + 1], Simd::set(-3.0f), loaded.quotient[j]);
    }
    static float shift(const hfl_matrix& w) { return -w.table[0]; }
};

// Calls use(Type<a way>) with the best way for this matrix.
template <class Use> void with_way(const hfl_matrix& w, Use use) {
    if (w.packing == HFL_BASE3) return use(Type<InDigits>());
    with_values(w, [&](auto bits, auto decoder) {
        constexpr int width = decltype(bits)::value, by = decltype(decoder)::value;
        if constexpr (Simd::has_planes && width == 4 && by == HFL_TABLE) use(Type<InPlanes>());
        else use(Type<InLanes<width, by>>());
    });
}

}  // namespace
