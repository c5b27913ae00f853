// Vectors of eight lanes with AVX2, FMA, F16C and BMI2.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <utility>

namespace {

struct Simd {
    static constexpr int lanes = 8;
    static constexpr int max_batch = 4;
    static constexpr int max_batch_of_integers = 4;  // that meet as floats: more take too long to compile
    static constexpr int rows_together = 1;  // of one input, in registers
    static constexpr int first_arithmetic_width = 4;  // from here on arithmetic is faster than a table
    using Float = __m256;
    using Int = __m256i;

    static Float zero() { return _mm256_setzero_ps(); }
    static Float set(float v) { return _mm256_set1_ps(v); }
    static Float load(const float* p) { return _mm256_loadu_ps(p); }
    static Float load_halves(const uint16_t* p, bool are_bfloat16) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if (!are_bfloat16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static Float set_half(const uint16_t* p, bool is_bfloat16) {
        const Int halves = _mm256_set1_epi16(static_cast<int16_t>(*p));
        if (!is_bfloat16) return _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
        return _mm256_castsi256_ps(both(halves, static_cast<int>(0xffff0000)));
    }
    static Float pick_bfloat16(const uint16_t* p, Int at) { return permute(load_halves(p, true), at); }
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
    // The sum of each of eight vectors.
    static Float sums(const Float* a) {
        const Float low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
        const Float high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
        return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    }
    static Float permute(Float a, Int index) { return _mm256_permutevar8x32_ps(a, index); }

    static Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static Int widen(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static Int shift_right(Int a, int n) { return _mm256_srli_epi32(a, n); }
    static Int shift_left(Int a, int n) { return _mm256_slli_epi32(a, n); }
    static Int either(Int a, Int b) { return _mm256_or_si256(a, b); }

    template <bool> static Int load_codes(const void* p) { return load_int(p); }
    template <int stride, int q> static Int strided(const Int* words) {
        if constexpr (stride == 1) return words[0];
        return gather_words<stride, q>(words, std::make_integer_sequence<int, stride>());
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
    // Of values below 2^16: a * b / 2^16.
    static Int high_product(Int a, int b) { return _mm256_mulhi_epu16(a, _mm256_set1_epi32(b)); }
    static Int set_int(int v) { return _mm256_set1_epi32(v); }
    static Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
    static Int both(Int a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi32(mask)); }
    static Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
    // Codes in the topmost bits: sign, exponent, mantissa; the garbage below them must be masked away.
    static Float minifloat(Int top, int exponent_bits, int bits, float factor) {
        // The arithmetic shift brings the exponent to where float32 has it, and copies of the sign above it.
        const int keep = static_cast<int>(0x80000000u | ((1u << (bits - 1)) - 1) << (24 + exponent_bits - bits));
        const Int placed = _mm256_sra_epi32(top, _mm_cvtsi32_si128(8 - exponent_bits));
        return _mm256_mul_ps(_mm256_castsi256_ps(both(placed, keep)), set(factor));
    }

    // 4-bit codes by table, the four bytes of the floats looked up one plane at a time: several times faster than
    // permuting floats. Decodes a block of eight words; value (j, lane) is that of code plane_position(j, lane).
    struct Planes {
        Int plane[4];
        explicit Planes(const float* table) {
            alignas(32) uint8_t bytes[32];
            for (int k = 0; k < 4; k++) {
                for (int i = 0; i < 32; i++) bytes[i] = reinterpret_cast<const uint8_t*>(table + (i & 15))[k];
                plane[k] = _mm256_load_si256(reinterpret_cast<const Int*>(bytes));
            }
        }
        void operator()(Int words, Float* out) const {
            const Int low = _mm256_set1_epi8(15);
            half(_mm256_and_si256(words, low), out);
            half(_mm256_and_si256(_mm256_srli_epi16(words, 4), low), out + 4);
        }

      private:
        void half(Int codes, Float* out) const {
            const Int b0 = _mm256_shuffle_epi8(plane[0], codes), b1 = _mm256_shuffle_epi8(plane[1], codes);
            const Int b2 = _mm256_shuffle_epi8(plane[2], codes), b3 = _mm256_shuffle_epi8(plane[3], codes);
            const Int low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
            const Int low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
            out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
            out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
            out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23));
            out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23));
        }
    };
    static constexpr bool has_planes = true;
    static constexpr int plane_position(int j, int lane) { return 2 * (lane / 4 * 16 + j % 4 * 4 + lane % 4) + j / 4; }

  private:
    // From source vector `source` of the block, the lanes whose word i * stride + q lies in it.
    template <int stride, int q, int source> static Int part_of(Int sofar, const Int* words) {
#define HFL_INDEX(i) (((i) * stride + q) % 8)
#define HFL_HERE(i) ((((i) * stride + q) / 8 == source) << (i))
        const Int index = _mm256_setr_epi32(HFL_INDEX(0), HFL_INDEX(1), HFL_INDEX(2), HFL_INDEX(3), HFL_INDEX(4),
                                            HFL_INDEX(5), HFL_INDEX(6), HFL_INDEX(7));
        constexpr int here = HFL_HERE(0) | HFL_HERE(1) | HFL_HERE(2) | HFL_HERE(3) | HFL_HERE(4) | HFL_HERE(5) |
                             HFL_HERE(6) | HFL_HERE(7);
#undef HFL_INDEX
#undef HFL_HERE
        return _mm256_blend_epi32(sofar, _mm256_permutevar8x32_epi32(words[source], index), here);
    }
    template <int stride, int q, int... source>
    static Int gather_words(const Int* words, std::integer_sequence<int, source...>) {
        Int r = _mm256_setzero_si256();
        ((r = part_of<stride, q, source>(r, words)), ...);
        return r;
    }
};

}  // namespace
