// Which decoder makes bytes of a layout's codes, for products with int8 inputs that decode once for many of them.
#pragma once
#include "lowbit.h"
#include "unroll.h"

namespace {

constexpr int byte_codes = 64;  // of a step: all lie in one group

// Calls use(Type<Decoder<bits>>) and returns true, or false for layouts that have none. `across`: codes may cross bytes.
template <template <int> class Decoder, bool across, class Use> bool with_byte_decoder(const hfl_matrix& w, Use use) {
    if (w.packing != HFL_DENSE || w.columns % byte_codes || w.columns / w.groups % byte_codes) return false;
    switch (w.bits) {
        case 1: return use(Type<Decoder<1>>()), true;
        case 2: return use(Type<Decoder<2>>()), true;
        case 4: return use(Type<Decoder<4>>()), true;
        case 8: return use(Type<Decoder<8>>()), true;
    }
    if constexpr (across) switch (w.bits) {
        case 3: return use(Type<Decoder<3>>()), true;
        case 5: return use(Type<Decoder<5>>()), true;
        case 6: return use(Type<Decoder<6>>()), true;
        case 7: return use(Type<Decoder<7>>()), true;
    }
    return false;
}

}  // namespace
