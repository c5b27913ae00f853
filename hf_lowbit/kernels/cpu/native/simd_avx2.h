// Vectors of eight lanes with AVX2, FMA, F16C and BMI2.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <utility>

namespace {

struct Simd {
    static constexpr int lanes = 8;
    static constexpr int max_batch = 4;
    static constexpr int first_arithmetic_width = 4;  // from here on arithmetic is faster than a table
    using Float = __m256;
    using Int = __m256i;

    static Float zero() { return _mm256_setzero_ps(); }
    static Float set(float v) { return _mm256_set1_ps(v); }
    static Float load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static float sum(Float a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static Float permute(Float a, Int index) { return _mm256_permutevar8x32_ps(a, index); }

    static Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static Int widen(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static Int shift_right(Int a, int n) { return _mm256_srli_epi32(a, n); }
    static Int shift_left(Int a, int n) { return _mm256_slli_epi32(a, n); }
    static Int either(Int a, Int b) { return _mm256_or_si256(a, b); }

    template <int stride, int q> static Int strided(const uint32_t* p) {
        if constexpr (stride == 1) return load_int(p);
        return gather_words<stride, q>(p, std::make_integer_sequence<int, stride>());
    }

    template <int bits> struct Table {
        Float part[bits <= 3 ? 1 : bits == 4 ? 2 : 4];
        const float* table;
        explicit Table(const float* t) : table(t) {
            float padded[32];
            constexpr int size = bits <= 3 ? 8 : bits == 4 ? 16 : 32;
            if constexpr (bits <= 5)
                for (int i = 0; i < size; i++) padded[i] = t[i & ((1 << bits) - 1)];
            if constexpr (bits <= 5)
                for (int i = 0; i < size / 8; i++) part[i] = load(padded + 8 * i);
        }
        Float operator()(Int code) const {
            if constexpr (bits <= 2) {
                return _mm256_permutevar_ps(part[0], code);
            } else if constexpr (bits == 3) {
                return permute(part[0], code);
            } else if constexpr (bits <= 5) {
                const Float bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
                const Float low = _mm256_blendv_ps(permute(part[0], code), permute(part[1], code), bit3);
                if constexpr (bits == 4) return low;
                const Float high = _mm256_blendv_ps(permute(part[2], code), permute(part[3], code), bit3);
                return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 27)));
            } else {
                return _mm256_i32gather_ps(table, _mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1)), 4);
            }
        }
    };
    template <int bits> static Float integer(Int code, float offset) {
        const Int clean = _mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1));
        return _mm256_cvtepi32_ps(_mm256_add_epi32(clean, _mm256_set1_epi32(static_cast<int>(offset))));
    }
    template <int bits> static Float minifloat(Int code, int exponent_bits, float factor) {
        const Int top = _mm256_slli_epi32(code, 32 - bits);
        const Int sign = _mm256_and_si256(top, _mm256_set1_epi32(static_cast<int>(0x80000000u)));
        const Int magnitude = _mm256_srl_epi32(_mm256_andnot_si256(sign, top), _mm_cvtsi32_si128(8 - exponent_bits));
        return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, magnitude)), set(factor));
    }

  private:
    // From source vector `source` of the block, the lanes whose word i * stride + q lies in it.
    template <int stride, int q, int source> static Int part_of(Int sofar, const uint32_t* p) {
#define HFL_INDEX(i) (((i) * stride + q) % 8)
#define HFL_HERE(i) ((((i) * stride + q) / 8 == source) << (i))
        const Int index = _mm256_setr_epi32(HFL_INDEX(0), HFL_INDEX(1), HFL_INDEX(2), HFL_INDEX(3), HFL_INDEX(4),
                                            HFL_INDEX(5), HFL_INDEX(6), HFL_INDEX(7));
        constexpr int here = HFL_HERE(0) | HFL_HERE(1) | HFL_HERE(2) | HFL_HERE(3) | HFL_HERE(4) | HFL_HERE(5) |
                             HFL_HERE(6) | HFL_HERE(7);
#undef HFL_INDEX
#undef HFL_HERE
        return _mm256_blend_epi32(sofar, _mm256_permutevar8x32_epi32(load_int(p + 8 * source), index), here);
    }
    template <int stride, int q, int... source>
    static Int gather_words(const uint32_t* p, std::integer_sequence<int, source...>) {
        Int r = _mm256_setzero_si256();
        ((r = part_of<stride, q, source>(r, p)), ...);
        return r;
    }
};

}  // namespace
