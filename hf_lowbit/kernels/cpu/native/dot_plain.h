// int8 dot products in standard C++.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

struct Dot {
    static constexpr int lanes = 8;  // int32 sums, four bytes each
    struct Int { uint8_t byte[4 * lanes]; };

    template <int bits> struct Weights {
        int8_t values[1 << bits];
        explicit Weights(const int8_t* table) { std::memcpy(values, table, sizeof values); }
        template <int j> Int at(Int words) const {
            for (uint8_t& byte : words.byte)
                byte = static_cast<uint8_t>(values[byte >> (j * bits) & ((1 << bits) - 1)]);
            return words;
        }
    };
    static constexpr bool has_quads = false;
    template <int> struct Quads { static constexpr int steps = 1; };  // not used here
    static Int load(const void* p) { Int r; std::memcpy(&r, p, sizeof r); return r; }
    template <bool> static Int load_codes(const void* p) { return load(p); }
    static Int start(const int32_t*) { return zero(); }
    static void add_start(const void*, int32_t*) {}
    static Int zero() { return {}; }
    static Int add(Int sum, Int w, Int x) {
        int32_t total[lanes];
        std::memcpy(total, &sum, sizeof total);
        for (int i = 0; i < 4 * lanes; i++) total[i / 4] += int8_t(w.byte[i]) * int8_t(x.byte[i]);
        return load(total);
    }
    static Int sum(Int a, Int b) {
        int32_t x[lanes], y[lanes];
        std::memcpy(x, &a, sizeof x);
        std::memcpy(y, &b, sizeof y);
        for (int i = 0; i < lanes; i++) x[i] += y[i];
        return load(x);
    }
    static Simd::Float to_float(Int sum) {
        int32_t total[lanes];
        std::memcpy(total, &sum, sizeof total);
        return Simd::make([&](int i) { return static_cast<float>(total[i]); });
    }
};

}  // namespace
