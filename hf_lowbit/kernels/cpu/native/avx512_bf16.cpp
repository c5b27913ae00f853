// AVX-512 with products of bfloat16 pairs (Intel since Sapphire Rapids, AMD since Zen 4): inputs of that type are
// multiplied 32 at once, many of them by panels. All else is left to the AVX-512 kernels.
#include "kernels.h"
#include "simd_avx512.h"
#include "pair_ways_avx512.h"
#include "gemv.h"
#include "panels_bfloat16.h"

namespace {

// Inputs, at most, that are better multiplied by what was decoded in registers.
int64_t few_inputs(const hfl_matrix& w) { return pairing(w) == whole_pairs ? 8 : 4; }

bool has_chunks(const hfl_matrix& w) {
    return with_chunks(w, [](auto) {});
}

int linear_pairs(const hfl_matrix* const* matrices, int count, const Pairing* pairs, const void* x, int64_t m,
                 int64_t stride, void* const* y, int threads) {
    multiply_matrices(
        matrices, count, m, y, HFL_BFLOAT16, threads, [](int) { return true; },
        [&](int i, int k) { return matrices[k]->packing == matrices[i]->packing && pairs[k] == pairs[i]; },
        [&](int i, auto use) { with_pairs(*matrices[i], pairs[i], use); },
        [&](auto way, const hfl_matrix& w, const Geometry& geometry) {
            return Inputs(way, w, geometry, x, HFL_BFLOAT16, m, stride);
        },
        [](int, int64_t, int64_t, void*) {});
    return 0;
}

int linear(const hfl_matrix* const* matrices, int count, const void* x, int type, int64_t m, int64_t stride,
           void* const* y, int threads) {
    if (type == HFL_BFLOAT16) {
        auto is_for_panels = [&](const hfl_matrix* w) { return has_chunks(*w) && m > few_inputs(*w); };
        if (std::all_of(matrices, matrices + count, is_for_panels))
            return linear_bfloat16_panels(matrices, count, x, m, stride, y, threads);
        std::vector<Pairing> pairs;
        for (int i = 0; i < count; i++) pairs.push_back(pairing(*matrices[i]));
        if (std::find(pairs.begin(), pairs.end(), no_pairs) == pairs.end())
            return linear_pairs(matrices, count, pairs.data(), x, m, stride, y, threads);
    }
    return avx512_kernels.linear(matrices, count, x, type, m, stride, y, threads);
}

bool runs_here() {
    return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
}

}  // namespace

const Kernels avx512_bf16_kernels = {
    "avx512_bf16", runs_here, linear,
    [](auto... arguments) { return avx512_kernels.linear_int8(arguments...); },
    [](const hfl_matrix* w) { return avx512_kernels.multiplies_int8(w); },
    [](const hfl_matrix* w) { return avx512_kernels.multiplies_in_registers(w); },
    [](const hfl_matrix* w, int type) {
        return type == HFL_BFLOAT16 ? static_cast<int>(has_chunks(*w)) : avx512_kernels.multiplies_many(w, type);
    },
    [](auto... arguments) { avx512_kernels.decode(arguments...); },
    [](const hfl_scan& s, int threads) { return avx512_kernels.selective_scan(s, threads); },
    [](const hfl_convolution& c, int threads) { return avx512_kernels.causal_convolution(c, threads); },
    [](const hfl_rounding& r, int threads) { avx512_kernels.rounding_errors(r, threads); },
    [](auto... arguments) { avx512_kernels.quantize(arguments...); }};
