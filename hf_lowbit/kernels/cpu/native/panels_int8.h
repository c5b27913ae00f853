// Panels of bytes and int8 inputs (VNNI). Weights are made unsigned by adding 128, which sums take away again by where
// they start. Integer sums of a group, or of the part of it that is in the cache, are scaled and added in float32.
#pragma once
#include <algorithm>
#include <type_traits>

#include "byte_decoders.h"
#include "int8.h"
#include "panels.h"
#include "scales.h"

namespace {

struct ByteDot {
    using Sum = __m512i;
    HFL_INLINE static Sum add(Sum sum, __m512i weights, __m512i inputs) { return Dot::add(sum, weights, inputs); }
};

// Words lie sixteen rows side by side before they are decoded. Four bytes hold the j-th codes of the bytes of a word, or
// four neighbours, where codes cross bytes.
template <int bits> struct ByteDecoder {
    static constexpr bool crosses = 8 % bits != 0;
    static constexpr int words = 2 * bits, codes = 8 / bits;    // words of a step, codes of a byte
    static constexpr int together = crosses ? words : 16;  // words that are decoded together
    using Weights = std::conditional_t<crosses, Dot::QuadsOfRows<bits>, Dot::Weights<bits>>;

    static int position(int e) { return crosses ? e : (e / 4 / codes * 4 + e % 4) * codes + e / 4 % codes; }
    static Weights weights(const hfl_matrix& w) { return integer_weights<bits, Weights>(w); }
    // store(k, the k-th four bytes of sixteen rows) of so many words.
    template <class Store> HFL_INLINE static void decode(const Weights& weights, const __m512i* part, int count, Store store) {
        if constexpr (crosses)
            repeat<byte_codes / 4>([&](auto k) HFL_INLINE { store(k.value, weights.template at<decltype(k)::value>(part)); });
        else
            for (int q = 0; q < count; q++)
                repeat<codes>([&](auto j) HFL_INLINE {
                    store(q * codes + j.value, weights.template at<decltype(j)::value>(part[q]));
                });
    }
};

// Inputs [step][input][64 bytes], codes in the order of the decoder; up to whole blocks, the last ones zeros.
struct ByteInputs {
    int64_t count, padded;
    bool grouped;
    Aligned<char> values;
    Aligned<uint32_t> before;  // [step, input]: 128 times the sum of what comes before it, modulo 2^32
    Aligned<float> scale;      // [1 or group, input]

    template <class Decoder>
    ByteInputs(Type<Decoder>, const hfl_matrix& w, const int8_t* x, const float* x_scale, int64_t x_groups, int64_t m,
                   int threads)
        : count(m), padded(in_blocks(m)), grouped(x_groups > 1), values(w.columns * padded),
          before((w.columns / byte_codes + 1) * padded), scale(x_groups * padded) {
        const int64_t steps = w.columns / byte_codes;
        alignas(64) uint8_t from[byte_codes];
        for (int e = 0; e < byte_codes; e++) from[e] = static_cast<uint8_t>(Decoder::position(e));
        const __m512i order = _mm512_load_si512(from), sign = _mm512_set1_epi8(-128);
        for (int64_t s = 0; s < steps; s++) std::memset(at(s, m), 0, static_cast<size_t>((padded - m) * step_bytes));
        std::fill(before.data(), before.data() + (steps + 1) * padded, 0u);
        std::fill(scale.data(), scale.data() + x_groups * padded, 0.0f);
        auto arrange = [&](int64_t i) {
            uint32_t sum = 0;
            for (int64_t s = 0; s < steps; s++) {
                const __m512i codes = _mm512_loadu_si512(x + i * w.columns + s * byte_codes);
                _mm512_store_si512(at(s, i), _mm512_permutexvar_epi8(order, codes));
                before.data()[s * padded + i] = sum;
                sum += static_cast<uint32_t>(
                    _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), sign, codes)));
            }
            before.data()[steps * padded + i] = sum;
            for (int64_t g = 0; g < x_groups; g++) scale.data()[g * padded + i] = x_scale[i * x_groups + g];
        };
        share(m, m * steps < 1024 ? 1 : threads, arrange);  // a few are done before another thread is awake
    }
    char* at(int64_t step, int64_t input) const { return values.data() + (step * padded + input) * step_bytes; }
    // A block from that step on, as add_products reads it.
    Block block(int64_t input, int64_t step) const { return {at(step, input), step_bytes, padded * step_bytes}; }
};

