// Runs every kernel of the library over odd shapes, for the address and undefined-behaviour sanitizers to watch: all
// arrays are allocated to the byte, so that reading past any end is seen. Checks the sums against plain loops too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "lowbit.h"

namespace {

std::mt19937 random_bits(0);

void run_on_threads(void (*fn)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; i++) others.emplace_back(fn, data);
    fn(data);
    for (std::thread& other : others) other.join();
}

// One or a half, so many times, as the type has it: its bytes and not one more.
std::vector<char> repeated(float value, int64_t times, int type) {
    const uint16_t halves[] = {0, static_cast<uint16_t>(value == 1 ? 0x3f80 : 0x3f00),
                               static_cast<uint16_t>(value == 1 ? 0x3c00 : 0x3800)};
    const void* one = type == HFL_FLOAT32 ? static_cast<const void*>(&value) : &halves[type];
    const size_t size = type == HFL_FLOAT32 ? 4 : 2;
    std::vector<char> all(static_cast<size_t>(times) * size);
    for (size_t i = 0; i < all.size(); i += size) std::memcpy(all.data() + i, one, size);
    return all;
}

struct Packed {
    hfl_matrix matrix{};
    std::vector<uint32_t> codes, packed_zeros;
    std::vector<char> scales, zeros;
    std::vector<float> table;

    Packed(int64_t rows, int64_t columns, int64_t groups, int bits, int packing, int zero_kind, int decoder) {
        const int64_t words = packing == HFL_BASE3 ? ((columns + 4) / 5 + 3) / 4 : (columns * bits + 31) / 32;
        codes.resize(static_cast<size_t>(rows * words));
        for (uint32_t& word : codes) word = packing == HFL_BASE3 ? 0 : static_cast<uint32_t>(random_bits());
        static int made = 0;
        const int type = made++ % 3;  // each has its turn
        scales = repeated(0.5f, rows * groups, type);
        zeros = repeated(1.0f, rows * groups, type);
        packed_zeros.resize(static_cast<size_t>(rows * ((groups * bits + 31) / 32)));
        for (uint32_t& word : packed_zeros) word = static_cast<uint32_t>(random_bits());
        for (int c = 0; c < (1 << bits); c++) table.push_back(static_cast<float>(c - (1 << (bits - 1))));
        matrix.codes = codes.data();
        matrix.scales = scales.data();
        matrix.zeros = zero_kind == HFL_REAL_ZERO ? static_cast<const void*>(zeros.data()) : packed_zeros.data();
        matrix.table = table.data();
        matrix.rows = rows, matrix.columns = columns, matrix.words = words, matrix.groups = groups;
        matrix.bits = bits, matrix.packing = packing, matrix.decoder = decoder, matrix.scale_type = type;
        matrix.zero_kind = zero_kind, matrix.integer_multiplier = 1;
        matrix.integer_offset = -static_cast<float>(1 << (bits - 1));
    }
};

// bfloat16, of integers below 256 exactly.
uint16_t top_half(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return static_cast<uint16_t>(word >> 16);
}

