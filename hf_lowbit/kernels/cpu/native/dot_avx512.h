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
