// What state-space mixers need of eight lanes beside simd_avx2.h: conversions, rounding, powers of two, sums.
#pragma once
#include "lowbit.h"
#include "simd_avx2.h"

namespace {

struct Math {
    using Float = Simd::Float;

    template <int type> static Float load(const void* p) {
        if constexpr (type == HFL_FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(p));
        else if constexpr (type == HFL_INT8)
            return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
        else {
            const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
            if constexpr (type == HFL_FLOAT16) return _mm256_cvtph_ps(half);
            else return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        }
    }
    // int8: of -127..127, rounded to whole numbers, half to even.
    template <int type> static void store(void* p, Float a) {
        if constexpr (type == HFL_FLOAT32) _mm256_storeu_ps(static_cast<float*>(p), a);
        else if constexpr (type == HFL_INT8) {
            const __m256i whole = _mm256_cvtps_epi32(a);
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
            _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packs_epi16(words, words));
        } else _mm_storeu_si128(static_cast<__m128i*>(p), halves<type>(a));
    }
    static Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
    static Float magnitude(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    // A NaN in v stays.
    static Float at_least(float limit, Float v) { return _mm256_max_ps(Simd::set(limit), v); }
    static Float at_most(float limit, Float v) { return _mm256_min_ps(Simd::set(limit), v); }
    static Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
    static Float zero_if_nan(Float a) { return _mm256_and_ps(a, _mm256_cmp_ps(a, a, _CMP_ORD_Q)); }
    // Half to even.
    static Float round(Float a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // v less round(v); and p times two to the power of a whole number, within the range of normal floats.
    static Float fraction(Float v, Float whole) { return _mm256_sub_ps(v, whole); }
    static Float times_power(Float p, Float whole) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
        return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    }
    static Float in_range_of_powers(Float v) { return at_least(-126.0f, at_most(127.0f, v)); }

    // to[i] += the sum of the lanes of the i-th argument.
    static void add_sums(float* to, Float a, Float b, Float c, Float d) {
        const Float all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
    }

  private:
    template <int type> static __m128i halves(Float a) {
        if constexpr (type == HFL_FLOAT16) return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        const __m256i top = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    }
};

}  // namespace
