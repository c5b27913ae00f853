// Vectors of eight lanes in standard C++: what every compiler and processor can do.
#pragma once
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace {

struct Simd {
    static constexpr int lanes = 8;
    static constexpr int max_batch = 4;
    static constexpr int max_batch_of_integers = 1;  // that meet as floats: more take too long to compile
    static constexpr int rows_together = 1;  // of one input, in registers
    static constexpr int first_arithmetic_width = 9;  // never: a table in memory is as fast as arithmetic
    struct Float { float lane[lanes]; };
    struct Int { uint32_t lane[lanes]; };

    template <class Make> static Float make(Make make) {
        Float r;
        for (int i = 0; i < lanes; i++) r.lane[i] = make(i);
        return r;
    }
    template <class Make> static Int make_int(Make make) {
        Int r;
        for (int i = 0; i < lanes; i++) r.lane[i] = make(i);
        return r;
    }
    static Float zero() { return set(0.0f); }
    static Float set(float v) { return make([&](int) { return v; }); }
    static Float load(const float* p) { Float r; std::memcpy(&r, p, sizeof r); return r; }
    static Float load_halves(const uint16_t* p, bool are_bfloat16) {
        return make([&](int i) { return are_bfloat16 ? from_bfloat16(p[i]) : from_float16(p[i]); });
    }
    static Float set_half(const uint16_t* p, bool is_bfloat16) {
        return set(is_bfloat16 ? from_bfloat16(*p) : from_float16(*p));
    }
    static Float pick_bfloat16(const uint16_t* p, Int at) { return permute(load_halves(p, true), at); }
    static void store(float* p, Float a) { std::memcpy(p, &a, sizeof a); }
    static Float add(Float a, Float b) { return make([&](int i) { return a.lane[i] + b.lane[i]; }); }
    static Float subtract(Float a, Float b) { return make([&](int i) { return a.lane[i] - b.lane[i]; }); }
    static Float multiply(Float a, Float b) { return make([&](int i) { return a.lane[i] * b.lane[i]; }); }
    static Float multiply_add(Float a, Float b, Float c) {
        return make([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static float sum(Float a) {
        float total = 0;
        for (float v : a.lane) total += v;
        return total;
    }
    static Float sums(const Float* a) { return make([&](int i) { return sum(a[i]); }); }
    static Float permute(Float a, Int index) { return make([&](int i) { return a.lane[index.lane[i] & 7]; }); }

    static Int load_int(const void* p) { Int r; std::memcpy(&r, p, sizeof r); return r; }
    static Int widen(const uint8_t* p) { return make_int([&](int i) { return uint32_t(p[i]); }); }
    static Int shift_right(Int a, int n) { return make_int([&](int i) { return a.lane[i] >> n; }); }
    static Int shift_left(Int a, int n) { return make_int([&](int i) { return a.lane[i] << n; }); }
    static Int either(Int a, Int b) { return make_int([&](int i) { return a.lane[i] | b.lane[i]; }); }
    // word q of each lane, where a lane owns `stride` consecutive words
    template <bool> static Int load_codes(const void* p) { return load_int(p); }
    template <int stride, int q> static Int strided(const Int* words) {
        return make_int([&](int i) { return words[(i * stride + q) / lanes].lane[(i * stride + q) % lanes]; });
    }

    template <int bits> struct Table {
        const float* table;
        explicit Table(const float* t) : table(t) {}
        Float operator()(Int code) const {
            return make([&](int i) { return table[code.lane[i] & ((1u << bits) - 1)]; });
        }
    };
    // Of values below 2^16: a * b / 2^16.
    static Int high_product(Int a, int b) { return make_int([&](int i) { return a.lane[i] * uint32_t(b) >> 16; }); }
    static Int set_int(int v) { return make_int([&](int) { return uint32_t(v); }); }
    static Int both(Int a, Int b) { return make_int([&](int i) { return a.lane[i] & b.lane[i]; }); }
    static Int both(Int a, int mask) { return make_int([&](int i) { return a.lane[i] & uint32_t(mask); }); }
    static Float to_float(Int a) { return make([&](int i) { return float(int32_t(a.lane[i])); }); }
    // Codes in the topmost bits: sign, exponent, mantissa; the garbage below them must be masked away.
    static Float minifloat(Int top, int exponent_bits, int bits, float factor) {
        return make([&](int i) {
            const uint32_t magnitude = (top.lane[i] & 0x7fffffffu) >> (32 - bits) << (24 + exponent_bits - bits);
            float value;
            std::memcpy(&value, &magnitude, 4);
            value *= factor;
            return top.lane[i] >> 31 ? -value : value;
        });
    }
    struct Planes { explicit Planes(const float*) {} void operator()(Int, Float*) const {} };  // not used here
    static constexpr bool has_planes = false;
    static constexpr int plane_position(int, int) { return 0; }
};

}  // namespace
