// The selective scan of Mamba and Mamba-2: hf_lowbit.kernels.selective_scan. The states of a few channels stay in
// registers while the tokens of a chunk go by; the lanes of a vector are the states of one channel.
#pragma once
#include <algorithm>
#include <utility>

#include "aligned.h"
#include "operand.h"
#include "threads.h"

namespace {

// Some channels of one group of heads in one sequence.
class ScanPiece {
  public:
    static constexpr int64_t most_channels = 64;

    ScanPiece(const hfl_scan& s, int64_t batch, int64_t group, int64_t first, int64_t channels)
        : s_(s), batch_(batch), first_(first), channels_(channels), width_(whole_vectors(channels)),
          n_(whole_vectors(s.n)), first_head_(first / s.head_dim),
          heads_((first + channels - 1) / s.head_dim - first_head_ + 1),
          first_cluster_(clusters_from(first, channels).first), clusters_(clusters_from(first, channels).second),
          chunk_(tokens_in_cache()),
          memory_(chunk_ * (4 * width_ + 2 * n_) + width_ * (n_ + 12) + (4 + 2 * clusters_) * n_),
          next_(memory_.data()),
          x_(s.x, first, channels, take(2 * width_)), z_(s.z, first, channels, take(2 * width_)),
          dt_(s.dt, first_head_, heads_, take(2 * width_)), B_(s.B, group * s.n, s.n, take(2 * n_)),
          C_(s.C, group * s.n, s.n, take(2 * n_)), states_(take(width_ * n_)), scales_(take(clusters_ * n_)),
          inverses_(take(clusters_ * n_)), row_(take(2 * width_)), b_(take(chunk_ * n_)), c_(take(chunk_ * n_)),
          steps_(take((chunk_ + 1) * width_)), growth_(take((chunk_ + 1) * width_)),
          inputs_(take((chunk_ + 1) * width_)), y_(take((chunk_ + 1) * width_)) {
        for (int64_t i = 0; i < (s.state_scale ? clusters_ : 0); i++) {
            const int64_t run = s.state_scale_columns == 1 ? s.n : 1, row = first_cluster_ + i;
            const float* scale = s.state_scale + row * s.state_scale_columns;
            spread_scales(scale, run, 0, s.n, scales_ + i * n_, inverses_ + i * n_);
        }
    }

    void run() {
        const int64_t window = s_.peaks ? s_.peaks_every : s_.tokens;
        for (int64_t token = 0, tokens; token < s_.tokens; token += tokens) {
            tokens = std::min({chunk_, s_.tokens - token, window - token % window});
            first_token_ = token, tokens_ = tokens;
            for (int64_t t = 0; t < tokens; t++) {
                B_.load(batch_, token + t, b_ + t * n_);
                C_.load(batch_, token + t, c_ + t * n_);
            }
            prepare();
            for (int64_t c = 0; c < channels_;)
                c += c + 4 <= channels_ ? advance<4>(c) : advance<1>(c);
            finish();
        }
    }

  private:
    // As many tokens as leave the buffers that a chunk goes through in the first-level cache.
    int64_t tokens_in_cache() const {
        const int64_t floats_per_token = 3 * width_ + 2 * n_;
        return std::min(s_.tokens, std::clamp<int64_t>(8192 / floats_per_token, 8, 64));
    }
    // The lowest cluster of states among the channels, and how many there are from there to the highest.
    std::pair<int64_t, int64_t> clusters_from(int64_t first, int64_t channels) const {
        if (!s_.state_cluster || !s_.state_scale) return {0, 1};
        const auto [low, high] = std::minmax_element(s_.state_cluster + first, s_.state_cluster + first + channels);
        return {*low, *high - *low + 1};
    }
    float* take(int64_t floats) { return std::exchange(next_, next_ + floats); }

