// Vectors of sixteen lanes with AVX-512 (F, BW, VL, DQ).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "floats.h"

namespace {

struct Simd {
    static constexpr int lanes = 16;
    static constexpr int max_batch = 8;
    static constexpr int max_batch_of_integers = 4;  // that meet as floats: more take too long to compile
    static constexpr int rows_together = 4;  // of one input, in registers
    static constexpr int first_arithmetic_width = 6;  // from here on arithmetic is faster than a table
    using Float = __m512;
    using Int = __m512i;

    static Float zero() { return _mm512_setzero_ps(); }
    static Float set(float v) { return _mm512_set1_ps(v); }
    static Float load(const float* p) { return _mm512_loadu_ps(p); }
    static Float load_halves(const uint16_t* p, bool are_bfloat16) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        if (!are_bfloat16) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static Float set_half(const uint16_t* p, bool is_bfloat16) {
        const Int halves = _mm512_set1_epi16(static_cast<int16_t>(*p));
        if (!is_bfloat16) return _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        return _mm512_castsi512_ps(both(halves, static_cast<int>(0xffff0000)));
    }
    static Float pick_bfloat16(const uint16_t* p, Int at) {
        const Int halves = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, _mm512_slli_epi32(at, 16), halves));
    }
    static void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(Float a) { return _mm512_reduce_add_ps(a); }
    // The sum of each of sixteen vectors.
    static Float sums(const Float* a) {
        Float pair[8], four[4];
        for (int i = 0; i < 8; i++)
            pair[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
        for (int i = 0; i < 4; i++) {
            const __m512d low = _mm512_castps_pd(pair[2 * i]), high = _mm512_castps_pd(pair[2 * i + 1]);
            four[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
        }
        auto add_lanes = [](Float x, Float y) {
            return add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
        };
        return add_lanes(add_lanes(four[0], four[1]), add_lanes(four[2], four[3]));
    }
    static Float permute(Float a, Int index) { return _mm512_permutexvar_ps(index, a); }

    static Int load_int(const void* p) { return _mm512_loadu_si512(p); }
    static Int widen(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Int shift_right(Int a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
    static Int shift_left(Int a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
    static Int either(Int a, Int b) { return _mm512_or_si512(a, b); }

    // By itself the compiler makes every shift load codes again, which takes longer where memory is what loops wait for.
    template <bool stay> static Int load_codes(const void* p) {
        Int codes = load_int(p);
#if defined(__GNUC__)
        if constexpr (stay) asm("" : "+v"(codes));
#endif
        return codes;
    }
    template <int stride, int q> static Int strided(const Int* words) {
        if constexpr (stride == 1) return words[0];
        else return gather_words<stride, q>(words, std::make_integer_sequence<int, stride - 2>());
    }

    template <int bits> struct Table {
        Float part[bits <= 4 ? 1 : bits == 5 ? 2 : 4];
        const float* table;
        explicit Table(const float* t) : table(t) {
            constexpr int size = bits <= 4 ? 16 : bits == 5 ? 32 : 64;
            if constexpr (bits <= 6) {
                float padded[size];
                for (int i = 0; i < size; i++) padded[i] = t[i & ((1 << bits) - 1)];
                for (int i = 0; i < size / 16; i++) part[i] = load(padded + 16 * i);
            }
        }
        Float operator()(Int code) const {
            if constexpr (bits <= 4) return permute(part[0], code);
            else if constexpr (bits == 5) return _mm512_permutex2var_ps(part[0], code, part[1]);
            else if constexpr (bits == 6) {
                const __mmask16 bit5 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
                return _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(part[0], code, part[1]),
                                            _mm512_permutex2var_ps(part[2], code, part[3]));
            } else {
                return _mm512_i32gather_ps(_mm512_and_si512(code, _mm512_set1_epi32((1 << bits) - 1)), table, 4);
            }
        }
    };
    // Of values below 2^16: a * b / 2^16.
    static Int high_product(Int a, int b) { return _mm512_mulhi_epu16(a, _mm512_set1_epi32(b)); }
    static Int set_int(int v) { return _mm512_set1_epi32(v); }
    static Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
    static Int both(Int a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
    static Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
    // Codes in the topmost bits: sign, exponent, mantissa; the garbage below them must be masked away. Subnormal codes
    // would be subnormal floats, which take these processors a hundred cycles: they are made from the next exponent.
    static Float minifloat(Int top, int exponent_bits, int bits, float factor) {
        const unsigned keep = ((1u << (bits - 1)) - 1) << (24 + exponent_bits - bits);
        const unsigned exponents = ((1u << exponent_bits) - 1) << 23;
        const Int placed = _mm512_sra_epi32(top, _mm_cvtsi32_si128(8 - exponent_bits));
        const Int magnitude = both(placed, static_cast<int>(keep));
        const int bias = static_cast<int>(bits_of(factor)) - 0x3f800000;  // the factor is a power of two
        const Float normal = _mm512_castsi512_ps(_mm512_add_epi32(magnitude, _mm512_set1_epi32(bias)));
        const __mmask16 small = _mm512_testn_epi32_mask(magnitude, _mm512_set1_epi32(static_cast<int>(exponents)));
        const Float one = _mm512_castsi512_ps(_mm512_set1_epi32(bias + 0x800000));
        const Float value = _mm512_mask_fmsub_ps(normal, small, set(2.0f), one);
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
            _mm512_set1_epi32(static_cast<int>(0x80000000u)), placed,
            _mm512_castps_si512(value), 0xca));
    }
    struct Planes { explicit Planes(const float*) {} void operator()(Int, Float*) const {} };  // not used here
    static constexpr bool has_planes = false;
    static constexpr int plane_position(int, int) { return 0; }

  private:
    // The first two vectors at once.
    template <int stride, int q> static Int from() {
        static constexpr auto at = [](int i) { return (i * stride + q) % 32; };
        return _mm512_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11),
                                 at(12), at(13), at(14), at(15));
    }
    template <int stride, int q, int source> static Int part_of(Int sofar, const Int* words) {
        static constexpr auto here = [](int i) { return ((i * stride + q) / 16 == source) << i; };
        constexpr __mmask16 mask = here(0) | here(1) | here(2) | here(3) | here(4) | here(5) | here(6) | here(7) |
                                   here(8) | here(9) | here(10) | here(11) | here(12) | here(13) | here(14) | here(15);
        return _mm512_mask_permutexvar_epi32(sofar, mask, from<stride, q>(), words[source]);
    }
    template <int stride, int q, int... source>
    static Int gather_words(const Int* words, std::integer_sequence<int, source...>) {
        Int r = _mm512_permutex2var_epi32(words[0], from<stride, q>(), words[1]);
        ((r = part_of<stride, q, source + 2>(r, words)), ...);
        return r;
    }
};

inline bool runs_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}

}  // namespace
