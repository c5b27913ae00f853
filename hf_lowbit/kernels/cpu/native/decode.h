// Whole rows to floats, with the same operations in the same order as the torch reference: equal to the last bit.
#pragma once
#include <vector>

#include "scales.h"
#include "threads.h"
#include "values.h"

namespace {

// Decodes rows one after the other; keeps what is the same for all of them.
class RowDecoder {
  public:
    explicit RowDecoder(const hfl_matrix& matrix)
        : w_(matrix), scales_(matrix), codes_(static_cast<size_t>(matrix.columns + 64)) {}

    void operator()(int64_t row, float* out) {
        unpack_row(w_, row, codes_.data());
        scales_.select(row);
        with_values(w_, [&](auto bits, auto decoder) {
            const Values<decltype(bits)::value, decltype(decoder)::value> values(w_);
            const int64_t group = w_.columns / w_.groups;
            for (int64_t g = 0; g < w_.groups; g++) {
                const bool shifted = w_.zero_kind != HFL_NO_ZERO;
                const float scale = scales_.scale()[g], zero = shifted ? scales_.zero()[g] : 0.0f;
                const int64_t end = (g + 1) * group;
                int64_t k = g * group;
                for (; k + Simd::lanes <= end; k += Simd::lanes) {
                    Simd::Float v = values(Simd::widen(codes_.data() + k));
                    if (shifted) v = Simd::subtract(v, Simd::set(zero));
                    Simd::store(out + k, Simd::multiply(v, Simd::set(scale)));
                }
                for (; k < end; k++) {
                    const float v = w_.table[codes_[k]];
                    out[k] = (shifted ? v - zero : v) * scale;
                }
            }
        });
    }

  private:
    const hfl_matrix& w_;
    RowScales scales_;
    std::vector<uint8_t> codes_;
};

inline void decode(const hfl_matrix* w, const int64_t* index, int64_t first, int64_t n, void* out, int type,
                   int threads) {
    const int64_t piece = std::max<int64_t>(1, 32768 / w->columns), pieces = (n + piece - 1) / piece;
    auto work = [&](int64_t p) {
        RowDecoder decode_row(*w);
        std::vector<float> row(type == HFL_FLOAT32 ? 0 : static_cast<size_t>(w->columns));
        for (int64_t i = p * piece; i < std::min(n, (p + 1) * piece); i++) {
            const int64_t source = index ? index[i] : first + i;
            if (type == HFL_FLOAT32) {
                decode_row(source, static_cast<float*>(out) + i * w->columns);
            } else {
                decode_row(source, row.data());
                store_floats(out, i * w->columns, row.data(), w->columns, type);
            }
        }
    };
    share(pieces, threads, work);
}

}  // namespace
