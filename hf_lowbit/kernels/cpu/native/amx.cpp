// Products of bfloat16 inputs on processors with AMX (Intel since Sapphire Rapids): sixteen rows of weights are decoded
// to bfloat16 in the first-level cache, a tile of 32 codes at a time, and the matrix unit multiplies them by up to
// 128 inputs, sixteen at once in the time that one would take. All else is left to the AVX-512 kernels, and a few inputs
// too: storing decoded weights and loading them as a tile takes longer than multiplying them where they are.
#include <cpuid.h>

#include "kernels.h"
#include "simd_avx512.h"
#include "chunks_avx512.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <utility>

#include "aligned.h"
#include "geometry.h"
#include "rows.h"

namespace {

constexpr int tile_rows = 16, tile_codes = 32, tile_inputs = 16;
constexpr int sum_tiles = 4, sums_size = sum_tiles * tile_rows * tile_inputs;
constexpr int most_inputs = 128;  // with 4096 codes to a row they fill half a second-level cache
constexpr int few_inputs = 4;  // up to here vectors are faster
constexpr int piece_rows = 4 * tile_rows;  // preparing a piece takes as long as a tile

struct alignas(64) TileShapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // Tiles 0..3: sums [row][input]; 4, 5: weights [row][32]; 6, 7: inputs [pair of codes][input][2].
    explicit TileShapes(int inputs) {
        for (int tile = 0; tile < 8; tile++) {
            rows[tile] = tile_rows;
            row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? 64 : 4 * inputs);
        }
    }
};

// [chunk of 32 codes][tile of inputs][pair of codes][input][2], codes in the order of the decoder. One tile has as many
// inputs as there are, several tiles have sixteen each, the last ones of them zeros.
struct TileInputs {
    int64_t count;
    int tiles, width;
    Aligned<uint16_t> values;

    template <class Decoder>
    TileInputs(Type<Decoder>, const uint16_t* x, int64_t m, int64_t stride, int64_t columns)
        : count(m), tiles(static_cast<int>((m + tile_inputs - 1) / tile_inputs)),
          width(tiles == 1 ? static_cast<int>(m) : tile_inputs), values(columns * tiles * width) {
        uint16_t* out = values.data();
        int position[tile_codes];
        for (int e = 0; e < tile_codes; e++) position[e] = Decoder::position(e);
        for (int64_t chunk = 0; chunk < columns; chunk += tile_codes)
            for (int64_t first = 0; first < m; first += width)
                for (int pair = 0; pair < tile_codes / 2; pair++) {
                    const uint16_t* a = x + chunk + position[2 * pair];
                    const uint16_t* b = x + chunk + position[2 * pair + 1];
                    for (int64_t i = first; i < first + width; i++, out += 2) {
                        out[0] = i < m ? a[i * stride] : 0;
                        out[1] = i < m ? b[i * stride] : 0;
                    }
                }
    }
    int64_t row_bytes() const { return 4 * width; }
    int64_t tile_size() const { return static_cast<int64_t>(width) * tile_codes; }
};

