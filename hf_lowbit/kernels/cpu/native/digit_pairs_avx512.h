// The way of bfloat16 inputs and base 3, five digits in a byte, in rows of one scale (see pairs_avx512.h).
#pragma once
#include <immintrin.h>

#include <cstring>

#include "pairs_avx512.h"

namespace {

// A byte in each half of a lane. Tables have 32 entries. From the third digit on, b / 3^j, rounded down, is less than
// that: a table has what its last digit stands for. For the first two, b / 3^(j + 1) is a multiple of a third or a ninth;
// what stands behind its point are the lowest 16 bits of b * 2^16 / 3^(j + 1), whose first five tell the digits apart.
struct InDigitPairs : PairSums {
    static constexpr int steps = 5, lanes = 2 * Simd::lanes, block_words = lanes / 4;

    __m512i last, first[2];
    explicit InDigitPairs(const hfl_matrix& w) {
        alignas(64) uint16_t of_last[32], of_first[2][32] = {};
        for (int q = 0; q < 32; q++) of_last[q] = to_bfloat16(w.table[q % 3]);
        for (int rest = 0; rest < 9; rest++) of_first[1][top(rest * reciprocal(1))] = to_bfloat16(w.table[rest / 3]);
        for (int rest = 0; rest < 3; rest++) of_first[0][top(rest * reciprocal(0))] = to_bfloat16(w.table[rest]);
        last = _mm512_load_si512(of_last);
        for (int j = 0; j < 2; j++) first[j] = _mm512_load_si512(of_first[j]);
    }
    static bool fits(const hfl_matrix& w) { return w.groups == 1 && is_bfloat16(w); }
    static void arrange(const uint16_t* in, int j, float* out) {
        uint16_t of_bytes[lanes];
        for (int i = 0; i < lanes; i++) of_bytes[i] = in[i * steps + j];
        std::memcpy(out, of_bytes, sizeof of_bytes);
    }
    template <int M> HFL_INLINE static __m512i load(const uint32_t* p) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    template <int j> HFL_INLINE __m512i at(__m512i bytes) const {
        if constexpr (j >= 2) {
            const __m512i quotient = _mm512_mulhi_epu16(bytes, _mm512_set1_epi16(reciprocal(j - 1)));
            return _mm512_permutexvar_epi16(quotient, last);
        } else {
            const __m512i fraction = _mm512_mullo_epi16(bytes, _mm512_set1_epi16(reciprocal(j)));
            return _mm512_permutexvar_epi16(_mm512_srli_epi16(fraction, fraction_bits), first[j]);
        }
    }

  private:
    static constexpr int fraction_bits = 11;
    static constexpr int reciprocal(int j) {  // 2^16 / 3^(j + 1), rounded up: exact for bytes
        int power = 3;
        for (; j > 0; j--) power *= 3;
        return (65536 + power - 1) / power;
    }
    static int top(int fraction) { return (fraction & 0xffff) >> fraction_bits; }
};

}  // namespace
