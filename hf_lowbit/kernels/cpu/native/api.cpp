// The C interface: checks arguments, picks the instruction set.
#include <algorithm>
#include <cstring>
#include <string>

#include "kernels.h"
#include "prefetch.h"
#include "threads.h"

hfl_runner hfl_run = nullptr;

namespace {

// Best first.
const Kernels* const all_kernels[] = {
#if defined(HFL_X86) && !defined(HFL_NO_AVX512) && !defined(HFL_NO_AMX)
    &amx_kernels,
#endif
#if defined(HFL_X86) && !defined(HFL_NO_AVX512) && !defined(HFL_NO_AVX512_BF16)
    &avx512_bf16_kernels,
#endif
#if defined(HFL_X86) && !defined(HFL_NO_AVX512)
    &avx512_kernels,
#endif
#if defined(HFL_X86)
    &avx2_kernels,
#endif
    &plain_kernels};

const Kernels* best() {
    for (const Kernels* kernels : all_kernels)
        if (kernels->runs_here()) return kernels;
    return &plain_kernels;
}

const Kernels* chosen = best();

bool is_type(int type) { return type >= HFL_FLOAT32 && type <= HFL_FLOAT16; }

bool is_valid(const hfl_matrix* w) {
    return w && w->codes && w->scales && w->table && w->rows > 0 && w->columns > 0 && w->groups > 0 &&
           w->columns % w->groups == 0 && w->bits >= 1 && w->bits <= 8 && is_type(w->scale_type) &&
           (w->zero_kind == HFL_NO_ZERO || w->zeros) &&
           w->words == (w->packing == HFL_BASE3 ? ((w->columns + 4) / 5 + 3) / 4 : (w->columns * w->bits + 31) / 32);
}

bool are_valid(const hfl_matrix* const* matrices, int count) {
    for (int i = 0; i < count; i++)
        if (!is_valid(matrices[i]) || matrices[i]->columns != matrices[0]->columns) return false;
    return count > 0;
}

// Values, or floats and codes of them: what has codes needs their scale.
bool is_valid(const hfl_operand& o) {
    return o.values && o.type >= HFL_FLOAT32 && o.type <= HFL_INT8 && (o.type != HFL_INT8 || o.scale) &&
           (!o.scale || o.scale_run > 0);
}

bool has_valid_clusters(const hfl_scan& s) {
    if (!s.state_scale) return true;
    if (s.clusters < 1 || (s.state_scale_columns != 1 && s.state_scale_columns != s.n)) return false;
    const int32_t* cluster = s.state_cluster;
    return !cluster || std::all_of(cluster, cluster + s.channels, [&](int32_t c) { return c >= 0 && c < s.clusters; });
}

bool is_valid(const hfl_scan& s) {
    const bool has_codes = s.state && s.state_type == HFL_INT8;
    return is_valid(s.x) && is_valid(s.dt) && is_valid(s.B) && is_valid(s.C) && (!s.z.values || is_valid(s.z)) && s.A &&
           s.y && is_type(static_cast<int>(s.y_type)) && s.batch > 0 && s.tokens > 0 && s.groups > 0 && s.n > 0 &&
           s.heads > 0 && s.heads % s.groups == 0 && s.head_dim > 0 && s.channels == s.heads * s.head_dim &&
           (s.A_columns == 1 || s.A_columns == s.n) && (!s.state || s.state_type == HFL_FLOAT32 || has_codes) &&
           (!has_codes || s.state_scale) && (!s.peaks || s.peaks_every > 0) && has_valid_clusters(s);
}

bool is_valid(const hfl_convolution& c) {
    const bool has_state = c.state || c.new_state;
    return is_valid(c.x) && c.weight && c.y && c.batch > 0 && c.tokens > 0 && c.channels > 0 && c.taps > 0 &&
           c.y_type >= HFL_FLOAT32 && c.y_type <= HFL_INT8 &&
           (c.y_type != HFL_INT8 || (c.out_scale && c.out_scale_run > 0)) && c.state_type >= HFL_FLOAT32 &&
           c.state_type <= HFL_INT8 && (!has_state || c.state_type != HFL_INT8 || c.x.scale);
}

bool is_valid(const hfl_rounding& r) {
    constexpr int64_t most = 1 << 21;
    const bool has_levels = r.levels && r.boundaries && r.count > 0;
    return r.values && r.scales && r.zeros && r.importance && r.errors && r.rows >= 0 && r.groups > 0 && r.size > 0 &&
           (r.levels ? has_levels : -most <= r.first && r.first <= r.last && r.last <= most);
}

}  // namespace

