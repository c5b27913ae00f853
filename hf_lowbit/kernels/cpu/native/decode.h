// Whole rows to floats, with the same operations in the same order as the torch reference: equal to the last bit.
#pragma once
#include <array>
#include <cstring>
#include <vector>

#include "geometry.h"
#include "threads.h"
#include "values.h"

namespace {

// Codes of one row, a byte each. `out` has room for eight more.
template <int bits> void unpack_dense(const uint32_t* words, int64_t count, int64_t columns, uint8_t* out) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(words);
    const int64_t size = count * 4;
    uint64_t octet = 0;
    for (int64_t k = 0, at = 0; k < columns; k += 8, at += bits) {
        if (at + bits <= size)
            std::memcpy(&octet, bytes + at, bits);
        else
            for (int64_t i = at; i < size; i++) octet = i == at ? bytes[i] : octet | uint64_t(bytes[i]) << 8 * (i - at);
        uint64_t spread = 0;
        constexpr uint64_t low = (1u << bits) - 1;
#if defined(__BMI2__)
        spread = _pdep_u64(octet, 0x0101010101010101u * low);
#else
        for (int i = 0; i < 8; i++) spread |= (octet >> (i * bits) & low) << (8 * i);
#endif
        std::memcpy(out + k, &spread, 8);
    }
}

inline void unpack_base3(const uint32_t* words, int64_t columns, uint8_t* out) {
    static const std::array<std::array<uint8_t, 8>, 256> digits = [] {
        std::array<std::array<uint8_t, 8>, 256> all{};
        for (int byte = 0; byte < 256; byte++)
            for (int i = 0, rest = byte; i < 5; i++, rest /= 3) all[byte][i] = static_cast<uint8_t>(rest % 3);
        return all;
    }();
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(words);
    for (int64_t k = 0; k < columns; k += 5) std::memcpy(out + k, digits[bytes[k / 5]].data(), 8);
}

inline void unpack_row(const hfl_matrix& w, int64_t row, uint8_t* out) {
    const uint32_t* words = w.codes + row * w.words;
    if (w.packing == HFL_BASE3) return unpack_base3(words, w.columns, out);
    switch (w.bits) {
        case 1: return unpack_dense<1>(words, w.words, w.columns, out);
        case 2: return unpack_dense<2>(words, w.words, w.columns, out);
        case 3: return unpack_dense<3>(words, w.words, w.columns, out);
        case 4: return unpack_dense<4>(words, w.words, w.columns, out);
        case 5: return unpack_dense<5>(words, w.words, w.columns, out);
        case 6: return unpack_dense<6>(words, w.words, w.columns, out);
        case 7: return unpack_dense<7>(words, w.words, w.columns, out);
        default: std::memcpy(out, words, static_cast<size_t>(w.columns));
    }
}

// Decodes rows one after the other; keeps what is the same for all of them.
class RowDecoder {
  public:
    explicit RowDecoder(const hfl_matrix& matrix)
        : w_(matrix), scales_(matrix, Simd::lanes), codes_(static_cast<size_t>(matrix.columns + 64)) {}

    void operator()(int64_t row, float* out) {
        unpack_row(w_, row, codes_.data());
        scales_.select(row);
        with_values(w_, [&](auto bits, auto decoder) {
            const Values<decltype(bits)::value, decltype(decoder)::value> values(w_);
            const int64_t group = w_.columns / w_.groups;
            for (int64_t g = 0; g < w_.groups; g++) {
                const bool shifted = w_.zero_kind != HFL_NO_ZERO;
                const float scale = scales_.scale[g], zero = shifted ? scales_.zero[g] : 0.0f;
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
