// From codes in the low bits of vector lanes to float values, by the decoder the matrix names.
#pragma once
#include "lowbit.h"

namespace {

template <int bits, int decoder> struct Values;

template <int bits> struct Values<bits, HFL_TABLE> {
    typename Simd::template Table<bits> table;
    explicit Values(const hfl_matrix& w) : table(w.table) {}
    Simd::Float operator()(Simd::Int code) const { return table(code); }
};

template <int bits> struct Values<bits, HFL_INTEGER> {
    float offset;
    explicit Values(const hfl_matrix& w) : offset(w.integer_offset) {}
    Simd::Float operator()(Simd::Int code) const { return Simd::integer<bits>(code, offset); }
};

template <int bits> struct Values<bits, HFL_MINIFLOAT> {
    int exponent_bits;
    float factor;
    explicit Values(const hfl_matrix& w) : exponent_bits(w.exponent_bits), factor(w.minifloat_factor) {}
    Simd::Float operator()(Simd::Int code) const { return Simd::minifloat<bits>(code, exponent_bits, factor); }
};

// Calls use(integral constant bits, integral constant decoder): arithmetic decoders where a table takes longer.
template <int n> struct Constant { static constexpr int value = n; };

template <int bits, class Use> void with_decoder(const hfl_matrix& w, Use use) {
    if constexpr (bits >= Simd::first_arithmetic_width) {
        if (w.decoder == HFL_INTEGER) return use(Constant<bits>(), Constant<HFL_INTEGER>());
        if (w.decoder == HFL_MINIFLOAT) return use(Constant<bits>(), Constant<HFL_MINIFLOAT>());
    }
    use(Constant<bits>(), Constant<HFL_TABLE>());
}

template <class Use> void with_values(const hfl_matrix& w, Use use) {
    switch (w.bits) {
        case 1: return with_decoder<1>(w, use);
        case 2: return with_decoder<2>(w, use);
        case 3: return with_decoder<3>(w, use);
        case 4: return with_decoder<4>(w, use);
        case 5: return with_decoder<5>(w, use);
        case 6: return with_decoder<6>(w, use);
        case 7: return with_decoder<7>(w, use);
        default: return with_decoder<8>(w, use);
    }
}

}  // namespace
