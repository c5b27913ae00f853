// Processors with AMX (Intel since Sapphire Rapids): decoded weights are multiplied by a matrix unit, by sixteen inputs in
// the time that one would take. All else is left to the AVX-512 kernels, and a few inputs too: storing decoded weights
// and loading them as a tile takes longer than multiplying them where they are.
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <memory>

#include "kernels.h"
#include "simd_avx512.h"
#include "amx_bfloat16.h"
#include "amx_int8.h"
#include "rows.h"

namespace {

constexpr int few_inputs = 4;

bool has_chunks(const hfl_matrix& w) {
    return with_chunks(w, [](auto) {});
}

// Neighbours of one format.
bool share_inputs(const hfl_matrix& a, const hfl_matrix& b) {
    return a.bits == b.bits && a.groups == b.groups && a.zero_kind == b.zero_kind;
}

int linear(const hfl_matrix* const* matrices, int count, const void* x, int type, int64_t m, int64_t stride,
           void* const* y, int threads) {
    const bool all = std::all_of(matrices, matrices + count, [](const hfl_matrix* w) { return has_chunks(*w); });
    if (type != HFL_BFLOAT16 || m <= few_inputs || !all)
        return avx512_bf16_kernels.linear(matrices, count, x, type, m, stride, y, threads);
    for (int64_t m0 = 0; m0 < m; m0 += most_inputs) {
        const int64_t n = std::min<int64_t>(most_inputs, m - m0);
        std::vector<std::shared_ptr<ChunkInputs>> inputs(static_cast<size_t>(count));
        for (int i = 0; i < count; i++) {
            if (i && share_inputs(*matrices[i - 1], *matrices[i])) { inputs[i] = inputs[i - 1]; continue; }
            const auto* values = static_cast<const uint16_t*>(x) + m0 * stride;
            with_chunks(*matrices[i], [&](auto decoder) {
                inputs[i] = std::make_shared<ChunkInputs>(decoder, values, n, stride, matrices[i]->columns);
            });
        }
        share_rows(matrices, count, n, threads, piece_rows, [&](int i, int64_t first, int64_t last) {
            const hfl_matrix& w = *matrices[i];
            with_chunks(w, [&](auto decoder) {
                multiply_chunks<typename decltype(decoder)::type>(w, *inputs[i], first, last,
                                                                static_cast<uint16_t*>(y[i]) + m0 * w.rows);
            });
        });
    }
    return 0;
}

int linear_int8(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* scale, int64_t x_groups,
                int64_t m, int type, void* const* y, int threads) {
    bool all = m > few_inputs && x_groups == 1;
    for (int i = 0; i < count; i++) {
        if (!avx512_kernels.multiplies_int8(matrices[i])) return -1;
        all = all && with_byte_decoder<Bytes, false>(*matrices[i], [](auto) {});
    }
    if (!all) return avx512_kernels.linear_int8(matrices, count, x, scale, x_groups, m, type, y, threads);
    for (int64_t m0 = 0; m0 < m; m0 += most_inputs) {
        const int64_t n = std::min<int64_t>(most_inputs, m - m0);
        std::vector<std::shared_ptr<ByteInputs>> inputs(static_cast<size_t>(count));
        for (int i = 0; i < count; i++) {
            const hfl_matrix& w = *matrices[i];
            if (i && share_inputs(*matrices[i - 1], w)) { inputs[i] = inputs[i - 1]; continue; }
            with_byte_decoder<Bytes, false>(w, [&](auto decoder) {
                inputs[i] = std::make_shared<ByteInputs>(decoder, w, x + m0 * w.columns, scale + m0, n);
            });
        }
        share_rows(matrices, count, n, threads, piece_rows, [&](int i, int64_t first, int64_t last) {
            const hfl_matrix& w = *matrices[i];
            with_byte_decoder<Bytes, false>(w, [&](auto decoder) {
                multiply_bytes<typename decltype(decoder)::type>(w, *inputs[i], first, last, y[i], m0 * w.rows, type);
            });
        });
    }
    return 0;
}

// The processor has the unit, and the system saves its registers for this process once asked.
bool runs_here() {
#if defined(__linux__) && defined(__x86_64__)
    unsigned a, b, c, d;
    if (!avx512_bf16_kernels.runs_here()) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1))
        return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

}  // namespace

const Kernels amx_kernels = {
    "amx", runs_here, linear, linear_int8,
    [](const hfl_matrix* w) { return avx512_kernels.multiplies_int8(w); },
    [](const hfl_matrix* w) { return avx512_kernels.multiplies_in_registers(w); },
    [](const hfl_matrix* w, int type) {
        return type == HFL_BFLOAT16 ? static_cast<int>(has_chunks(*w)) : avx512_kernels.multiplies_many(w, type);
    },
    [](const hfl_matrix* w, const int64_t* index, int64_t first, int64_t n, void* out, int type, int threads) {
        avx512_kernels.decode(w, index, first, n, out, type, threads);
    },
    [](const hfl_scan& s, int threads) { return avx512_kernels.selective_scan(s, threads); },
    [](const hfl_convolution& c, int threads) { return avx512_kernels.causal_convolution(c, threads); },
    [](const hfl_rounding& r, int threads) { avx512_kernels.rounding_errors(r, threads); },
    [](auto... arguments) { avx512_kernels.quantize(arguments...); }};
