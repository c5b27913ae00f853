// Conversions between float32 and the 16-bit types, rounding to nearest even as torch does.
#pragma once
#include <cstdint>
#include <cstring>

#include "lowbit.h"

namespace {

inline uint32_t bits_of(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float float_of(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }

inline float from_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }
inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#if defined(__F16C__)
inline float from_float16(uint16_t half) { return _cvtsh_ss(half); }
inline uint16_t to_float16(float value) { return _cvtss_sh(value, 0); }
#else
inline float from_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
    if (magnitude >= 0x0f800000) return float_of(sign | magnitude | 0x7f800000);  // infinity, NaN
    return float_of(bits_of(float_of(magnitude) * 0x1p112f) | sign);             // subnormals become normal
}
inline uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds beyond 65504
    if (magnitude < 0x38800000)  // subnormal: adding 0.5 lets the addition round at 2^-24
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}
#endif

inline float load_as_float(const void* data, int64_t i, int type) {
    if (type == HFL_FLOAT32) return static_cast<const float*>(data)[i];
    const uint16_t half = static_cast<const uint16_t*>(data)[i];
    return type == HFL_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}
inline void store_float(void* data, int64_t i, float value, int type) {
    if (type == HFL_FLOAT32)
        static_cast<float*>(data)[i] = value;
    else
        static_cast<uint16_t*>(data)[i] = type == HFL_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}
inline void load_floats(float* out, const void* data, int64_t first, int64_t n, int type) {
    if (type == HFL_FLOAT32)
        std::memcpy(out, static_cast<const float*>(data) + first, static_cast<size_t>(n) * 4);
    else if (type == HFL_BFLOAT16)
        for (int64_t i = 0; i < n; i++) out[i] = from_bfloat16(static_cast<const uint16_t*>(data)[first + i]);
    else
        for (int64_t i = 0; i < n; i++) out[i] = from_float16(static_cast<const uint16_t*>(data)[first + i]);
}
inline void store_floats(void* data, int64_t first, const float* values, int64_t n, int type) {
    if (type == HFL_FLOAT32)
        std::memcpy(static_cast<float*>(data) + first, values, static_cast<size_t>(n) * 4);
    else if (type == HFL_BFLOAT16)
        for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(data)[first + i] = to_bfloat16(values[i]);
    else
        for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(data)[first + i] = to_float16(values[i]);
}

}  // namespace
