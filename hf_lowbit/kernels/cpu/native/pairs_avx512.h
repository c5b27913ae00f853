// The way of bfloat16 inputs where pairs of them are multiplied at once (AVX512-BF16; VBMI2 brings codes together).
#pragma once
#include <immintrin.h>

#include <array>

#include "float_sums.h"
#include "floats.h"
#include "geometry.h"
#include "unroll.h"
#include "values.h"

namespace {

struct PairSums : FloatSums {
    using Input = uint16_t;
    template <int M> static constexpr int chains = M == 1 ? 8 : 1;  // two for each of four rows

    HFL_INLINE static Simd::Float multiply_add(__m512i values, const float* in, Simd::Float sum) {
        const __m512i inputs = _mm512_loadu_si512(in);
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(values), reinterpret_cast<__m512bh>(inputs));
    }
    static float shift(const hfl_matrix&) { return 0.0f; }
};

// Of lanes of so many codes: the j-th code of the first half and that of the second make a pair, one above the other in 16
// bits each.
template <int codes> struct Pairs : PairSums {
    static constexpr int steps = codes / 2;

    static void arrange(const uint16_t* in, int j, float* out) {
        alignas(64) static constexpr auto first = [] {
            std::array<uint16_t, 32> at{};  // of each lane's inputs, in the 32 of the vector that holds them
            for (int e = 0; e < 32; e++) at[e] = static_cast<uint16_t>(e / 2 * codes % 32 + e % 2 * steps);
            return at;
        }();
        const __m512i at = _mm512_add_epi16(_mm512_load_si512(first.data()), _mm512_set1_epi16(static_cast<short>(j)));
        constexpr int lanes = 32 / codes;  // whose inputs fill a vector
        __m512i pairs = _mm512_setzero_si512();
        for (int v = 0; v < Simd::lanes / lanes; v++) {
            const __mmask32 here = ((1u << 2 * lanes) - 1) << 2 * lanes * v;
            pairs = _mm512_mask_permutexvar_epi16(pairs, here, at, _mm512_loadu_si512(in + 32 * v));
        }
        _mm512_storeu_si512(out, pairs);
    }
};

// A value as a bfloat16 number and what that leaves, rounded to another: sixteen significant bits. Both have its sign, and
// what is left is not zero, so that infinite inputs give what they give with the value itself.
struct SplitBfloat16 {
    uint16_t high, low;
    explicit SplitBfloat16(float value) : high(static_cast<uint16_t>(bits_of(value) >> 16)) {
        constexpr uint16_t least = 0x0080, sign = 0x8000;  // of normal numbers
        low = to_bfloat16(value - from_bfloat16(high));
        if ((low & ~sign) < least) low = static_cast<uint16_t>((high & sign) | (value != 0 ? least : 0));
    }
};

// Whether all values of the table are bfloat16 numbers.
inline bool is_bfloat16(const hfl_matrix& w) {
    bool exact = true;
    for (int i = 0; i < 1 << w.bits; i++) {
        const float value = w.table[i], rounded = from_bfloat16(to_bfloat16(value));
        exact = exact && (rounded == value || value != value);
    }
    return exact;
}

