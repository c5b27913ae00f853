// Depthwise causal convolution of tokens, SiLU, quantization: hf_lowbit.kernels.causal_convolution.
#pragma once
#include <algorithm>
#include <type_traits>

#include "aligned.h"
#include "operand.h"
#include "threads.h"

namespace {

// Some channels of one sequence. Rows of inputs lie in a buffer with the taps - 1 before them.
class ConvolutionPiece {
  public:
    static constexpr int64_t most_channels = 128, most_tokens = 32;

    ConvolutionPiece(const hfl_convolution& c, int64_t batch, int64_t first)
        : c_(c), batch_(batch), first_(first), channels_(std::min(most_channels, c.channels - first)),
          width_(whole_vectors(channels_)), memory_((2 * c.taps + most_tokens + 6) * width_), weight_(memory_.data()),
          bias_(weight_ + c.taps * width_), out_inverses_(bias_ + width_), result_(out_inverses_ + width_),
          rows_(result_ + 3 * width_), inputs_(c.x, first, channels_, result_ + width_) {
        std::fill(weight_, out_inverses_, 0.0f);
        for_taps([&](auto taps) {
            for (int64_t i = 0; i < channels_; i++)
                for (int64_t tap = 0; tap < taps; tap++) weight_[tap * width_ + i] = c.weight[(first + i) * taps + tap];
        });
        if (c.bias) std::copy_n(c.bias + first, channels_, bias_);
        if (c.y_type == HFL_INT8) spread_scales(c.out_scale, c.out_scale_run, first, channels_, result_, out_inverses_);
        std::fill_n(rows_, (c.taps - 1) * width_, 0.0f);
        if (c.state) with_type(c.state_type, [&](auto type) { load_state<decltype(type)::value>(); });
    }

    void run() {
        const int64_t before = c_.taps - 1;
        for (int64_t token = 0; token < c_.tokens; token += most_tokens) {
            const int64_t tokens = std::min(most_tokens, c_.tokens - token);
            for (int64_t t = 0; t < tokens; t++) {
                inputs_.load(batch_, token + t, rows_ + (before + t) * width_);
                convolve(rows_ + t * width_);
                store_row(c_.y, (batch_ * c_.tokens + token + t) * c_.channels + first_, result_, channels_, c_.y_type,
                          out_inverses_);
            }
            if (token + tokens == c_.tokens && c_.new_state)
                with_type(c_.state_type, [&](auto type) {
                    store_state<decltype(type)::value>(rows_ + (tokens - 1) * width_);
                });
            else std::copy(rows_ + tokens * width_, rows_ + (tokens + before) * width_, rows_);
        }
    }

  private:
    void convolve(const float* rows) {
        for (int64_t i = 0; i < width_; i += Simd::lanes) {
            Simd::Float sum = Simd::load(bias_ + i);
            for (int64_t tap = 0; tap < c_.taps; tap++)
                sum = Simd::multiply_add(Simd::load(rows + tap * width_ + i), Simd::load(weight_ + tap * width_ + i), sum);
            Simd::store(result_ + i, c_.silu ? silu(sum) : sum);
        }
    }

    // Calls use(taps): the usual number as a constant, with which the compiler makes vectors of what lies interleaved.
    template <class Use> HFL_INLINE void for_taps(Use use) const {
        if (c_.taps == 4) use(std::integral_constant<int64_t, 4>());
        else use(c_.taps);
    }

    // The state lies channel by channel, its oldest input first; that one has left the convolution's reach.
    template <int type> using Stored =
        std::conditional_t<type == HFL_FLOAT32, float, std::conditional_t<type == HFL_INT8, int8_t, uint16_t>>;
    template <int type> void load_state() {
        for_taps([&](auto taps) {
            const auto* state = static_cast<const Stored<type>*>(c_.state) + (batch_ * c_.channels + first_) * taps;
            for (int64_t i = 0; i < channels_; i++)
                for (int64_t tap = 1; tap < taps; tap++) {
                    float& row = rows_[(tap - 1) * width_ + i];
                    if constexpr (type == HFL_INT8) row = static_cast<float>(state[i * taps + tap]) * inputs_.scales()[i];
                    else row = load_as_float(state, i * taps + tap, type);
                }
        });
    }
    template <int type> void store_state(float* rows) {
        if constexpr (type == HFL_INT8)
            for (int64_t i = 0; i < c_.taps * width_; i += Simd::lanes)
                Simd::store(rows + i, code_of(Simd::load(rows + i), Simd::load(inputs_.inverses() + i % width_)));
        for_taps([&](auto taps) {
            auto* state = static_cast<Stored<type>*>(c_.new_state) + (batch_ * c_.channels + first_) * taps;
            for (int64_t i = 0; i < channels_; i++)
                for (int64_t tap = 0; tap < taps; tap++) {
                    const float value = rows[tap * width_ + i];
                    if constexpr (type == HFL_INT8) state[i * taps + tap] = static_cast<int8_t>(value);
                    else store_float(state, i * taps + tap, value, type);
                }
        });
    }

    const hfl_convolution& c_;
    const int64_t batch_, first_, channels_, width_;
    const Aligned<float> memory_;
    float *weight_, *bias_, *out_inverses_, *result_, *rows_;
    const Rows inputs_;
};

int convolve(const hfl_convolution& c, int threads) {
    constexpr int64_t most_channels = ConvolutionPiece::most_channels, worth_a_thread = 1 << 15;
    const int64_t pieces = (c.channels + most_channels - 1) / most_channels;
    const int64_t most_threads = 1 + c.batch * c.tokens * c.channels / worth_a_thread;
    auto work = [&](int64_t piece) { ConvolutionPiece(c, piece / pieces, piece % pieces * most_channels).run(); };
    share(c.batch * pieces, static_cast<int>(std::min<int64_t>(threads, most_threads)), work);
    return 0;
}

}  // namespace
