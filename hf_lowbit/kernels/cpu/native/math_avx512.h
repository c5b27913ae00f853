// What state-space mixers need of sixteen lanes beside simd_avx512.h: conversions, rounding, powers of two, sums.
#pragma once
#include "lowbit.h"
#include "simd_avx512.h"

namespace {

struct Math {
    using Float = Simd::Float;

    template <int type> static Float load(const void* p) {
        if constexpr (type == HFL_FLOAT32) return _mm512_loadu_ps(p);
        else if constexpr (type == HFL_INT8)
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
        else {
            const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
            if constexpr (type == HFL_FLOAT16) return _mm512_cvtph_ps(half);
            else return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
    }
    // int8: of -127..127, rounded to whole numbers, half to even.
    template <int type> static void store(void* p, Float a) {
        if constexpr (type == HFL_FLOAT32) _mm512_storeu_ps(p, a);
        else if constexpr (type == HFL_INT8)
            _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
        else _mm256_storeu_si256(static_cast<__m256i*>(p), halves<type>(a));
    }
    static Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
    static Float magnitude(Float a) { return _mm512_abs_ps(a); }
    // A NaN in v stays.
    static Float at_least(float limit, Float v) { return _mm512_max_ps(Simd::set(limit), v); }
    static Float at_most(float limit, Float v) { return _mm512_min_ps(Simd::set(limit), v); }
    static Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
    static Float zero_if_nan(Float a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a); }
    // Half to even.
    static Float round(Float a) { return _mm512_roundscale_ps(a, 0); }
    // v less round(v), 0 of infinities; and p times two to the power of a whole number.
    static Float fraction(Float v, Float) { return _mm512_reduce_ps(v, 0); }
    static Float times_power(Float p, Float whole) { return _mm512_scalef_ps(p, whole); }
    static Float in_range_of_powers(Float v) { return v; }

    // to[i] += the sum of the lanes of the i-th argument.
    static void add_sums(float* to, Float a, Float b, Float c, Float d) {
        const Float ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const Float cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const Float all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
    }

  private:
    template <int type> static __m256i halves(Float a) {
        if constexpr (type == HFL_FLOAT16) return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512i bits = _mm512_castps_si512(a);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
    }
};

}  // namespace
