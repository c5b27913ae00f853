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

struct Bfloat16StepInputs {
    static constexpr int codes = 32;
    StepInputs steps;

    template <class Decoder>
    Bfloat16StepInputs(Type<Decoder>, const hfl_matrix& w, const uint16_t* x, int64_t stride, int64_t m, int threads)
        : steps(m, w.columns / codes) {
        alignas(64) uint16_t from[codes];
        for (int e = 0; e < codes; e++) from[e] = static_cast<uint16_t>(Decoder::position(e));
        const __m512i order = _mm512_load_si512(from);
        steps.arrange_all(w.columns / codes, threads, [&](int64_t i) {
            for (int64_t s = 0; s < w.columns / codes; s++) {
                const __m512i values = _mm512_loadu_si512(x + i * stride + s * codes);
                _mm512_store_si512(steps.at(s, i), _mm512_permutexvar_epi16(order, values));
            }
        });
    }
};

template <class Decoder> class Bfloat16Rows {
  public:
    static constexpr int step_codes = Bfloat16StepInputs::codes, step_words = Decoder::words;
    using Inputs = Bfloat16StepInputs;

    Bfloat16Rows(const hfl_matrix& w, const Inputs& x)
        : w_(w), x_(x), decoders_(vector_rows, Decoder(w)), group_steps_(w.columns / w.groups / step_codes) {
        for (int r = 0; r < panel_rows; r++) scales_.emplace_back(w);
    }

    void select(int64_t first, int count) {
        first_ = first;
        for (int r = 0; r < count; r++) scales_[static_cast<size_t>(r)].select(first + r);
    }

    template <int vectors> void decode(int v, int count, int64_t step, int64_t n, char* panel) {
        const uint32_t* first = w_.codes + (first_ + v * vector_rows) * w_.words;
        __m512i part[vector_rows] = {};
        for (int64_t s = step, group = -1; s < step + n; s++) {
            const bool changes = group != s / group_steps_;
            group = s / group_steps_;
            for (int r = 0; r < count; r++) {
                const RowScales& scales = scales_[static_cast<size_t>(v * vector_rows + r)];
                if (changes)
                    decoders_[static_cast<size_t>(r)].group(scales.scale[static_cast<size_t>(group)],
                                                            scales.zero.empty() ? nullptr : scales.zero.data() + group);
                part[r] = decoders_[static_cast<size_t>(r)](first + r * w_.words + s * Decoder::words);
            }
            __m512i columns[vector_rows];
            for (int r = 0; r < vector_rows; r++) columns[r] = part[r];
            transpose(columns);
            for (int k = 0; k < vector_rows; k++)
                _mm512_store_si512(place<vectors>(panel, (s - step) * vector_rows + k, v), columns[k]);
        }
    }

    template <int vectors>
    void multiply(int64_t step, int64_t n, int64_t input, const char* panel, const Ahead& ahead, float* totals) const {
        __m512 sum[block_inputs * vectors];
        for_sums<vectors>([&](auto k) HFL_INLINE { sum[k.value] = _mm512_load_ps(totals + k.value * vector_rows); });
        add_products<Bfloat16Dot, vectors>(panel, x_.steps.at(step, input), x_.steps.padded * step_bytes, 0, n, ahead,
                                           sum);
        for_sums<vectors>([&](auto k) HFL_INLINE { _mm512_store_ps(totals + k.value * vector_rows, sum[k.value]); });
    }

    void finish(int64_t, float*, int) const {}

  private:
    const hfl_matrix& w_;
    const Inputs& x_;
    std::vector<Decoder> decoders_;  // of the rows of a vector
    const int64_t group_steps_;
    std::vector<RowScales> scales_;
    int64_t first_ = 0;
};

inline int linear_bfloat16_panels(const hfl_matrix* const* matrices, int count, const void* x, int64_t m, int64_t stride,
                                  void* const* y, int threads) {
    multiply_panels<Bfloat16Rows, Bfloat16StepInputs>(
        matrices, count, m, y, HFL_BFLOAT16, threads, [](const hfl_matrix& w, auto use) { with_chunks(w, use); },
        [&](auto decoder, const hfl_matrix& w, int64_t m0, int64_t n) {
            return Bfloat16StepInputs(decoder, w, static_cast<const uint16_t*>(x) + m0 * stride, stride, n, threads);
        },
        [](const hfl_matrix& a, const hfl_matrix& b) { return a.bits == b.bits; });
    return 0;
}

}  // namespace