extern "C" {

void hfl_set_runner(hfl_runner runner) { hfl_run = runner; }

const char* hfl_instruction_sets(void) {
    static const std::string names = [] {
        std::string all;
        for (const Kernels* kernels : all_kernels)
            if (kernels->runs_here()) all += (all.empty() ? "" : ",") + std::string(kernels->name);
        return all;
    }();
    return names.c_str();
}

int hfl_use(const char* name) {
    if (!name) return chosen = best(), 0;
    for (const Kernels* kernels : all_kernels)
        if (!std::strcmp(kernels->name, name) && kernels->runs_here()) return chosen = kernels, 0;
    return -1;
}

int hfl_linear(const hfl_matrix* const* matrices, int count, const void* x, int type, int64_t m, int64_t stride,
               void* const* y, int threads) {
    if (!are_valid(matrices, count) || !is_type(type) || m < 0 || (m && !x) || !y) return -1;
    return m == 0 ? 0 : chosen->linear(matrices, count, x, type, m, stride, y, threads);
}

int hfl_linear_int8(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale,
                    int64_t x_groups, int64_t m, int type, void* const* y, int threads) {
    if (!are_valid(matrices, count) || !is_type(type) || x_groups < 1 || m < 0 || (m && (!x || !x_scale)) || !y) return -1;
    return m == 0 ? 0 : chosen->linear_int8(matrices, count, x, x_scale, x_groups, m, type, y, threads);
}

int hfl_quantize(const void* x, int type, int64_t m, int64_t columns, int64_t groups, int limit, int8_t* codes,
                 float* scales) {
    if (!is_type(type) || m < 0 || columns < 1 || groups < 1 || columns % groups || limit < 1 || limit > 127) return -1;
    if (m && (!x || !codes || !scales)) return -1;
    chosen->quantize(x, type, m, columns, groups, limit, codes, scales);
    return 0;
}

int hfl_multiplies_int8(const hfl_matrix* matrix) { return is_valid(matrix) && chosen->multiplies_int8(matrix); }

int hfl_multiplies_in_registers(const hfl_matrix* matrix) {
    return is_valid(matrix) && chosen->multiplies_in_registers(matrix);
}

int hfl_multiplies_many(const hfl_matrix* matrix, int type) {
    return is_valid(matrix) && chosen->multiplies_many(matrix, type);
}

int hfl_decode(const hfl_matrix* matrix, const int64_t* index, int64_t first, int64_t n, void* out, int type,
               int threads) {
    if (!is_valid(matrix) || !is_type(type) || n < 0) return -1;
    if (!index && (first < 0 || first + n > matrix->rows)) return -1;
    for (int64_t i = 0; index && i < n; i++)
        if (index[i] < 0 || index[i] >= matrix->rows) return -1;
    if (n) chosen->decode(matrix, index, first, n, out, type, threads);
    return 0;
}

int hfl_selective_scan(const hfl_scan* scan, int threads) {
    return scan && is_valid(*scan) ? chosen->selective_scan(*scan, threads) : -1;
}

int hfl_causal_convolution(const hfl_convolution* convolution, int threads) {
    return convolution && is_valid(*convolution) ? chosen->causal_convolution(*convolution, threads) : -1;
}

int hfl_rounding_errors(const hfl_rounding* rounding, int threads) {
    if (!rounding || !is_valid(*rounding)) return -1;
    chosen->rounding_errors(*rounding, threads);
    return 0;
}

uint64_t hfl_read(const void* data, int64_t bytes, int threads) {
    std::atomic<uint64_t> total{0};
    auto read_pages = [&](int64_t first, int64_t last) {
        uint64_t sums[8] = {};  // independent, so that the compiler can use vectors
        for (int64_t page = first; page < last; page++) {
            const char* at = static_cast<const char*>(data) + page * page_bytes;
            const int64_t words = std::min(bytes - page * page_bytes, page_bytes) / 8;
            prefetch_pages(at, page_bytes);
            for (int64_t i = 0; i + 8 <= words; i += 8) {
                uint64_t eight[8];
                std::memcpy(eight, at + i * 8, 64);
                __builtin_prefetch(at + i * 8 + 2048);
                for (int k = 0; k < 8; k++) sums[k] += eight[k];
            }
        }
        uint64_t sum = 0;
        for (uint64_t part : sums) sum += part;
        total.fetch_add(sum, std::memory_order_relaxed);
    };
    share_runs((bytes + page_bytes - 1) / page_bytes, 64, threads, read_pages);
    return total.load();
}

}  // extern "C"