// One shift and one permutation give 32 values. For tables that bfloat16 holds exactly.
template <int bits> struct InPairs : Pairs<Lane<bits>::codes> {
    static constexpr int words = Lane<bits>::words;
    static constexpr int block_words = words * Simd::lanes;
    struct Loaded { __m512i half[words]; };  // the h-th 16 bits of the first half, and those of the second half above

    // Permutations read five bits: where these hold several codes, each has a table of its own, and they share a shift.
    static constexpr int together = bits == 1 ? 4 : bits == 2 ? 2 : 1;
    static constexpr int size = bits <= 5 ? 32 : 64, tables = together * size / 32;

    __m512i table[tables];
    explicit InPairs(const hfl_matrix& w) : InPairs(w, to_bfloat16) {}
    template <class Round> InPairs(const hfl_matrix& w, Round round) {
        alignas(64) uint16_t values[together * size];
        for (int t = 0; t < together; t++)
            for (int i = 0; i < size; i++)
                values[t * size + i] = round(w.table[(i >> t * bits) & ((1 << bits) - 1)]);
        for (int i = 0; i < tables; i++) table[i] = _mm512_load_si512(values + 32 * i);
    }
    template <int M> HFL_INLINE static Loaded load(const uint32_t* p) {
        Simd::Int lane[words];
        load_lanes<words, true>(p, lane);  // measured: for several inputs, too
        Loaded loaded;
        if constexpr (words == 1) loaded.half[0] = lane[0];
        else
            for (int h = 0; h < words; h++) {  // an odd number of words: their parities differ
                const Simd::Int low = lane[h / 2], high = lane[(h + words) / 2];
                loaded.half[h] = h % 2 ? _mm512_shrdi_epi32(low, high, 16)
                                       : _mm512_mask_mov_epi16(low, 0xAAAAAAAA, high);
            }
        return loaded;
    }
    template <int j> HFL_INLINE __m512i at(const Loaded& loaded) const {
        constexpr int half = j * bits / 16, shift = j / together * together * bits % 16;
        __m512i code;
        if constexpr (shift + bits > 16) code = _mm512_shrdi_epi16(loaded.half[half], loaded.half[half + 1], shift);
        else code = _mm512_srli_epi16(loaded.half[half], shift);
        if constexpr (bits <= 5) return _mm512_permutexvar_epi16(code, table[j % together]);  // ignores higher bits
        else return _mm512_permutex2var_epi16(table[0], code, table[1]);
    }
};

// Other tables of finite numbers: each value is two, looked up by the same shifted codes.
template <int bits> struct InSplitPairs : InPairs<bits> {
    using Whole = InPairs<bits>;
    struct Value { __m512i high, low; };

    Whole low;
    explicit InSplitPairs(const hfl_matrix& w)
        : Whole(w, [](float value) { return SplitBfloat16(value).high; }),
          low(w, [](float value) { return SplitBfloat16(value).low; }) {}
    template <int j> HFL_INLINE Value at(const typename Whole::Loaded& loaded) const {
        return {Whole::template at<j>(loaded), low.template at<j>(loaded)};
    }
    HFL_INLINE static Simd::Float multiply_add(Value value, const float* in, Simd::Float sum) {
        return Whole::multiply_add(value.low, in, Whole::multiply_add(value.high, in, sum));
    }
};

// Bytes, by tables that bfloat16 holds exactly: the two bytes of 64 such numbers are looked up one plane at a time.
struct InBytePairs : Pairs<4> {
    static constexpr int block_words = Simd::lanes;
    struct Loaded { __m512i pair[2]; };

    __m512i low[4], high[4];  // bytes of the numbers of 64 codes each
    explicit InBytePairs(const hfl_matrix& w) {
        alignas(64) uint8_t bytes[2][256];
        for (int i = 0; i < 256; i++) {
            const uint16_t value = to_bfloat16(w.table[i]);
            bytes[0][i] = static_cast<uint8_t>(value);
            bytes[1][i] = static_cast<uint8_t>(value >> 8);
        }
        for (int i = 0; i < 4; i++) {
            low[i] = _mm512_load_si512(bytes[0] + 64 * i);
            high[i] = _mm512_load_si512(bytes[1] + 64 * i);
        }
    }
    template <int M> HFL_INLINE Loaded load(const uint32_t* p) const {
        const __m512i codes = _mm512_loadu_si512(p);
        const __mmask64 upper = _mm512_movepi8_mask(codes);
        auto look_up = [&](const __m512i* table) HFL_INLINE {
            return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                          _mm512_permutex2var_epi8(table[2], codes, table[3]));
        };
        const __m512i l = look_up(low), h = look_up(high), mask = _mm512_set1_epi16(0xff);
        constexpr int choose = 0xca;  // by the first operand: the second, or the third
        return {{_mm512_ternarylogic_epi32(mask, l, _mm512_slli_epi16(h, 8), choose),
                 _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(l, 8), h, choose)}};
    }
    template <int j> HFL_INLINE static __m512i at(const Loaded& loaded) { return loaded.pair[j]; }
};

}  // namespace