    // Per token and channel: what the state is multiplied by (Mamba: log2 of it, still to be multiplied by A), what B
    // is multiplied by, and what the output begins with.
    void prepare() {
        for (int64_t t = 0; t < tokens_; t++) {
            float* steps = steps_ + t * heads_;
            dt_.load(batch_, first_token_ + t, row_);
            for (int64_t h = 0; h < heads_; h++) steps[h] = row_[h] + (s_.dt_bias ? s_.dt_bias[first_head_ + h] : 0.0f);
        }
        for (int64_t i = 0; i < tokens_ * heads_; i += Simd::lanes) {
            const Simd::Float step = softplus(Simd::load(steps_ + i));
            Simd::store(steps_ + i, Math::at_least(s_.dt_min, Math::at_most(s_.dt_max, step)));
        }
        for (int64_t t = 0; t < tokens_; t++) {
            const float* steps = steps_ + t * heads_;
            x_.load(batch_, first_token_ + t, row_);
            if (s_.head_dim == 1) {
                for (int64_t c = 0; c < channels_; c += Simd::lanes) {
                    const int64_t count = channels_ - c;
                    const float* A = s_.A_columns > 1 ? nullptr : s_.A + first_ + c;
                    const Simd::Float own = A ? load_first<HFL_FLOAT32>(A, count) : Simd::set(1.0f);
                    const Simd::Float D = s_.D ? load_first<HFL_FLOAT32>(s_.D + first_ + c, count) : Simd::zero();
                    begin_token(t, c, Simd::load(steps + c), own, D);
                }
                continue;
            }
            for (int64_t h = 0, c = 0; h < heads_; h++) {  // what is written beyond a head is written again by the next
                const int64_t head = first_head_ + h, end = std::min(channels_, (head + 1) * s_.head_dim - first_);
                const Simd::Float A = Simd::set(s_.A_columns > 1 ? 1.0f : s_.A[head]);
                const Simd::Float D = Simd::set(s_.D ? s_.D[head] : 0.0f);
                for (; c < end; c += Simd::lanes) begin_token(t, c, Simd::set(steps[h]), A, D);
                c = end;
            }
        }
        if (s_.A_columns == 1)
            for (int64_t i = 0; i < tokens_ * width_; i += Simd::lanes)
                Simd::store(growth_ + i, exp2(Simd::load(growth_ + i)));
    }
    void begin_token(int64_t t, int64_t c, Simd::Float step, Simd::Float A, Simd::Float D) {
        const int64_t at = t * width_ + c;
        const Simd::Float x = Simd::load(row_ + c);
        Simd::store(inputs_ + at, Simd::multiply(x, step));
        Simd::store(growth_ + at, Simd::multiply(Simd::multiply(step, Simd::set(log2_of_e)), A));
        Simd::store(y_ + at, Simd::multiply(x, D));
    }

    template <int channels> int64_t advance(int64_t c) {
        if (s_.A_columns > 1) advance_states<channels, true>(c);
        else advance_states<channels, false>(c);
        return channels;
    }
    // As many states at once as the registers hold.
    template <int channels, bool own_decays> void advance_states(int64_t c) {
        constexpr int most = Simd::lanes == 16 && !own_decays ? 4 : 2;
        for (int64_t i = 0; i < n_;) {
            const int64_t vectors = (n_ - i) / Simd::lanes;
            if constexpr (most == 4)
                if (vectors >= 4) { advance_tile<channels, 4, own_decays>(c, i), i += 4 * Simd::lanes; continue; }
            if (vectors >= 2) advance_tile<channels, 2, own_decays>(c, i), i += 2 * Simd::lanes;
            else advance_tile<channels, 1, own_decays>(c, i), i += Simd::lanes;
        }
    }
    template <int channels, int vectors, bool own_decays> void advance_tile(int64_t c, int64_t i) {
        if (s_.peaks) advance_tile<channels, vectors, own_decays, true>(c, i);
        else advance_tile<channels, vectors, own_decays, false>(c, i);
    }
    template <int channels, int vectors, bool own_decays, bool peaks> void advance_tile(int64_t first, int64_t i) {
        constexpr int lanes = Simd::lanes;
        Simd::Float h[channels][vectors], A[channels][vectors], peak[channels][vectors];
        load_states(first, i, h);
        for (int c = 0; c < channels; c++)
            for (int v = 0; v < vectors; v++) {
                if constexpr (own_decays)
                    A[c][v] = load_first<HFL_FLOAT32>(s_.A + (first_ + first + c) / s_.head_dim * s_.n + i + v * lanes,
                                                left(i + v * lanes));
                if constexpr (peaks) peak[c][v] = Simd::zero();
            }
        const float *growth = growth_ + first, *inputs = inputs_ + first, *bs = b_ + i, *cs = c_ + i;
        const int64_t width = width_, n = n_, tokens = tokens_;  // stores into y might change members, for all one knows
        float* y = y_ + first;
        for (int64_t t = 0; t < tokens; t++, growth += width, inputs += width, y += width, bs += n, cs += n) {
            Simd::Float sum[channels];
            for (int v = 0; v < vectors; v++) {
                const Simd::Float b = Simd::load(bs + v * lanes), own = Simd::load(cs + v * lanes);
                for (int c = 0; c < channels; c++) {
                    Simd::Float decay = Simd::set(growth[c]);
                    if constexpr (own_decays) decay = exp2(Simd::multiply(decay, A[c][v]));
                    h[c][v] = Simd::multiply_add(h[c][v], decay, Simd::multiply(Simd::set(inputs[c]), b));
                    sum[c] = v ? Simd::multiply_add(h[c][v], own, sum[c]) : Simd::multiply(h[c][v], own);
                    if constexpr (peaks) peak[c][v] = Math::larger(peak[c][v], Math::magnitude(h[c][v]));
                }
            }
            if constexpr (channels == 4) Math::add_sums(y, sum[0], sum[1], sum[2], sum[3]);
            else y[0] += Simd::sum(sum[0]);
        }
        store_states(first, i, h);
        if constexpr (peaks)
            for (int c = 0; c < channels; c++)
                for (int v = 0; v < vectors; v++) store_peak(first + c, i + v * lanes, peak[c][v]);
    }

