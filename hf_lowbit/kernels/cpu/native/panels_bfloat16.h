// Panels of bfloat16 weights, scales included, and inputs of that type (AVX512-BF16).
#pragma once
#include "chunks_avx512.h"
#include "panels.h"
#include "scales.h"

namespace {

struct Bfloat16Dot {
    using Sum = __m512;
    HFL_INLINE static Sum add(Sum sum, __m512i weights, __m512i inputs) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(inputs));
    }
};

// Inputs where they lie, but for the last ones that fill no block: these are copied and filled up with zeros.
class Bfloat16Inputs {
  public:
    static constexpr int codes = 32;
    int64_t count, padded;

    Bfloat16Inputs(const uint16_t* x, int64_t stride, int64_t m, int64_t columns)
        : count(m), padded(in_blocks(m)), x_(x), stride_(stride), columns_(columns),
          last_(m == padded ? 0 : block_inputs * columns) {
        if (m == padded) return;
        const auto bytes = static_cast<size_t>(columns) * sizeof(uint16_t);
        std::memset(last_.data(), 0, block_inputs * bytes);
        for (int64_t i = padded - block_inputs; i < m; i++)
            std::memcpy(last_.data() + i % block_inputs * columns, x + i * stride, bytes);
    }
    // A block from that step on, as add_products reads it.
    Block block(int64_t input, int64_t step) const {
        const bool is_copied = input + block_inputs > count;
        const uint16_t* first = is_copied ? last_.data() : x_ + input * stride_;
        return {reinterpret_cast<const char*>(first + step * codes),
                (is_copied ? columns_ : stride_) * static_cast<int64_t>(sizeof(uint16_t)), step_bytes};
    }

  private:
    const uint16_t* x_;
    int64_t stride_, columns_;
    Aligned<uint16_t> last_;
};

template <class Decoder> class Bfloat16Rows {
  public:
    static constexpr int step_codes = Bfloat16Inputs::codes, step_words = Decoder::words;
    static constexpr bool begins = true;
    using Inputs = Bfloat16Inputs;

    Bfloat16Rows(const hfl_matrix& w, const Inputs& x)
        : w_(w), x_(x), scales_(w, panel_rows), decoders_(vector_rows, Decoder(w)),
          group_steps_(w.columns / w.groups / step_codes) {}

    void select(int64_t first, int count) {
        first_ = first;
        for (int r = 0; r < count; r++) scales_.select(first + r, r);
    }

    template <int vectors> void decode(int v, int count, int64_t step, int64_t n, char* panel) {
        const uint32_t* first = w_.codes + (first_ + v * vector_rows) * w_.words;
        const bool has_zero = w_.zero_kind != HFL_NO_ZERO;
        __m512i part[vector_rows] = {};
        for (int64_t s = step, group = -1; s < step + n; s++) {
            const bool changes = group != s / group_steps_;
            group = s / group_steps_;
            for (int r = 0; r < count; r++) {
                const int row = v * vector_rows + r;
                if (changes)
                    decoders_[static_cast<size_t>(r)].group(scales_.scale(row)[group],
                                                            has_zero ? scales_.zero(row) + group : nullptr);
                part[r] = decoders_[static_cast<size_t>(r)](first + r * w_.words + s * Decoder::words);
            }
            __m512i columns[vector_rows];
            for (int r = 0; r < vector_rows; r++) columns[r] = part[r];
            transpose(columns);
            for (int k = 0; k < vector_rows; k++)
                _mm512_store_si512(place<vectors>(panel, (s - step) * vector_rows + Decoder::pair(k), v), columns[k]);
        }
    }

    template <int vectors>
    void multiply(int64_t step, int64_t n, int64_t input, const char* panel, const Ahead& ahead, float* totals) const {
        __m512 sum[block_inputs * vectors];
        add<vectors>(step, n, input, panel, ahead, totals, sum);
        for_sums<vectors>([&](auto k) HFL_INLINE { _mm512_store_ps(totals + k.value * vector_rows, sum[k.value]); });
    }

    // To y [input, row], where the first input and row of the block begin at `first`.
    template <int vectors>
    void multiply_last(int64_t step, int64_t n, int64_t input, const char* panel, const Ahead& ahead, const float* totals,
                       void* y, int64_t first) const {
        __m512 sum[block_inputs * vectors];
        uint16_t* out = static_cast<uint16_t*>(y) + first;
        add<vectors>(step, n, input, panel, ahead, totals, sum);
        for_sums<vectors>([&](auto k) HFL_INLINE {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k.value % vectors * vector_rows),
                                reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum[k.value])));
            if constexpr (k.value % vectors == vectors - 1) out += w_.rows;
        });
    }

    void finish(int64_t, float*, int) const {}

  private:
    template <int vectors>
    HFL_INLINE void add(int64_t step, int64_t n, int64_t input, const char* panel, const Ahead& ahead, const float* totals,
                        __m512* sum) const {
        for_sums<vectors>([&](auto k) HFL_INLINE {
            sum[k.value] = step ? _mm512_load_ps(totals + k.value * vector_rows) : _mm512_setzero_ps();
        });
        add_products<Bfloat16Dot, vectors>(panel, x_.block(input, step), 0, n, ahead, sum);
    }

    const hfl_matrix& w_;
    const Inputs& x_;
    RowScales scales_;
    std::vector<Decoder> decoders_;  // of the rows of a vector
    const int64_t group_steps_;
    int64_t first_ = 0;
};

inline int linear_bfloat16_panels(const hfl_matrix* const* matrices, int count, const void* x, int64_t m, int64_t stride,
                                  void* const* y, int threads) {
    multiply_panels<Bfloat16Rows, Bfloat16Inputs>(
        matrices, count, m, y, HFL_BFLOAT16, threads, [](const hfl_matrix& w, auto use) { with_chunks(w, use); },
        [&](auto, const hfl_matrix& w, int64_t m0, int64_t n) {
            return Bfloat16Inputs(static_cast<const uint16_t*>(x) + m0 * stride, stride, n, w.columns);
        },
        [](const hfl_matrix&, const hfl_matrix&) { return true; });
    return 0;
}

}  // namespace
