// int8 dot products with VNNI: weights are made unsigned by adding 128, which the inputs' sums take away again.
#pragma once
#include <immintrin.h>

#include "simd_avx512.h"

namespace {

struct Dot {
    static constexpr int lanes = 16;  // int32 sums, four bytes each
    using Int = __m512i;

    template <int bits> struct Weights {
        Int table;
        explicit Weights(const int8_t* values) {
            alignas(64) uint8_t all[64];
            for (int i = 0; i < 64; i++)
                all[i] = bits <= 4 ? static_cast<uint8_t>(values[i & ((1 << bits) - 1)] + 128) : 0;
            table = _mm512_load_si512(all);
        }
        template <int j> Int at(Int words) const {
            if constexpr (bits == 8) return words;  // code - 128 + 128
            return _mm512_permutexvar_epi8(_mm512_srli_epi16(words, j * bits), table);  // the same for any higher bits
        }
    };

    static constexpr bool has_quads = true;
    // Of widths that cross bytes: four codes in every lane, each in the low bits of a byte, as unsigned weights.
    template <int bits> struct QuadTable {
        Int table[bits == 7 ? 2 : 1];
        explicit QuadTable(const int8_t* values) {
            alignas(64) uint8_t all[128];
            for (int i = 0; i < 128; i++) all[i] = static_cast<uint8_t>(values[i & ((1 << bits) - 1)] + 128);
            for (int i = 0; i < (bits == 7 ? 2 : 1); i++) table[i] = _mm512_load_si512(all + 64 * i);
        }
        Int look_up(Int codes) const {  // the same for any higher bits
            if constexpr (bits == 7) return _mm512_permutex2var_epi8(table[0], codes, table[1]);
            return _mm512_permutexvar_epi8(codes, table[0]);
        }
    };
    // Codes that lie side by side, four to a lane and step: 64, or 128 where a lane's are within 32 bits.
    template <int bits> struct Quads : QuadTable<bits> {
        static constexpr int steps = bits == 3 ? 2 : 1;
        Int bytes, offsets[steps];  // of each lane's codes; of each code, in bits, in pairs of lanes
        explicit Quads(const int8_t* values) : QuadTable<bits>(values) {
            alignas(64) uint8_t from[64], by[steps][64];
            for (int e = 0; e < 64; e++) {
                const int first = e / 4 * steps * 4 * bits;
                from[e] = static_cast<uint8_t>(first / 8 + e % 4);
                for (int j = 0; j < steps; j++)
                    by[j][e] = static_cast<uint8_t>(e % 8 / 4 * 32 + first % 8 + (4 * j + e % 4) * bits);
            }
            bytes = _mm512_load_si512(from);
            for (int j = 0; j < steps; j++) offsets[j] = _mm512_load_si512(by[j]);
        }
        Int load(const void* p) const {
            return _mm512_permutexvar_epi8(bytes, _mm512_maskz_loadu_epi32((1u << 2 * bits * steps) - 1, p));
        }
        template <int j> Int at(Int codes) const {
            return this->look_up(_mm512_multishift_epi64_epi8(offsets[j], codes));
        }
    };
    // 64 codes of each lane, whose words lie in as many vectors.
    template <int bits> struct QuadsOfRows : QuadTable<bits> {
        Int offsets;
        explicit QuadsOfRows(const int8_t* values) : QuadTable<bits>(values) {
            alignas(64) uint8_t by[64];
            for (int e = 0; e < 64; e++) by[e] = static_cast<uint8_t>(e % 8 / 4 * 32 + e % 4 * bits);
            offsets = _mm512_load_si512(by);
        }
        template <int k> Int at(const Int* words) const {
            constexpr int word = 4 * k * bits / 32, shift = 4 * k * bits % 32;
            Int codes = _mm512_srli_epi32(words[word], shift);
            if constexpr (shift + 4 * bits > 32) codes = _mm512_or_si512(codes, _mm512_slli_epi32(words[word + 1], 32 - shift));
            return this->look_up(_mm512_multishift_epi64_epi8(offsets, codes));
        }
    };

    static Int load(const void* p) { return _mm512_loadu_si512(p); }
    template <bool stay> static Int load_codes(const void* p) { return Simd::template load_codes<stay>(p); }
    // -128 * (sum of the inputs of each lane), to which add_start adds that of more inputs.
    static Int start(const int32_t* minus_sums) { return _mm512_loadu_si512(minus_sums); }
    static void add_start(const void* inputs, int32_t* minus_sums) {
        const Int sums = _mm512_dpbusd_epi32(zero(), _mm512_set1_epi8(-128), load(inputs));
        _mm512_storeu_si512(minus_sums, _mm512_sub_epi32(start(minus_sums), sums));
    }
    static Int zero() { return _mm512_setzero_si512(); }
    static Int add(Int sum, Int w, Int x) {
#if defined(__GNUC__)
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "vm"(x));  // by its intrinsic GCC 12 spills sums
        return sum;
#else
        return _mm512_dpbusd_epi32(sum, w, x);
#endif
    }
    static Int sum(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static __m512 to_float(Int sum) { return _mm512_cvtepi32_ps(sum); }
};

}  // namespace
