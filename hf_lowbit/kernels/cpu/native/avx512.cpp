// x86-64 processors with AVX-512 including VBMI and VNNI (Intel since Ice Lake, AMD since Zen 4).
#include "kernels.h"
#include "simd_avx512.h"
#include "dot_avx512.h"
#include "math_avx512.h"
#include "isa.inc"
#include "panels_int8.h"

namespace {

constexpr int few_codes = 8;  // inputs, at most, that are better multiplied by what was decoded in registers

int few_or_many(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale, int64_t x_groups,
                int64_t m, int type, void* const* y, int threads) {
    bool panels = m > few_codes;
    for (int i = 0; i < count; i++) {
        if (!multiplies_int8(matrices[i]) || (x_groups != 1 && x_groups != matrices[i]->groups)) return -1;
        panels = panels && with_byte_decoder<ByteDecoder, true>(*matrices[i], [](auto) {});
    }
    const auto multiply = panels ? linear_byte_panels : linear_int8;
    return multiply(matrices, count, x, x_scale, x_groups, m, type, y, threads);
}

constexpr Kernels with_panels(Kernels kernels) {
    kernels.linear_int8 = few_or_many;
    kernels.multiplies_many = [](const hfl_matrix* w, int type) {
        const bool panels = type == HFL_INT8 && multiplies_int8(w) && with_byte_decoder<ByteDecoder, true>(*w, [](auto) {});
        return static_cast<int>(panels);
    };
    return kernels;
}

}  // namespace

const Kernels avx512_kernels = with_panels(make_kernels("avx512", runs_avx512));
