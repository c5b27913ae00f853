// The rows of an operand as floats, for a range of its channels.
#pragma once
#include <algorithm>

#include "functions.h"

namespace {

// The scale of each channel, of which `run` in a row share one, and one over it; in whole vectors.
inline void spread_scales(const float* scale, int64_t run, int64_t first, int64_t channels, float* scales,
                          float* inverses) {
    for (int64_t i = 0; i < channels;) {
        const int64_t at = (first + i) / run, end = std::min(channels, (at + 1) * run - first);
        std::fill(scales + i, scales + end, scale[at]);
        i = end;
    }
    std::fill(scales + channels, scales + whole_vectors(channels), 1.0f);
    for (int64_t i = 0; i < channels; i += Simd::lanes)
        Simd::store(inverses + i, Math::divide(Simd::set(1.0f), Simd::load(scales + i)));
}

class Rows {
  public:
    // `scales` has room for the channels twice, in whole vectors.
    Rows(const hfl_operand& operand, int64_t first, int64_t channels, float* scales)
        : operand_(operand), first_(first), channels_(channels), scales_(scales),
          inverses_(scales + whole_vectors(channels)) {
        if (operand.scale) spread_scales(operand.scale, operand.scale_run, first, channels, scales, inverses_);
    }
    const float* scales() const { return scales_; }
    const float* inverses() const { return inverses_; }

    // Zeros behind the last channel, up to a whole vector.
    void load(int64_t batch, int64_t token, float* out) const {
        const int64_t at = batch * operand_.batch_stride + token * operand_.token_stride + first_;
        with_type(operand_.type, [&](auto type) {
            constexpr int t = decltype(type)::value;
            const char* row = static_cast<const char*>(operand_.values) + at * bytes_of(t);
            for (int64_t i = 0; i < channels_; i += Simd::lanes) {
                Simd::Float v = load_first<t>(row + i * bytes_of(t), channels_ - i);
                if (operand_.scale) {
                    if constexpr (t != HFL_INT8) v = code_of(v, Simd::load(inverses_ + i));
                    v = Simd::multiply(v, Simd::load(scales_ + i));
                }
                Simd::store(out + i, v);
            }
        });
    }

  private:
    const hfl_operand& operand_;
    int64_t first_, channels_;
    float *scales_, *inverses_;
};

// A row of floats as values of `type`; int8: codes, by one over their scales.
inline void store_row(void* data, int64_t at, const float* row, int64_t channels, int64_t type,
                      const float* inverses) {
    with_type(type, [&](auto constant) {
        constexpr int t = decltype(constant)::value;
        char* out = static_cast<char*>(data) + at * bytes_of(t);
        for (int64_t i = 0; i < channels; i += Simd::lanes) {
            Simd::Float v = Simd::load(row + i);
            if constexpr (t == HFL_INT8) v = code_before_rounding(v, Simd::load(inverses + i));
            store_first<t>(out + i * bytes_of(t), v, channels - i);
        }
    });
}

}  // namespace