template <class Decoder> class TileProduct {
  public:
    TileProduct(const hfl_matrix& w, const TileInputs& x) : w_(w), x_(x), decoder_(w), group_chunks_(w.columns / w.groups / tile_codes),
          has_zero_(w.zero_kind != HFL_NO_ZERO) {
        for (int r = 0; r < tile_rows; r++) scales_.emplace_back(w, 0);
    }

    // Sums [tile of inputs][row][input] of rows first..first + count; of one tile, four sums to be added up.
    void operator()(int64_t first, int count, float* sums) {
        for (int r = 0; r < count; r++) scales_[r].select(first + r);
        const int64_t chunks = w_.columns / tile_codes;
        uint16_t *current = weights_[0], *following = weights_[1];  // loading what was just stored takes twice as long
        decode_run(first, count, 0, chunks, current);
        for (int64_t chunk = 0; chunk < chunks; chunk += run, std::swap(current, following)) {
            decode_run(first, count, chunk + run, chunks, following);
            asm volatile("" ::: "memory");  // tile loads do not say what they read
            for (int tile = 0; tile < x_.tiles; tile += sum_tiles) {
                float* part = sums + tile / sum_tiles * sums_size;
                if (chunk == 0) zero_sums();
                else if (x_.tiles > sum_tiles) load_sums(part);
                multiply_run(chunk, chunks, tile, current);
                if (x_.tiles > sum_tiles || chunk + run >= chunks) store_sums(part);
            }
        }
        asm volatile("" ::: "memory");
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
        for (int r = 0; r < count; r++, p += row_words, out += tile_codes) {
            for (int k = 0; k < run * words; k += 16) _mm_prefetch(p + next_tile + k, _MM_HINT_T1);
            const float* scale = scales_[r].scale.data() + first_group;
            const float* zero = has_zero_ ? scales_[r].zero.data() + first_group : nullptr;
            for (int c = 0, left = first_left; c < n; left = std::min(later, n - c), scale++) {
                decode.group(*scale, zero);
                if (zero) zero++;
                for (const int end = c + left; c < end; c++)
                    _mm512_store_si512(out + c * tile_rows * tile_codes, decode(p + c * words));
            }
        }
    }

    static void zero_sums() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    void load_sums(const float* sums) const {
        const int64_t bytes = x_.row_bytes();
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + 256, bytes);
        _tile_loadd(2, sums + 512, bytes);
        _tile_loadd(3, sums + 768, bytes);
    }
    void store_sums(float* sums) const {
        const int64_t bytes = x_.row_bytes();
        _tile_stored(0, sums, bytes);
        _tile_stored(1, sums + 256, bytes);
        _tile_stored(2, sums + 512, bytes);
        _tile_stored(3, sums + 768, bytes);
    }

    // Adds the products with the tiles of inputs first_tile..first_tile + 4.
    void multiply_run(int64_t chunk, int64_t chunks, int first_tile, const uint16_t* w) const {
        const int n = static_cast<int>(std::min<int64_t>(run, chunks - chunk));
        const int tiles = std::min(sum_tiles, x_.tiles - first_tile);
        const int64_t bytes = x_.row_bytes(), size = x_.tile_size(), step = x_.tiles * size;
        const uint16_t* in = x_.values.data() + chunk * step + first_tile * size;
        constexpr int next = tile_rows * tile_codes;
// Tiles are named by literals.
#define HFL_ADD(sum, weights, inputs, at)       \
        {                                       \
            _tile_loadd(inputs, at, bytes);     \
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
    const TileInputs& x_;
    const Decoder decoder_;
    const int64_t group_chunks_;
    const bool has_zero_;
    std::vector<RowScales> scales_;
    alignas(64) uint16_t weights_[2][run * tile_rows * tile_codes];
};

template <class Decoder>
void multiply_rows(const hfl_matrix& w, const TileInputs& x, int64_t first, int64_t last, uint16_t* y) {
    const TileShapes shapes(x.width);
    _tile_loadconfig(&shapes);
    TileProduct<Decoder> product(w, x);
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

bool has_chunks(const hfl_matrix& w) {
    return with_chunks(w, [](auto) {});
}

int linear(const hfl_matrix* const* matrices, int count, const void* x, int type, int64_t m, int64_t stride,
           void* const* y, int threads) {
    const bool all = std::all_of(matrices, matrices + count, [](const hfl_matrix* w) { return has_chunks(*w); });
    if (type != HFL_BFLOAT16 || m <= few_inputs || !all)
        return avx512_kernels.linear(matrices, count, x, type, m, stride, y, threads);
    for (int64_t m0 = 0; m0 < m; m0 += most_inputs) {
        const int64_t n = std::min<int64_t>(most_inputs, m - m0);
        std::vector<std::shared_ptr<TileInputs>> inputs(static_cast<size_t>(count));
        for (int i = 0; i < count; i++) {
            if (i && matrices[i - 1]->bits == matrices[i]->bits) { inputs[i] = inputs[i - 1]; continue; }
            const auto* values = static_cast<const uint16_t*>(x) + m0 * stride;
            with_chunks(*matrices[i], [&](auto decoder) {
                inputs[i] = std::make_shared<TileInputs>(decoder, values, n, stride, matrices[i]->columns);
            });
        }
        share_rows(matrices, count, threads, piece_rows, [&](int i, int64_t first, int64_t last) {
            const hfl_matrix& w = *matrices[i];
            with_chunks(w, [&](auto decoder) {
                multiply_rows<typename decltype(decoder)::type>(w, *inputs[i], first, last,
                                                                static_cast<uint16_t*>(y[i]) + m0 * w.rows);
            });
        });
    }
    return 0;
}

// The processor has the unit, and the system saves its registers for this process once asked.
bool runs_here() {
#if defined(__linux__) && defined(__x86_64__)
    unsigned a, b, c, d;
    if (!avx512_kernels.runs_here() || !__builtin_cpu_supports("avx512bf16")) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

}  // namespace

const Kernels amx_kernels = {
    "amx", runs_here, linear,
    [](const hfl_matrix* const* matrices, int count, const int8_t* x, const float* scale, int64_t m, int type,
       void* const* y, int threads) {
        return avx512_kernels.linear_int8(matrices, count, x, scale, m, type, y, threads);
    },
    [](const hfl_matrix* w) { return avx512_kernels.multiplies_int8(w); },
    [](const hfl_matrix* w) { return avx512_kernels.multiplies_in_registers(w); },
    [](const hfl_matrix* w, int type) { return static_cast<int>(type == HFL_BFLOAT16 && has_chunks(*w)); },
    [](const hfl_matrix* w, const int64_t* index, int64_t first, int64_t n, void* out, int type, int threads) {
        avx512_kernels.decode(w, index, first, n, out, type, threads);
    }};
