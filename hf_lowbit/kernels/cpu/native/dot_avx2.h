// int8 dot products without VNNI: |w| * sign(x, w) fits the unsigned-by-signed multiply, and 2 * 128 * 127 fits int16.
#pragma once
#include <immintrin.h>

#include "lowbit.h"

namespace {

struct Dot {
    static constexpr int lanes = 8;  // int32 sums, four bytes each
    using Int = __m256i;

    template <int bits> struct Weights {
        Int table;
        explicit Weights(const int8_t* values) {  // [2^bits]
            alignas(32) int8_t both[32];
            for (int i = 0; i < 32; i++) both[i] = bits <= 4 ? values[i & ((1 << bits) - 1)] : 0;
            table = _mm256_load_si256(reinterpret_cast<const Int*>(both));
        }
        template <int j> Int at(Int words) const {
            if constexpr (bits == 8) return _mm256_xor_si256(words, _mm256_set1_epi8(-128));  // code - 128
            const Int low = _mm256_set1_epi8((1 << bits) - 1);
            return _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(words, j * bits), low));
        }
    };
    static constexpr bool has_quads = false;
    template <int> struct Quads { static constexpr int steps = 1; };  // not used here
    static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
    template <bool> static Int load_codes(const void* p) { return load(p); }
    static Int start(const int32_t*) { return zero(); }
    static void add_start(const void*, int32_t*) {}
    static Int zero() { return _mm256_setzero_si256(); }
    static Int add(Int sum, Int w, Int x) {
        const Int pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Int sum(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static __m256 to_float(Int sum) { return _mm256_cvtepi32_ps(sum); }
};

}  // namespace