float from_top_half(uint16_t half) {
    const uint32_t word = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

int failures = 0;

void expect(bool condition, const char* what, const hfl_matrix& w) {
    if (condition) return;
    failures++;
    std::printf("%s: %d bits, %lld x %lld, %lld groups\n", what, w.bits, static_cast<long long>(w.rows),
                static_cast<long long>(w.columns), static_cast<long long>(w.groups));
}

void check(const hfl_matrix& w, int64_t m, int threads) {
    const size_t rows = static_cast<size_t>(w.rows), columns = static_cast<size_t>(w.columns), n = static_cast<size_t>(m);
    std::vector<float> decoded(rows * columns), x(n * columns), y(n * rows);
    expect(hfl_decode(&w, nullptr, 0, w.rows, decoded.data(), HFL_FLOAT32, threads) == 0, "decode", w);
    std::vector<int8_t> codes(x.size());
    for (size_t i = 0; i < x.size(); i++) x[i] = codes[i] = static_cast<int8_t>(random_bits() % 255 - 127);
    const std::vector<float> ones(n * std::max<size_t>(1, static_cast<size_t>(w.groups)), 1.0f);
    const hfl_matrix* matrices[] = {&w, &w};
    std::vector<float> again(y.size());
    void* results[] = {y.data(), again.data()};
    auto compare = [&](const char* what, double rounding = 0) {
        for (size_t i = 0; i < n; i++)
            for (size_t r = 0; r < rows; r++) {
                double sum = 0, size = 0;
                for (size_t k = 0; k < columns; k++) {
                    sum += double(x[i * columns + k]) * decoded[r * columns + k];
                    size += std::fabs(double(x[i * columns + k]) * decoded[r * columns + k]) + std::fabs(x[i * columns + k]) * 256;
                }
                const double most = 1e-6 * size + 1e-6 + rounding * std::fabs(sum);
                if (std::fabs(y[i * rows + r] - sum) > most || y[i * rows + r] != again[i * rows + r])
                    return expect(false, what, w);
            }
    };
    expect(hfl_linear(matrices, 2, x.data(), HFL_FLOAT32, m, w.columns, results, threads) == 0, "linear", w);
    compare("linear");
    std::vector<uint16_t> short_x(x.size()), short_y(y.size()), short_again(y.size());
    for (size_t i = 0; i < x.size(); i++) short_x[i] = top_half(x[i]);
    void* short_results[] = {short_y.data(), short_again.data()};
    expect(hfl_linear(matrices, 2, short_x.data(), HFL_BFLOAT16, m, w.columns, short_results, threads) == 0, "bfloat16", w);
    for (size_t i = 0; i < y.size(); i++) y[i] = from_top_half(short_y[i]), again[i] = from_top_half(short_again[i]);
    compare("bfloat16", 0x1p-8);
    std::vector<int8_t> own_codes(x.size());
    std::vector<float> own_scales(n * static_cast<size_t>(w.groups));
    expect(hfl_quantize(x.data(), HFL_FLOAT32, m, w.columns, w.groups, 127, own_codes.data(), own_scales.data()) == 0,
           "quantize", w);
    for (size_t i = 0; i < x.size(); i++) {
        const float scale = own_scales[i / (columns / static_cast<size_t>(w.groups))];
        expect(std::fabs(float(own_codes[i]) * scale - x[i]) <= 0.501f * scale, "codes of inputs", w);
    }
    if (hfl_multiplies_int8(&w)) {
        for (const int64_t groups : {int64_t(1), static_cast<int64_t>(w.groups)}) {  // of the inputs
            const int failed = hfl_linear_int8(matrices, 2, codes.data(), ones.data(), groups, m, HFL_FLOAT32, results, threads);
            expect(failed == 0, "int8", w);
            compare("int8");
        }
    }
    std::vector<uint16_t> half(2 * columns);
    for (int type : {HFL_BFLOAT16, HFL_FLOAT16}) {
        const int64_t index[] = {w.rows - 1, 0};
        expect(hfl_decode(&w, index, 0, 2, half.data(), type, 1) == 0, "decode by index", w);
    }
    const int64_t beyond[] = {w.rows};
    expect(hfl_decode(&w, beyond, 0, 1, decoded.data(), HFL_FLOAT32, 1) == -1, "an index out of range", w);
    hfl_matrix broken = w;
    broken.words++;
    expect(hfl_decode(&broken, nullptr, 0, 1, decoded.data(), HFL_FLOAT32, 1) == -1, "a broken description", w);
}

// An operand of `type`, quantized or not, in memory that ends with its last value.
struct Values {
    hfl_operand operand{};
    std::vector<char> bytes;
    std::vector<float> scale;

    Values(int64_t batch, int64_t tokens, int64_t channels, int type, bool scaled) {
        const int64_t size = type == HFL_FLOAT32 ? 4 : type == HFL_INT8 ? 1 : 2;
        bytes.resize(static_cast<size_t>(batch * tokens * channels * size));
        for (size_t i = 0; i < bytes.size() / static_cast<size_t>(size); i++) {
            const float value = static_cast<float>(random_bits() % 200) / 100 - 1;
            if (type == HFL_FLOAT32) std::memcpy(&bytes[4 * i], &value, 4);
            else if (type == HFL_INT8) bytes[i] = static_cast<char>(static_cast<int>(value * 127));
            else bytes[2 * i] = 0, bytes[2 * i + 1] = static_cast<char>(value < 0 ? 0xbc : 0x3c);
        }
        if (scaled || type == HFL_INT8) scale.assign(static_cast<size_t>(channels), 1.0f / 127), operand.scale = scale.data();
        operand.values = bytes.data(), operand.type = type, operand.scale_run = 1;
        operand.batch_stride = tokens * channels, operand.token_stride = channels;
    }
};

// Every size of tile, with ends within vectors; the state in place.
void check_scan(int64_t heads, int64_t width, int64_t groups, int64_t n, int64_t tokens, int type, bool own, bool coded) {
    const int64_t batch = 2, channels = heads * width, clusters = 3, window = 5;
    const Values x(batch, tokens, channels, type, coded), z(batch, tokens, channels, type, false),
        dt(batch, tokens, heads, type, false), B(batch, tokens, groups * n, type, coded), C(batch, tokens, groups * n, type, false);
    const std::vector<float> A(static_cast<size_t>(heads * (own ? n : 1)), -0.5f), D(static_cast<size_t>(heads), 0.5f),
        scale(static_cast<size_t>(clusters * n), 0.01f);
    std::vector<int32_t> cluster(static_cast<size_t>(channels));
    for (size_t i = 0; i < cluster.size(); i++) cluster[i] = static_cast<int32_t>(i % static_cast<size_t>(clusters));
    std::vector<char> state(static_cast<size_t>(batch * channels * n * (coded ? 1 : 4)));
    std::vector<float> y(static_cast<size_t>(batch * tokens * channels));
    std::vector<float> peaks(static_cast<size_t>(batch * ((tokens + window - 1) / window) * channels * n));
    hfl_scan s{};
    s.x = x.operand, s.dt = dt.operand, s.B = B.operand, s.C = C.operand, s.z = z.operand;
    s.A = A.data(), s.D = D.data(), s.dt_bias = D.data(), s.state = state.data(), s.new_state = state.data(), s.y = y.data();
    if (coded) s.state_scale = scale.data(), s.state_cluster = cluster.data(), s.state_scale_columns = n, s.clusters = clusters;
    s.batch = batch, s.tokens = tokens, s.channels = channels, s.heads = heads, s.head_dim = width, s.groups = groups;
    s.n = n, s.A_columns = own ? n : 1, s.state_type = coded ? HFL_INT8 : HFL_FLOAT32, s.dt_max = 10;
    bool fails = hfl_selective_scan(&s, 2) != 0;
    s.peaks = peaks.data(), s.peaks_every = window, s.z.values = nullptr;
    fails = fails || hfl_selective_scan(&s, 1) != 0;
    if (coded) {
        s.clusters = 2;
        fails = fails || (channels > 2) != (hfl_selective_scan(&s, 1) == -1);
    }
    s.A_columns = n + 1;
    fails = fails || hfl_selective_scan(&s, 1) != -1;
    for (float value : y) fails = fails || !std::isfinite(value);
    if (fails) failures++, std::printf("scan: %lld heads of %lld\n", static_cast<long long>(heads), static_cast<long long>(width));
}

void check_convolution(int64_t channels, int64_t taps, int64_t tokens, int type, bool coded) {
    const int64_t batch = 2;
    const Values x(batch, tokens, channels, type, coded);
    const std::vector<float> weight(static_cast<size_t>(channels * taps), 0.5f), bias(static_cast<size_t>(channels), 0.1f);
    const bool has_codes = coded || type == HFL_INT8;
    std::vector<char> state(static_cast<size_t>(batch * channels * taps * (has_codes ? 1 : 4)));
    std::vector<char> y(static_cast<size_t>(batch * tokens * channels * (has_codes ? 1 : 4)));
    hfl_convolution c{};
    c.x = x.operand, c.weight = weight.data(), c.bias = bias.data(), c.out_scale = bias.data(), c.out_scale_run = 1;
    c.state = state.data(), c.new_state = state.data(), c.y = y.data(), c.batch = batch, c.tokens = tokens;
    c.channels = channels, c.taps = taps, c.silu = 1;
    c.state_type = c.y_type = has_codes ? HFL_INT8 : HFL_FLOAT32;
    bool fails = hfl_causal_convolution(&c, 2) != 0;
    c.taps = 0;
    fails = fails || hfl_causal_convolution(&c, 1) != -1;
    if (fails) failures++, std::printf("convolution: %lld channels\n", static_cast<long long>(channels));
}

void check_mixers() {
    for (int type : {HFL_FLOAT32, HFL_BFLOAT16, HFL_FLOAT16, HFL_INT8})
        for (bool coded : {false, true})
            for (int64_t tokens : {1, 3, 70}) {
                for (bool own : {false, true})
                    for (int64_t n : {1, 5, 16, 40, 71, 128}) {
                        check_scan(7, 1, 1, n, tokens, type, own, coded);
                        check_scan(6, 5, 3, n, tokens, type, own, coded);
                        check_scan(2, 70, 1, n, tokens, type, own, coded);
                    }
                for (int64_t taps : {1, 3, 4})
                    for (int64_t channels : {1, 20, 133, 300}) check_convolution(channels, taps, tokens, type, coded);
            }
}

// Integer weights on grids of integers, or of as many levels, lose nothing; halves lose a quarter each.
void check_rounding(int64_t rows, int64_t groups, int64_t size, bool by_levels) {
    std::vector<float> values(static_cast<size_t>(rows * groups * size)), errors(static_cast<size_t>(rows * groups), -1.0f);
    for (size_t i = 0; i < values.size(); i++) values[i] = static_cast<float>(i % 7) - 3.0f;
    const std::vector<float> ones(static_cast<size_t>(rows * groups), 1.0f), zeros(ones.size(), 0.0f),
        importance(static_cast<size_t>(groups * size), 1.0f), levels{-3, -2, -1, 0, 1, 2, 3},
        boundaries{-2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f};
    hfl_rounding r{};
    r.values = values.data(), r.scales = ones.data(), r.zeros = zeros.data(), r.importance = importance.data();
    if (by_levels) r.levels = levels.data(), r.boundaries = boundaries.data(), r.count = 7;
    r.errors = errors.data(), r.rows = rows, r.groups = groups, r.size = size, r.first = -3, r.last = 3;
    bool fails = hfl_rounding_errors(&r, 2) != 0;
    for (float error : errors) fails = fails || error != 0.0f;
    for (float& value : values) value = 0.5f;
    fails = fails || hfl_rounding_errors(&r, 1) != 0;
    for (float error : errors) fails = fails || error != 0.25f * static_cast<float>(size);
    r.first = 1 << 22, r.count = 0;
    fails = fails || hfl_rounding_errors(&r, 1) != -1;
    if (fails) failures++, std::printf("rounding: groups of %lld\n", static_cast<long long>(size));
}

}  // namespace

