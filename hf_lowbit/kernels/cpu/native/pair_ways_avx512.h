// Which way bfloat16 inputs take where pairs of them are multiplied at once.
#pragma once
#include "digit_pairs_avx512.h"
#include "pairs_avx512.h"

namespace {

// By one bfloat16 number for each value, or by two.
enum Pairing : char { no_pairs, whole_pairs, split_pairs };

inline Pairing pairing(const hfl_matrix& w) {
    if (w.bits == 7 || !lanes_fit_groups(w)) return no_pairs;
    if (w.packing == HFL_BASE3) return InDigitPairs::fits(w) ? whole_pairs : no_pairs;
    if (is_bfloat16(w)) return whole_pairs;
    return w.bits < 7 && is_finite(w) ? split_pairs : no_pairs;
}

// Calls use(Type<the way>) of a matrix that has pairs.
template <class Use> void with_pairs(const hfl_matrix& w, Pairing pairs, Use use) {
    auto with_width = [&](auto bits) {
        constexpr int width = decltype(bits)::value;
        if (pairs == whole_pairs) use(Type<InPairs<width>>());
        else use(Type<InSplitPairs<width>>());
    };
    if (w.packing == HFL_BASE3) return use(Type<InDigitPairs>());
    switch (w.bits) {
        case 1: return with_width(Constant<1>());
        case 2: return with_width(Constant<2>());
        case 3: return with_width(Constant<3>());
        case 4: return with_width(Constant<4>());
        case 5: return with_width(Constant<5>());
        case 6: return with_width(Constant<6>());
        default: return use(Type<InBytePairs>());
    }
}

}  // namespace
