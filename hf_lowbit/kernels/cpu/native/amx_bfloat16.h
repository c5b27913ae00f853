// bfloat16 inputs: sixteen rows are decoded to bfloat16 in the first-level cache, a chunk of 32 codes each at a time.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "aligned.h"
#include "amx_tiles.h"
#include "chunks_avx512.h"
#include "geometry.h"
#include "scales.h"

namespace {

constexpr int chunk_codes = 32;

// [chunk of 32 codes][tile of inputs][pair of codes][input][2], pairs in the order of the decoder. One tile has as many
// inputs as there are, several tiles have sixteen each, the last ones of them zeros.
struct ChunkInputs {
    int64_t count;
    int tiles, width;
    Aligned<uint16_t> values;

    template <class Decoder>
    ChunkInputs(Type<Decoder>, const uint16_t* x, int64_t m, int64_t stride, int64_t columns)
        : count(m), tiles(static_cast<int>((m + tile_inputs - 1) / tile_inputs)),
          width(tiles == 1 ? static_cast<int>(m) : tile_inputs), values(columns * tiles * width) {
        uint16_t* out = values.data();
        for (int64_t chunk = 0; chunk < columns; chunk += chunk_codes)
            for (int64_t first = 0; first < m; first += width)
                for (int k = 0; k < chunk_codes / 2; k++) {
                    const uint16_t* codes = x + chunk + 2 * Decoder::pair(k);
                    for (int64_t i = first; i < first + width; i++, out += 2) {
                        if (i < m) std::memcpy(out, codes + i * stride, 2 * sizeof(uint16_t));
                        else out[0] = out[1] = 0;
                    }
                }
    }
    int64_t row_bytes() const { return 4 * width; }
    int64_t tile_size() const { return static_cast<int64_t>(width) * chunk_codes; }
};

template <class Decoder> class ChunkProduct {
  public:
    ChunkProduct(const hfl_matrix& w, const ChunkInputs& x)
        : w_(w), x_(x), decoder_(w), group_chunks_(w.columns / w.groups / chunk_codes),
          has_zero_(w.zero_kind != HFL_NO_ZERO), scales_(w, tile_rows) {}

    // Sums [tile of inputs][row][input] of rows first..first + count; of one tile, four sums to be added up.
    void operator()(int64_t first, int count, float* sums) {
        for (int r = 0; r < count; r++) scales_.select(first + r, r);
        const int64_t chunks = w_.columns / chunk_codes;
        uint16_t *current = weights_[0], *following = weights_[1];  // loading what was just stored takes twice as long
        decode_run(first, count, 0, chunks, current);
        for (int64_t chunk = 0; chunk < chunks; chunk += run, std::swap(current, following)) {
            decode_run(first, count, chunk + run, chunks, following);
            tiles_meet_memory();
            for (int tile = 0; tile < x_.tiles; tile += sum_tiles) {
                float* part = sums + tile / sum_tiles * sums_size;
                if (chunk == 0) zero_sums();
                else if (x_.tiles > sum_tiles) load_sums(part, x_.row_bytes());
                multiply_run(chunk, chunks, tile, current);
                if (x_.tiles > sum_tiles || chunk + run >= chunks) store_sums(part, x_.row_bytes());
            }
        }
        tiles_meet_memory();
    }

  private:
    static constexpr int run = 8;

    // Chunks chunk..chunk + run of each row, as far as there are.
    void decode_run(int64_t first, int count, int64_t chunk, int64_t chunks, uint16_t* out) {
        const int n = static_cast<int>(std::min<int64_t>(run, chunks - chunk));
        if (n <= 0) return;
        constexpr int words = Decoder::words;
        const int64_t row_words = w_.words, next_tile = tile_rows * row_words, group_chunks = group_chunks_;
        const int64_t first_group = chunk / group_chunks;
        const int first_left = static_cast<int>(std::min<int64_t>((first_group + 1) * group_chunks - chunk, n));
        const int later = static_cast<int>(std::min<int64_t>(group_chunks, n));
        const uint32_t* p = w_.codes + first * row_words + chunk * words;
        Decoder decode = decoder_;  // in registers
        for (int r = 0; r < count; r++, p += row_words, out += chunk_codes) {
            for (int k = 0; k < run * words; k += 16) _mm_prefetch(p + next_tile + k, _MM_HINT_T1);
            const float* scale = scales_.scale(r) + first_group;
            const float* zero = has_zero_ ? scales_.zero(r) + first_group : nullptr;
            for (int c = 0, left = first_left; c < n; left = std::min(later, n - c), scale++) {
                decode.group(*scale, zero);
                if (zero) zero++;
                for (const int end = c + left; c < end; c++)
                    _mm512_store_si512(out + c * tile_rows * chunk_codes, decode(p + c * words));
            }
        }
    }

    // Adds the products with the tiles of inputs first_tile..first_tile + 4.
    void multiply_run(int64_t chunk, int64_t chunks, int first_tile, const uint16_t* w) const {
        const int n = static_cast<int>(std::min<int64_t>(run, chunks - chunk));
        const int tiles = std::min(sum_tiles, x_.tiles - first_tile);
        const int64_t bytes = x_.row_bytes(), size = x_.tile_size(), step = x_.tiles * size;
        const uint16_t* in = x_.values.data() + chunk * step + first_tile * size;
        constexpr int next = tile_rows * chunk_codes;
// Tiles are named by literals.
#define HFL_ADD(sum, weights, inputs, at)         \
        {                                         \
            _tile_loadd(inputs, at, bytes);       \
            _tile_dpbf16ps(sum, weights, inputs); \
        }
        // Each sum waits for the one before it: four side by side.
        for (int c = 0; x_.tiles == 1 && c < n; c += 4, in += 4 * size, w += 4 * next) {
            _tile_loadd(4, w, 64);
            HFL_ADD(0, 4, 6, in)
            if (c + 1 < n) _tile_loadd(5, w + next, 64);
            if (c + 1 < n) HFL_ADD(1, 5, 7, in + size)
            if (c + 2 < n) _tile_loadd(4, w + 2 * next, 64);
            if (c + 2 < n) HFL_ADD(2, 4, 6, in + 2 * size)
            if (c + 3 < n) _tile_loadd(5, w + 3 * next, 64);
            if (c + 3 < n) HFL_ADD(3, 5, 7, in + 3 * size)
        }
        for (int c = 0; x_.tiles > 1 && c < n; c++, in += step, w += next) {
            _tile_loadd(4, w, 64);
            HFL_ADD(0, 4, 6, in)
            if (tiles > 1) HFL_ADD(1, 4, 7, in + size)
            if (tiles > 2) HFL_ADD(2, 4, 6, in + 2 * size)
            if (tiles > 3) HFL_ADD(3, 4, 7, in + 3 * size)
        }
#undef HFL_ADD
    }

    const hfl_matrix& w_;
    const ChunkInputs& x_;
    const Decoder decoder_;
    const int64_t group_chunks_;
    const bool has_zero_;
    RowScales scales_;
    alignas(64) uint16_t weights_[2][run * tile_rows * chunk_codes];
};

template <class Decoder>
void multiply_chunks(const hfl_matrix& w, const ChunkInputs& x, int64_t first, int64_t last, uint16_t* y) {
    const TileShapes shapes(x.width);
    _tile_loadconfig(&shapes);
    ChunkProduct<Decoder> product(w, x);
    alignas(64) float sums[most_inputs / tile_inputs / sum_tiles * sums_size];
    for (int64_t row = first; row < last; row += tile_rows) {
        const int count = static_cast<int>(std::min<int64_t>(tile_rows, last - row));
        product(row, count, sums);
        for (int r = 0; r < count; r++)
            for (int64_t i = 0; i < x.count; i++) {
                const float* s = sums + i / x.width * 256 + r * x.width + i % x.width;
                y[i * w.rows + row + r] = to_bfloat16(x.tiles > 1 ? s[0] : (s[0] + s[256]) + (s[512] + s[768]));
            }
    }
    _tile_release();
}

}  // namespace