int main() {
    hfl_set_runner(run_on_threads);
    std::string names = hfl_instruction_sets();
    for (size_t at = 0; at < names.size();) {
        const size_t end = std::min(names.find(',', at), names.size());
        const std::string name = names.substr(at, end - at);
        if (hfl_use(name.c_str())) return std::printf("cannot use %s\n", name.c_str()), 1;
        for (int bits = 1; bits <= 8; bits++)
            for (int zero : {HFL_NO_ZERO, HFL_REAL_ZERO, HFL_PACKED_ZERO})
                for (int decoder : {HFL_TABLE, HFL_INTEGER})
                    for (int64_t columns : {1, 31, 96, 192, 577, 1024})
                        for (int64_t group : {columns, int64_t(32), int64_t(24)})
                            if (columns % group == 0)
                                for (int64_t rows : {1, 19})
                                    check(Packed(rows, columns, columns / group, bits, HFL_DENSE, zero, decoder).matrix,
                                          rows == 1 ? 5 : 15, rows == 1 ? 1 : 2);  // 15: one place empty
        for (int64_t columns : {1, 21, 160}) check(Packed(7, columns, 1, 2, HFL_BASE3, HFL_NO_ZERO, HFL_TABLE).matrix, 3, 2);
        const Packed large(512, 4096, 64, 4, HFL_DENSE, HFL_NO_ZERO, HFL_INTEGER);  // enough work for several pieces
        check(large.matrix, 4, 2);
        check(Packed(70, 1024, 8, 4, HFL_DENSE, HFL_REAL_ZERO, HFL_INTEGER).matrix, 530, 2);  // inputs in two parts
        check_mixers();
        for (bool by_levels : {false, true})
            for (int64_t size : {1, 16, 33, 64}) check_rounding(5, 3, size, by_levels);
        std::printf("%s: done\n", name.c_str());
        at = end + 1;
    }
    std::vector<char> bytes(1000003);
    hfl_read(bytes.data(), static_cast<int64_t>(bytes.size()), 2);
    return failures != 0;
}
