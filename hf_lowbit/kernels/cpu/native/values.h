// From codes in the low bits of vector lanes to float values, by the decoder the matrix names.
#pragma once
#include <algorithm>
#include <cmath>

#include "lowbit.h"
#include "unroll.h"

namespace {

inline bool is_finite(const hfl_matrix& w) {
    return std::all_of(w.table, w.table + (1 << w.bits), [](float value) { return std::isfinite(value); });
}

// Each decoder offers at<j>(words): the values of the j-th codes of all lanes, times 1 / place(j), and place(j), which
// the inputs are multiplied by (a power of two: exact); and shift(): what is left to subtract from every value, which
// products take from the inputs' sums. operator() decodes codes that lie in the low bits, completely.
template <int bits, int decoder> struct Values;

// The words of all lanes: word i * words + q, for each lane i, is in the q-th vector. They stay in registers, or are
// loaded by every shift: products with many inputs need the registers.
template <int words, bool stay> HFL_INLINE inline void load_lanes(const uint32_t* p, Simd::Int* lane) {
    Simd::Int loaded[words];
    for (int q = 0; q < words; q++) loaded[q] = Simd::template load_codes<stay>(p + q * Simd::lanes);
    repeat<words>([&](auto q) HFL_INLINE { lane[q.value] = Simd::strided<words, decltype(q)::value>(loaded); });
}

// j-th codes of all lanes, in the low bits; what lies above them is left to the decoder.
template <int bits, int j> inline Simd::Int codes_at(const Simd::Int* words) {
    constexpr int word = j * bits / 32, shift = j * bits % 32;
    const Simd::Int low = Simd::shift_right(words[word], shift);
    if constexpr (shift + bits > 32) return Simd::either(low, Simd::shift_left(words[word + 1], 32 - shift));
    return low;
}

template <int bits> struct Values<bits, HFL_TABLE> {
    typename Simd::template Table<bits> table;
    explicit Values(const hfl_matrix& w) : table(w.table) {}
    Simd::Float operator()(Simd::Int code) const { return table(code); }
    template <int j> Simd::Float at(const Simd::Int* words) const { return table(codes_at<bits, j>(words)); }
    static float place(int) { return 1.0f; }
    static float shift(const hfl_matrix&) { return 0.0f; }
};

// A constant the compiler does not know: it would make it anew at every use, from general registers.
template <class T> T hidden(T constant) {
#if defined(__GNUC__)
    asm("" : "+m"(constant));
#endif
    return constant;
}

template <int bits> struct Values<bits, HFL_INTEGER> {
    // Codes within one word are converted where they stand, except the topmost, which would be a sign.
    static constexpr bool stays(int j) { return 32 % bits == 0 && (j + 1) * bits < 32; }
    static constexpr int staying = 32 % bits == 0 ? 32 / bits - 1 : 0;

    float offset;
    Simd::Int mask[staying + 1];
    explicit Values(const hfl_matrix& w) : offset(w.integer_offset) {
        for (int j = 0; j < staying; j++) mask[j] = hidden(Simd::set_int(((1 << bits) - 1) << (j * bits)));
    }
    Simd::Float operator()(Simd::Int code) const {
        return Simd::add(Simd::to_float(Simd::both(code, (1 << bits) - 1)), Simd::set(offset));
    }
    template <int j> Simd::Float at(const Simd::Int* words) const {
        if constexpr (stays(j)) return Simd::to_float(Simd::both(words[0], mask[j]));
        const Simd::Int code = codes_at<bits, j>(words);
        return Simd::to_float(32 % bits == 0 ? code : Simd::both(code, (1 << bits) - 1));
    }
    static float place(int j) { return stays(j) ? 1.0f / static_cast<float>(1u << (j * bits)) : 1.0f; }
    static float shift(const hfl_matrix& w) { return -w.integer_offset; }
};

template <int bits> struct Values<bits, HFL_MINIFLOAT> {
    int exponent_bits;
    float factor;
    explicit Values(const hfl_matrix& w) : exponent_bits(w.exponent_bits), factor(w.minifloat_factor) {}
    Simd::Float operator()(Simd::Int code) const {
        return Simd::minifloat(Simd::shift_left(code, 32 - bits), exponent_bits, bits, factor);
    }
    template <int j> Simd::Float at(const Simd::Int* words) const {
        if constexpr (32 % bits == 0)
            return Simd::minifloat(Simd::shift_left(words[0], 32 - (j + 1) * bits), exponent_bits, bits, factor);
        return (*this)(codes_at<bits, j>(words));
    }
    static float place(int) { return 1.0f; }
    static float shift(const hfl_matrix&) { return 0.0f; }
};

// Calls use(integral constant bits, integral constant decoder): arithmetic decoders where a table takes longer.
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
