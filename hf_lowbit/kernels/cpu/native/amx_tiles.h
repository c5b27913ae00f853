// The tile registers of AMX: two-dimensional, sixteen rows of up to 64 bytes.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int tile_rows = 16, tile_inputs = 16, sum_tiles = 4, sums_size = sum_tiles * tile_rows * tile_inputs;
constexpr int most_inputs = 128;  // with 4096 codes to a row they fill half a second-level cache
constexpr int piece_rows = 4 * tile_rows;  // preparing a piece of work takes as long as one tile of rows

// Tiles 0..3: sums [row][input]; 4, 5: weights [row][64 bytes]; 6, 7: inputs [four bytes of codes][input][four bytes].
struct alignas(64) TileShapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileShapes(int inputs) {
        for (int tile = 0; tile < 8; tile++) {
            rows[tile] = tile_rows;
            row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? 64 : 4 * inputs);
        }
    }
};

// Tile loads do not tell the compiler what they read, nor stores what they write.
inline void tiles_meet_memory() { asm volatile("" ::: "memory"); }

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
inline void load_sums(const void* sums, int64_t row_bytes) {
    const char* at = static_cast<const char*>(sums);
    _tile_loadd(0, at, row_bytes);
    _tile_loadd(1, at + 1024, row_bytes);
    _tile_loadd(2, at + 2048, row_bytes);
    _tile_loadd(3, at + 3072, row_bytes);
}
inline void store_sums(void* sums, int64_t row_bytes) {
    char* at = static_cast<char*>(sums);
    _tile_stored(0, at, row_bytes);
    _tile_stored(1, at + 1024, row_bytes);
    _tile_stored(2, at + 2048, row_bytes);
    _tile_stored(3, at + 3072, row_bytes);
}

}  // namespace
