// Thirty-two consecutive codes, decoded to the bfloat16 values that decoding the whole row would give.
#pragma once
#include <immintrin.h>

#include "values.h"

namespace {

// A decoder offers words: how many hold the codes; group(scale, zero): what the next codes are multiplied by and have
// subtracted; operator()(words): 32 values; pair(k): which pair of codes the k-th two of them are.

// Widths up to six: the table of a group holds finished weights.
template <int bits> struct ChunkTable {
    static constexpr int words = bits, size = bits <= 4 ? 16 : 1 << bits, parts = size / 16;
    // Four whole codes in 16 bits: those of a 64-bit word are shifted out of it, the words being repeated. Other widths:
    // the two bytes that hold a code are brought together. What comes beside a code the tables do not look at.
    static constexpr bool repeats = 16 % bits == 0;

    __m512 base[parts];
    __m512i table[parts < 2 ? 1 : parts / 2], bytes, shifts;

    explicit ChunkTable(const hfl_matrix& w) {
        alignas(64) float values[size];
        for (int i = 0; i < size; i++) values[i] = w.table[i & ((1 << bits) - 1)];
        for (int i = 0; i < parts; i++) base[i] = _mm512_load_ps(values + 16 * i);
        alignas(64) uint8_t from[64];
        alignas(64) uint16_t by[32];
        for (int e = 0; e < 32; e++) {
            const int bit = (bits == 4 ? e / 8 * 4 + e % 4 : e) * bits;
            from[2 * e] = static_cast<uint8_t>(repeats ? bit : bit / 8);
            from[2 * e + 1] = static_cast<uint8_t>(repeats ? bit : bit / 8 + 1);
            by[e] = static_cast<uint16_t>(bit % 8);
        }
        bytes = _mm512_load_si512(from);
        shifts = _mm512_load_si512(by);
    }
    static int pair(int k) { return bits == 4 ? k / 2 % 2 * 8 + k / 4 * 2 + k % 2 : k; }

    HFL_INLINE void group(float scale, const float* zero) {
        const __m512 factor = _mm512_set1_ps(scale);
        __m512 value[parts];
        for (int i = 0; i < parts; i++) {
            value[i] = zero ? _mm512_sub_ps(base[i], _mm512_set1_ps(*zero)) : base[i];
            value[i] = _mm512_mul_ps(value[i], factor);
        }
        if constexpr (parts == 1) table[0] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value[0], value[0]));
        else
            for (int i = 0; i < parts; i += 2)
                table[i / 2] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(value[i + 1], value[i]));
    }
    HFL_INLINE __m512i operator()(const uint32_t* p) const {
        const __m512i codes = repeats ? _mm512_multishift_epi64_epi8(bytes, load(p)) : _mm512_srlv_epi16(load(p), shifts);
        if constexpr (bits <= 5) return _mm512_permutexvar_epi16(codes, table[0]);
        else return _mm512_permutex2var_epi16(table[0], codes, table[1]);
    }

  private:
    HFL_INLINE __m512i load(const uint32_t* p) const {
        if constexpr (bits == 1) return _mm512_set1_epi32(static_cast<int>(*p));
        if constexpr (bits == 2) {
            int64_t two;
            std::memcpy(&two, p, 8);
            return _mm512_set1_epi64(two);
        }
        if constexpr (bits == 4)
            return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        constexpr uint8_t here = (1u << bits) - 1;  // of as small a vector as holds them: it crosses fewer cache lines
        __m512i all;
        if constexpr (bits <= 4) all = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(here, p));
        else all = _mm512_castsi256_si512(_mm256_maskz_loadu_epi32(here, p));
        return _mm512_permutexvar_epi8(bytes, all);
    }
};

// Bytes, by arithmetic.
template <int decoder> struct ChunkBytes {
    static constexpr int words = 8;

    Values<8, decoder> values;
    __m512 scale, zero;
    bool shifted;

    explicit ChunkBytes(const hfl_matrix& w) : values(w) {}
    static int pair(int k) { return k; }
    HFL_INLINE void group(float by, const float* less) {
        scale = _mm512_set1_ps(by);
        shifted = less != nullptr;
        zero = _mm512_set1_ps(less ? *less : 0.0f);
    }
    HFL_INLINE __m512i operator()(const uint32_t* p) const {
        const uint8_t* codes = reinterpret_cast<const uint8_t*>(p);
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(half(codes + 16), half(codes)));
    }

  private:
    HFL_INLINE __m512 half(const uint8_t* codes) const {
        const __m512 value = values(Simd::widen(codes));
        return _mm512_mul_ps(shifted ? _mm512_sub_ps(value, zero) : value, scale);
    }
};

// Calls use(Type<a decoder>) and returns true, or false for layouts that have none.
template <class Use> bool with_chunks(const hfl_matrix& w, Use use) {
    if (w.packing != HFL_DENSE || w.columns % 32 || w.columns / w.groups % 32) return false;
    switch (w.bits) {
        case 1: return use(Type<ChunkTable<1>>()), true;
        case 2: return use(Type<ChunkTable<2>>()), true;
        case 3: return use(Type<ChunkTable<3>>()), true;
        case 4: return use(Type<ChunkTable<4>>()), true;
        case 5: return use(Type<ChunkTable<5>>()), true;
        case 6: return use(Type<ChunkTable<6>>()), true;
        case 8:
            if (w.decoder == HFL_INTEGER) return use(Type<ChunkBytes<HFL_INTEGER>>()), true;
            if (w.decoder == HFL_MINIFLOAT) return use(Type<ChunkBytes<HFL_MINIFLOAT>>()), true;
            return false;
        default: return false;
    }
}

}  // namespace
