// Codes out of the words they are packed in.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#if defined(__BMI2__)
#include <immintrin.h>
#endif

#include "lowbit.h"

namespace {

// Codes that lie in `count` words, a byte each. `out` has room for eight more.
template <int bits> void unpack_dense(const uint32_t* words, int64_t count, int64_t codes, uint8_t* out) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(words);
    const int64_t size = count * 4;
    uint64_t octet = 0;
    for (int64_t k = 0, at = 0; k < codes; k += 8, at += bits) {
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

inline void unpack_dense(int bits, const uint32_t* words, int64_t count, int64_t codes, uint8_t* out) {
    switch (bits) {
        case 1: return unpack_dense<1>(words, count, codes, out);
        case 2: return unpack_dense<2>(words, count, codes, out);
        case 3: return unpack_dense<3>(words, count, codes, out);
        case 4: return unpack_dense<4>(words, count, codes, out);
        case 5: return unpack_dense<5>(words, count, codes, out);
        case 6: return unpack_dense<6>(words, count, codes, out);
        case 7: return unpack_dense<7>(words, count, codes, out);
        default: std::memcpy(out, words, static_cast<size_t>(codes));
    }
}

inline void unpack_row(const hfl_matrix& w, int64_t row, uint8_t* out) {
    const uint32_t* words = w.codes + row * w.words;
    if (w.packing == HFL_BASE3) unpack_base3(words, w.columns, out);
    else unpack_dense(w.bits, words, w.words, w.columns, out);
}

}  // namespace