template <class Decoder> class ByteRows {
  public:
    static constexpr int step_codes = byte_codes, step_words = Decoder::words;
    static constexpr bool begins = false;
    using Inputs = ByteInputs;

    ByteRows(const hfl_matrix& w, const Inputs& x)
        : w_(w), x_(x), weights_(Decoder::weights(w)), scales_(w), group_steps_(w.columns / w.groups / byte_codes),
          scale_(w.groups * panel_rows), zero_(w.groups * panel_rows) {
        std::fill(scale_.data(), scale_.data() + w.groups * panel_rows, 0.0f);
        std::fill(zero_.data(), zero_.data() + w.groups * panel_rows, 0.0f);
    }

    void select(int64_t first, int count) {
        first_ = first;
        const float unit = 1.0f / static_cast<float>(w_.integer_multiplier);
        for (int r = 0; r < count; r++) {
            scales_.select(first + r);
            for (int64_t g = 0; g < w_.groups; g++) {
                const float scale = scales_.scale()[g];
                scale_.data()[g * panel_rows + r] = scale * unit;
                if (has_zero()) zero_.data()[g * panel_rows + r] = scale * scales_.zero()[g] / 128;
            }
        }
    }

    template <int vectors> void decode(int v, int count, int64_t step, int64_t n, char* panel) const {
        const uint32_t* first = w_.codes + (first_ + v * vector_rows) * w_.words + step * Decoder::words;
        const typename Decoder::Weights weights = weights_;  // in registers
        for (int64_t at = 0; at < n * Decoder::words; at += Decoder::together) {
            const int words = static_cast<int>(std::min<int64_t>(Decoder::together, n * Decoder::words - at));
            const __mmask16 these = static_cast<__mmask16>((1u << words) - 1);
            __m512i part[vector_rows];
            for (int r = 0; r < vector_rows; r++)
                part[r] = _mm512_maskz_loadu_epi32(r < count ? these : 0, first + (r < count ? r : 0) * w_.words + at);
            transpose(part);
            const int64_t k = at / Decoder::words * (byte_codes / 4) + at % Decoder::words * Decoder::codes;
            Decoder::decode(weights, part, words, [&](int i, __m512i bytes) HFL_INLINE {
                _mm512_store_si512(place<vectors>(panel, k + i, v), bytes);
            });
        }
    }

    template <int vectors>
    void multiply(int64_t step, int64_t n, int64_t input, const char* panel, const Ahead& ahead, float* totals) const {
        const int64_t padded = x_.padded;
        for (int64_t s = step, next; s < step + n; s = next) {
            const int64_t group = s / group_steps_;
            next = std::min(step + n, (group + 1) * group_steps_);
            const uint32_t *before = x_.before.data() + s * padded + input, *after = before + (next - s) * padded;
            auto minus_sum = [&](int x) HFL_INLINE { return static_cast<int32_t>(before[x] - after[x]); };  // times 128
            __m512i sum[block_inputs * vectors];
            for_sums<vectors>([&](auto i) HFL_INLINE {
                sum[i.value] = _mm512_set1_epi32(minus_sum(i.value / vectors));
            });
            add_products<ByteDot, vectors>(panel, x_.block(input, step), s - step, next - step, ahead, sum);
            const float *scale = scale_.data() + group * panel_rows, *zero = zero_.data() + group * panel_rows;
            const float* x_scale = x_.scale.data() + (x_.grouped ? group * padded : 0) + input;
            auto add = [&](int i, __m512 value, __m512 factor) HFL_INLINE {
                float* total = totals + i * vector_rows;
                _mm512_store_ps(total, _mm512_fmadd_ps(value, factor, _mm512_load_ps(total)));
            };
            if (!x_.grouped && !has_zero())
                for_sums<vectors>([&](auto i) HFL_INLINE {
                    constexpr int row = i.value % vectors * vector_rows;
                    add(i.value, _mm512_cvtepi32_ps(sum[i.value]), _mm512_load_ps(scale + row));
                });
            else
                for_sums<vectors>([&](auto i) HFL_INLINE {
                    constexpr int x = i.value / vectors, row = i.value % vectors * vector_rows;
                    const __m512 less = _mm512_set1_ps(static_cast<float>(minus_sum(x)));
                    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i.value]), _mm512_load_ps(scale + row));
                    add(i.value, _mm512_fmadd_ps(less, _mm512_load_ps(zero + row), value),
                        _mm512_set1_ps(x_.grouped ? x_scale[x] : 1.0f));
                });
        }
    }

    void finish(int64_t input, float* totals, int count) const {
        if (x_.grouped) return;
        for (int r = 0; r < count; r++) totals[r] *= x_.scale.data()[input];
    }

  private:
    bool has_zero() const { return w_.zero_kind != HFL_NO_ZERO; }

    const hfl_matrix& w_;
    const Inputs& x_;
    const typename Decoder::Weights weights_;
    RowScales scales_;
    const int64_t group_steps_;
    Aligned<float> scale_, zero_;  // [group, row of the panel]; zero points for sums that are -128 times too large
    int64_t first_ = 0;
};

inline int linear_byte_panels(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale,
                              int64_t x_groups, int64_t m, int type, void* const* y, int threads) {
    multiply_panels<ByteRows, ByteInputs>(
        matrices, count, m, y, type, threads,
        [](const hfl_matrix& w, auto use) { with_byte_decoder<ByteDecoder, true>(w, use); },
        [&](auto decoder, const hfl_matrix& w, int64_t m0, int64_t n) {
            return ByteInputs(decoder, w, x + m0 * w.columns, x_scale + m0 * x_groups, x_groups, n, threads);
        },
        [](const hfl_matrix& a, const hfl_matrix& b) { return a.bits == b.bits; });
    return 0;
}

}  // namespace
