// int8 inputs and integer tables: sixteen rows are decoded to bytes in the first-level cache, 64 codes of each at a
// time. Integer sums of a group, or of the part of it that is in the cache, are scaled and added in float32.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "aligned.h"
#include "amx_tiles.h"
#include "byte_decoders.h"
#include "geometry.h"
#include "scales.h"

namespace {

// Codes that do not cross bytes: the bytes are repeated, each repetition shifted further, and looked up. Eight bits are
// their own values but for the sign.
template <int bits> struct Bytes {
    static constexpr int words = 2 * bits;

    __m512i table, shifts;
    explicit Bytes(const hfl_matrix& w) {
        alignas(64) int8_t values[64] = {};
        alignas(64) uint16_t by[32];
        for (int i = 0; i < 64 && bits < 8; i++)
            values[i] = static_cast<int8_t>(
                std::lround(w.table[i & ((1 << bits) - 1)] * static_cast<float>(w.integer_multiplier)));
        for (int e = 0; e < 32; e++) by[e] = static_cast<uint16_t>(2 * e / (8 * bits) * bits);
        table = _mm512_load_si512(values);
        shifts = _mm512_load_si512(by);
    }
    static int position(int e) { return e % (8 * bits) * (8 / bits) + e / (8 * bits); }
    HFL_INLINE __m512i operator()(const uint32_t* p) const {
        if constexpr (bits == 8) return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
        return _mm512_permutexvar_epi8(_mm512_srlv_epi16(load(p), shifts), table);
    }

  private:
    HFL_INLINE __m512i load(const uint32_t* p) const {
        if constexpr (bits == 1) {
            int64_t two;
            std::memcpy(&two, p, 8);
            return _mm512_set1_epi64(two);
        }
        if constexpr (bits == 2) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
};

// [64 codes][tile of inputs][quad of codes][input][4]; sixteen inputs to a tile, the last ones zeros.
struct ByteInputs {
    int64_t count, groups;
    int tiles;
    const float* scale;
    Aligned<int8_t> values;
    std::vector<float> sums;  // [input, group], where there are zero points

    template <class Decoder>
    ByteInputs(Type<Decoder>, const hfl_matrix& w, const int8_t* x, const float* x_scale, int64_t m)
        : count(m), groups(w.groups), tiles(static_cast<int>((m + tile_inputs - 1) / tile_inputs)), scale(x_scale),
          values(w.columns * tiles * tile_inputs) {
        int8_t* out = values.data();
        int position[byte_codes];
        for (int e = 0; e < byte_codes; e++) position[e] = Decoder::position(e);
        for (int64_t step = 0; step < w.columns; step += byte_codes)
            for (int tile = 0; tile < tiles; tile++)
                for (int quad = 0; quad < byte_codes / 4; quad++)
                    for (int64_t i = tile * tile_inputs; i < (tile + 1) * tile_inputs; i++, out += 4)
                        for (int k = 0; k < 4; k++)
                            out[k] = i < m ? x[i * w.columns + step + position[4 * quad + k]] : int8_t(0);
        if (w.zero_kind == HFL_NO_ZERO) return;
        sums.resize(static_cast<size_t>(m * groups));
        const int64_t group = w.columns / groups;
        for (int64_t i = 0; i < m * groups; i++) {
            int32_t total = 0;
            for (int64_t k = 0; k < group; k++) total += x[i * group + k];
            sums[static_cast<size_t>(i)] = static_cast<float>(total);
        }
    }
};

template <class Decoder> class ByteProduct {
  public:
    ByteProduct(const hfl_matrix& w, const ByteInputs& x)
        : w_(w), x_(x), decoder_(w), steps_(w.columns / byte_codes), group_steps_(steps_ / w.groups),
          scales_(w, tile_rows) {}

    // y of rows first..first + count, by tiles of inputs [tile][row][input].
    void operator()(int64_t first, int count, float* totals) {
        for (int r = 0; r < count; r++) scales_.select(first + r, r);
        std::fill(totals, totals + x_.tiles * tile_rows * tile_inputs, 0.0f);
        int8_t *current = weights_[0], *following = weights_[1];  // loading what was just stored takes twice as long
        decode_run(first, count, 0, current);
        for (int64_t step = 0; step < steps_; step += run, std::swap(current, following)) {
            decode_run(first, count, step + run, following);
            tiles_meet_memory();
            const int64_t end = std::min(step + run, steps_);
            for (int tile = 0; tile < x_.tiles; tile += sum_tiles)
                for (int64_t s = step, next; s < end; s = next) {
                    const int64_t group = s / group_steps_;
                    next = std::min(end, (group + 1) * group_steps_);
                    multiply(s, next, tile, current + (s - step) * tile_rows * byte_codes);
                    add_scaled(group, count, tile, totals);
                }
        }
    }

    const RowScales& scales() const { return scales_; }

  private:
    static constexpr int run = 16;  // the sums of 1024 products of bytes are exact in float32

    void decode_run(int64_t first, int count, int64_t step, int8_t* out) {
        const int n = static_cast<int>(std::min<int64_t>(run, steps_ - step));
        const uint32_t* p = w_.codes + first * w_.words + step * Decoder::words;
        const Decoder decode = decoder_;  // in registers
        for (int r = 0; r < count && n > 0; r++, p += w_.words, out += byte_codes) {
            for (int k = 0; k < n * Decoder::words; k += 16) _mm_prefetch(p + tile_rows * w_.words + k, _MM_HINT_T1);
            for (int s = 0; s < n; s++)
                _mm512_store_si512(out + s * tile_rows * byte_codes, decode(p + s * Decoder::words));
        }
    }

    void multiply(int64_t step, int64_t end, int first_tile, const int8_t* w) const {
        constexpr int64_t size = byte_codes * tile_inputs;
        const int tiles = std::min(sum_tiles, x_.tiles - first_tile);
        const int8_t* in = x_.values.data() + (step * x_.tiles + first_tile) * size;
        zero_sums();
        for (; step < end; step++, w += tile_rows * byte_codes, in += x_.tiles * size) {
            _tile_loadd(4, w, 64);
            _tile_loadd(6, in, 64);
            _tile_dpbssd(0, 4, 6);
            if (tiles > 1) {
                _tile_loadd(7, in + size, 64);
                _tile_dpbssd(1, 4, 7);
            }
            if (tiles > 2) {
                _tile_loadd(6, in + 2 * size, 64);
                _tile_dpbssd(2, 4, 6);
            }
            if (tiles > 3) {
                _tile_loadd(7, in + 3 * size, 64);
                _tile_dpbssd(3, 4, 7);
            }
        }
    }

    void add_scaled(int64_t group, int count, int first_tile, float* totals) {
        _tile_stored(0, sums_, 64);
        if (first_tile + 1 < x_.tiles) _tile_stored(1, sums_ + 256, 64);
        if (first_tile + 2 < x_.tiles) _tile_stored(2, sums_ + 512, 64);
        if (first_tile + 3 < x_.tiles) _tile_stored(3, sums_ + 768, 64);
        tiles_meet_memory();
        const int tiles = std::min(sum_tiles, x_.tiles - first_tile);
        for (int r = 0; r < count; r++) {
            const __m512 scale = _mm512_set1_ps(scales_.scale(r)[group]);
            for (int t = 0; t < tiles; t++) {
                float* total = totals + ((first_tile + t) * tile_rows + r) * tile_inputs;
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums_ + (t * tile_rows + r) * tile_inputs));
                _mm512_store_ps(total, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(total)));
            }
        }
    }

    const hfl_matrix& w_;
    const ByteInputs& x_;
    const Decoder decoder_;
    const int64_t steps_, group_steps_;
    RowScales scales_;
    alignas(64) int8_t weights_[2][run * tile_rows * byte_codes];
    alignas(64) int32_t sums_[sums_size];
};

template <class Decoder>
void multiply_bytes(const hfl_matrix& w, const ByteInputs& x, int64_t first, int64_t last, void* y, int64_t y_first,
                    int type) {
    const TileShapes shapes(tile_inputs);
    _tile_loadconfig(&shapes);
    ByteProduct<Decoder> product(w, x);
    alignas(64) float totals[most_inputs * tile_rows];
    const float unit = 1.0f / static_cast<float>(w.integer_multiplier);
    for (int64_t row = first; row < last; row += tile_rows) {
        const int count = static_cast<int>(std::min<int64_t>(tile_rows, last - row));
        product(row, count, totals);
        for (int r = 0; r < count; r++)
            for (int64_t i = 0; i < x.count; i++) {
                float result = totals[(i / tile_inputs * tile_rows + r) * tile_inputs + i % tile_inputs] * unit;
                for (int64_t g = 0; w.zero_kind != HFL_NO_ZERO && g < w.groups; g++)
                    result -= product.scales().scale(r)[g] * product.scales().zero(r)[g] * x.sums[i * w.groups + g];
                store_float(y, y_first + i * w.rows + row + r, result * x.scale[i], type);
            }
    }
    _tile_release();
}

}  // namespace
