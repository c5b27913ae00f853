// Products with many inputs, without a matrix unit: a panel of decoded rows in the first-level cache meets blocks of
// inputs, whose sums stay in registers (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
// ACM TOMS 34(3), 2008).
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "aligned.h"
#include "geometry.h"
#include "rows.h"
#include "unroll.h"

namespace {

constexpr int vector_rows = 16;       // of a weight vector: four bytes of each, or two bfloat16 numbers
constexpr int panel_rows = 48;        // three vectors times
constexpr int block_inputs = 8;       // eight inputs: 24 sums, three weights and an input are in registers
constexpr int step_bytes = 64;        // of a decoded row
constexpr int run = 8;                // steps that are decoded together: at most 512 bytes, whose sums floats hold exactly
constexpr int64_t most_inputs = 512;  // at a time: decoding once for so many is 3 % of the product, 256 are 2 % slower

// So many inputs as whole blocks hold.
inline int64_t in_blocks(int64_t inputs) { return (inputs + block_inputs - 1) / block_inputs * block_inputs; }

// Sixteen rows of sixteen 32-bit numbers become sixteen columns.
HFL_INLINE inline void transpose(__m512i* v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // v[i + c]: columns c, c + 4, c + 8, c + 12 of four rows
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x88), odd = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x88);
        const __m512i odd2 = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xdd);
        t[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
        t[c + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        t[c + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        t[c + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

// use(constant) for all sums [input][vector] of a block.
template <int vectors, class Use> HFL_INLINE inline void for_sums(Use&& use) {
    repeat<block_inputs * vectors>(use);
}

// Reads the codes of the following steps from memory while a panel is multiplied by its first inputs.
struct Ahead {
    const uint32_t* codes;  // of the first row; null: nothing
    int64_t row_words, step_words;
    int rows;
    HFL_INLINE void fetch(int64_t step) const {
        for (int r = 0; codes && r < rows; r++) __builtin_prefetch(codes + r * row_words + step * step_words);
    }
};

// Where 4 bytes k of sixteen rows lie, counted from the first step of a panel.
template <int vectors> HFL_INLINE inline char* place(char* panel, int64_t k, int v) {
    return panel + (k * vectors + v) * 64;
}

// Where a block of inputs lies, and how many bytes further the next input, and the next step of each.
struct Block {
    const char* first;
    int64_t input_stride, step_stride;
};

// Adds steps first..last of a panel of so many vectors times a block of inputs to sums.
template <class Dot, int vectors>
HFL_INLINE inline void add_products(const char* panel, const Block& block, int64_t first, int64_t last, const Ahead& ahead,
                                    typename Dot::Sum* sum) {
    panel += first * vector_rows * vectors * 64;
    const char* in = block.first + first * block.step_stride;
    for (int64_t s = first; s < last; s++, in += block.step_stride) {
        ahead.fetch(s);
        for (int k = 0; k < step_bytes; k += 4, panel += vectors * 64) {
            __m512i weights[vectors], inputs;
            repeat<vectors>([&](auto v) HFL_INLINE { weights[v.value] = _mm512_load_si512(panel + 64 * v.value); });
            for_sums<vectors>([&](auto i) HFL_INLINE {
                if constexpr (i.value % vectors == 0) {
                    int32_t input;
                    std::memcpy(&input, in + i.value / vectors * block.input_stride + k, 4);
                    inputs = _mm512_set1_epi32(input);
                }
                sum[i.value] = Dot::add(sum[i.value], weights[i.value % vectors], inputs);
            });
        }
    }
}

// As store_floats; of bfloat16, a vector at a time.
inline void store(void* y, int64_t first, const float* values, int count, int type) {
#if defined(__AVX512BF16__)
    if (type == HFL_BFLOAT16) {
        uint16_t* out = static_cast<uint16_t*>(y) + first;
        int i = 0;
        for (; i + 16 <= count; i += 16)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                                reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(values + i))));
        return store_floats(out, i, values + i, count - i, type);
    }
#endif
    store_floats(y, first, values, count, type);
}

// Rows offers step_codes, step_words; Inputs, with their count, also padded to whole blocks; select(first row, count);
// decode<vectors>(v, count, step, n, panel): n steps of the v-th vector of rows; multiply<vectors>(step, n, first input,
// panel, ahead, totals [input][row]): adds them; finish(input, totals, count). Where it begins, step 0 sets totals, and a
// block of inputs is finished at its last step: from registers by multiply_last, where it is whole; else while it is in
// the first-level cache. Of products of bfloat16 that is 5 to 8 %, but the compiler takes integer sums out of registers.
template <class Rows> class PanelProduct {
  public:
    using Inputs = typename Rows::Inputs;

    PanelProduct(const hfl_matrix& w, const Inputs& x)
        : w_(w), x_(x), rows_(w, x), totals_(x.padded * panel_rows), panel_(run * panel_rows * step_bytes) {}

    // y [input, row] of rows first..first + count; y_first: where its first input begins.
    void operator()(int64_t first, int count, void* y, int64_t y_first, int type) {
        rows_.select(first, count);
        const int vectors = (count + vector_rows - 1) / vector_rows;
        const Results results{y, y_first + first, type, count};
        if (vectors == 3) multiply<3>(first, results);
        else if (vectors == 2) multiply<2>(first, results);
        else multiply<1>(first, results);
    }

  private:
    struct Results {
        void* y;
        int64_t first;
        int type, count;
    };

    template <int vectors> void multiply(int64_t first, const Results& results) {
        const int64_t steps = w_.columns / Rows::step_codes;
        const int64_t runs = (steps + run - 1) / run, most = (steps + runs - 1) / runs;  // of about one length
        if constexpr (!Rows::begins)
            std::memset(totals_.data(), 0, static_cast<size_t>(x_.padded * vectors * vector_rows) * sizeof(float));
        for (int64_t step = 0; step < steps; step += most) {
            const int64_t n = std::min(most, steps - step);
            const bool ends = Rows::begins && step + n == steps;
            for (int v = 0; v < vectors; v++)
                rows_.template decode<vectors>(v, std::min(vector_rows, results.count - v * vector_rows), step, n,
                                               panel_.data());
            const uint32_t* following = w_.codes + first * w_.words + (step + n) * Rows::step_words;
            Ahead ahead{step + n < steps ? following : nullptr, w_.words, Rows::step_words, results.count};
            for (int64_t i = 0; i < x_.padded; i += block_inputs, ahead.codes = nullptr) {
                float* totals = totals_.data() + i * vectors * vector_rows;
                if constexpr (Rows::begins)
                    if (ends && results.count == vectors * vector_rows && i + block_inputs <= x_.count) {
                        rows_.template multiply_last<vectors>(step, n, i, panel_.data(), ahead, totals, results.y,
                                                              results.first + i * w_.rows);
                        continue;
                    }
                rows_.template multiply<vectors>(step, n, i, panel_.data(), ahead, totals);
                if (ends) finish<vectors>(i, std::min(i + block_inputs, x_.count), results);
            }
        }
        if constexpr (!Rows::begins) finish<vectors>(0, x_.count, results);
    }

    template <int vectors> void finish(int64_t input, int64_t last, const Results& results) {
        for (; input < last; input++) {
            float* totals = totals_.data() + input * vectors * vector_rows;
            rows_.finish(input, totals, results.count);
            store(results.y, results.first + input * w_.rows, totals, results.count, results.type);
        }
    }

    const hfl_matrix& w_;
    const Inputs& x_;
    Rows rows_;
    Aligned<float> totals_;
    Aligned<char> panel_;  // [step, 4 bytes, vector of rows]
};

// y of m inputs. with_decoder(w, use): calls use(Type<a decoder>); make(decoder, w, m0, n): its inputs m0..m0 + n, which
// neighbours that are `alike` share.
template <template <class> class Rows, class Inputs, class WithDecoder, class Make, class Alike>
void multiply_panels(const hfl_matrix* const* matrices, int count, int64_t m, void* const* y, int type, int threads,
                     WithDecoder with_decoder, Make make, Alike alike) {
    for (int64_t m0 = 0; m0 < m; m0 += most_inputs) {
        const int64_t n = std::min(most_inputs, m - m0);
        std::vector<std::shared_ptr<Inputs>> inputs(static_cast<size_t>(count));
        for (int i = 0; i < count; i++) {
            if (i && alike(*matrices[i - 1], *matrices[i])) { inputs[i] = inputs[i - 1]; continue; }
            with_decoder(*matrices[i], [&](auto decoder) {
                inputs[i] = std::make_shared<Inputs>(make(decoder, *matrices[i], m0, n));
            });
        }
        share_rows(matrices, count, n, threads, panel_rows, [&](int i, int64_t first, int64_t last) {
            const hfl_matrix& w = *matrices[i];
            with_decoder(w, [&](auto decoder) {
                PanelProduct<Rows<typename decltype(decoder)::type>> product(w, *inputs[i]);
                for (int64_t row = first; row < last; row += panel_rows)
                    product(row, static_cast<int>(std::min<int64_t>(panel_rows, last - row)), y[i], m0 * w.rows, type);
            });
        });
    }
}

}  // namespace