    int64_t left(int64_t i) const { return s_.n - i; }
    int64_t state_at(int64_t c, int64_t i) const { return (batch_ * s_.channels + first_ + c) * s_.n + i; }
    // Where the scales of a state begin, among those of this piece.
    int64_t scale_at(int64_t c, int64_t i) const {
        return (s_.state_cluster ? s_.state_cluster[first_ + c] - first_cluster_ : 0) * n_ + i;
    }
    // From the caller before the first chunk, to the caller after the last; between them in a buffer.
    template <int channels, int vectors>
    void load_states(int64_t first, int64_t i, Simd::Float (&h)[channels][vectors]) const {
        auto fill = [&](auto load) {
            for (int c = 0; c < channels; c++)
                for (int v = 0; v < vectors; v++) h[c][v] = load(first + c, i + v * Simd::lanes);
        };
        if (first_token_) fill([&](int64_t c, int64_t at) { return Simd::load(states_ + c * n_ + at); });
        else if (!s_.state) fill([](int64_t, int64_t) { return Simd::zero(); });
        else if (s_.state_type == HFL_FLOAT32)
            fill([&](int64_t c, int64_t at) {
                return load_first<HFL_FLOAT32>(static_cast<const float*>(s_.state) + state_at(c, at), left(at));
            });
        else
            fill([&](int64_t c, int64_t at) {
                const auto* codes = static_cast<const int8_t*>(s_.state) + state_at(c, at);
                return Simd::multiply(load_first<HFL_INT8>(codes, left(at)), Simd::load(scales_ + scale_at(c, at)));
            });
    }
    template <int channels, int vectors>
    void store_states(int64_t first, int64_t i, const Simd::Float (&h)[channels][vectors]) {
        auto empty = [&](auto store) {
            for (int c = 0; c < channels; c++)
                for (int v = 0; v < vectors; v++) store(first + c, i + v * Simd::lanes, h[c][v]);
        };
        if (first_token_ + tokens_ < s_.tokens)
            empty([&](int64_t c, int64_t at, Simd::Float own) { Simd::store(states_ + c * n_ + at, own); });
        else if (!s_.new_state) return;
        else if (!s_.state_scale)
            empty([&](int64_t c, int64_t at, Simd::Float own) {
                store_first<HFL_FLOAT32>(static_cast<float*>(s_.new_state) + state_at(c, at), own, left(at));
            });
        else
            empty([&](int64_t c, int64_t at, Simd::Float own) {
                const Simd::Float code = code_before_rounding(own, Simd::load(inverses_ + scale_at(c, at)));
                store_first<HFL_INT8>(static_cast<int8_t*>(s_.new_state) + state_at(c, at), code, left(at));
            });
    }
    void store_peak(int64_t c, int64_t i, Simd::Float peak) {
        const int64_t windows = (s_.tokens + s_.peaks_every - 1) / s_.peaks_every;
        const int64_t row = (batch_ * windows + first_token_ / s_.peaks_every) * s_.channels + first_ + c;
        float* out = s_.peaks + row * s_.n + i;
        if (first_token_ % s_.peaks_every) peak = Math::larger(peak, load_first<HFL_FLOAT32>(out, left(i)));
        store_first<HFL_FLOAT32>(out, peak, left(i));
    }

    void finish() {
        for (int64_t t = 0; t < tokens_; t++) {
            float* y = y_ + t * width_;
            if (s_.z.values) {
                z_.load(batch_, first_token_ + t, row_);
                for (int64_t i = 0; i < channels_; i += Simd::lanes)
                    Simd::store(y + i, Simd::multiply(Simd::load(y + i), silu(Simd::load(row_ + i))));
            }
            const int64_t at = (batch_ * s_.tokens + first_token_ + t) * s_.channels + first_;
            store_row(s_.y, at, y, channels_, s_.y_type, nullptr);
        }
    }

    const hfl_scan& s_;
    const int64_t batch_, first_, channels_, width_, n_, first_head_, heads_, first_cluster_, clusters_, chunk_;
    const Aligned<float> memory_;
    float* next_;
    const Rows x_, z_, dt_, B_, C_;
    float *states_, *scales_, *inverses_, *row_, *b_, *c_, *steps_, *growth_, *inputs_, *y_;
    int64_t first_token_ = 0, tokens_ = 0;
};

int selective_scan(const hfl_scan& s, int threads) {
    constexpr int64_t most_channels = ScanPiece::most_channels, worth_a_thread = 1 << 17;
    const int64_t per_group = s.channels / s.groups, pieces = (per_group + most_channels - 1) / most_channels;
    const int64_t most_threads = 1 + s.batch * s.tokens * s.channels * s.n / worth_a_thread;
    auto work = [&](int64_t item) {
        const int64_t group = item / pieces % s.groups, begin = item % pieces * most_channels;
        ScanPiece(s, item / (pieces * s.groups), group, group * per_group + begin,
                  std::min(most_channels, per_group - begin)).run();
    };
    share(s.batch * s.groups * pieces, static_cast<int>(std::min<int64_t>(threads, most_threads)), work);
    return 0;
}

}  // namespace
