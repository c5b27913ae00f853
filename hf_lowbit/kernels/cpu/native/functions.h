// Functions of the lanes of a vector, from the operations that the including file has chosen.
#pragma once

namespace {

constexpr float log2_of_e = 1.44269504088896340736f;

// Two to the power of v: relative error below 1e-7, and exactly 1 at 0, near which the decays of slow states lie. The
// polynomial is the best of its degree on -1/2..1/2 with that value at 0 (error 2e-9).
HFL_INLINE inline Simd::Float exp2(Simd::Float v) {
    v = Math::in_range_of_powers(v);
    const Simd::Float whole = Math::round(v), x = Math::fraction(v, whole);
    Simd::Float p = Simd::set(0.00015353361959569156f);
    for (const float c : {0.0013398873852565885f, 0.00961843691766262f, 0.055503323674201965f, 0.24022647738456726f,
                          0.6931471824645996f, 1.0f})
        p = Simd::multiply_add(p, x, Simd::set(c));
    return Math::times_power(p, whole);
}

// log(1 + u) for u in 0..1, as 2 artanh(s): relative error below 2e-7.
inline Simd::Float log1p(Simd::Float u) {
    const Simd::Float s = Math::divide(u, Simd::add(u, Simd::set(2.0f))), t = Simd::multiply(s, s);
    Simd::Float p = Simd::set(0.2817833423614502f);
    for (const float c : {0.27960601449012756f, 0.40024909377098083f, 0.6666631698608398f, 2.0f})
        p = Simd::multiply_add(p, t, Simd::set(c));
    return Simd::multiply(p, s);
}

inline Simd::Float softplus(Simd::Float v) {
    const Simd::Float u = exp2(Simd::multiply(Math::magnitude(v), Simd::set(-log2_of_e)));
    return Simd::add(Math::at_least(0.0f, v), log1p(u));
}

inline Simd::Float silu(Simd::Float v) {
    return Math::divide(v, Simd::add(Simd::set(1.0f), exp2(Simd::multiply(v, Simd::set(-log2_of_e)))));
}

// The int8 code of v, from one over the scale: hf_lowbit.kernels.quantize_codes. Storing it as int8 rounds it.
inline Simd::Float code_before_rounding(Simd::Float v, Simd::Float inverse) {
    const Simd::Float scaled = Math::zero_if_nan(Simd::multiply(v, inverse));
    return Math::at_least(-127.0f, Math::at_most(127.0f, scaled));
}
inline Simd::Float code_of(Simd::Float v, Simd::Float inverse) { return Math::round(code_before_rounding(v, inverse)); }

inline int64_t whole_vectors(int64_t n) { return (n + Simd::lanes - 1) / Simd::lanes * Simd::lanes; }

constexpr int64_t bytes_of(int type) { return type == HFL_FLOAT32 ? 4 : type == HFL_INT8 ? 1 : 2; }

// The first `count` lanes, zeros behind them.
template <int type> HFL_INLINE inline Simd::Float load_first(const void* p, int64_t count) {
    if (count >= Simd::lanes) return Math::load<type>(p);
    char buffer[Simd::lanes * 4] = {};
    std::memcpy(buffer, p, static_cast<size_t>(count * bytes_of(type)));
    return Math::load<type>(buffer);
}
template <int type> HFL_INLINE inline void store_first(void* p, Simd::Float a, int64_t count) {
    if (count >= Simd::lanes) return Math::store<type>(p, a);
    char buffer[Simd::lanes * 4];
    Math::store<type>(buffer, a);
    std::memcpy(p, buffer, static_cast<size_t>(count * bytes_of(type)));
}

// Calls use(Constant<type>()).
template <class Use> HFL_INLINE inline void with_type(int64_t type, Use use) {
    switch (type) {
        case HFL_FLOAT32: return use(Constant<HFL_FLOAT32>());
        case HFL_BFLOAT16: return use(Constant<HFL_BFLOAT16>());
        case HFL_FLOAT16: return use(Constant<HFL_FLOAT16>());
        default: return use(Constant<HFL_INT8>());
    }
}

}  // namespace
