// C interface of the CPU kernels: products with packed matrices as they lie on disk. No matrix is repacked: the
// activations are put into the order in which the codes come out of their words instead.
#pragma once
#include <stdint.h>

#if defined(__GNUC__)
#define HFL_API __attribute__((visibility("default")))
#else
#define HFL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum hfl_type { HFL_FLOAT32 = 0, HFL_BFLOAT16 = 1, HFL_FLOAT16 = 2 };
enum hfl_zero { HFL_NO_ZERO = 0, HFL_REAL_ZERO = 1, HFL_PACKED_ZERO = 2 };
// How a code becomes a value: by table; by the integer code + offset; from sign, exponent and mantissa bits.
enum hfl_decoder { HFL_TABLE = 0, HFL_INTEGER = 1, HFL_MINIFLOAT = 2 };
enum hfl_packing { HFL_DENSE = 0, HFL_BASE3 = 1 };

// A packed matrix: value(row, k) = scale[row, k / group] * (table[code(row, k)] - zero[row, k / group]).
typedef struct {
    const uint32_t* codes;  // [rows, words]
    const void* scales;     // [rows, groups], or [1, 1] for one scale per tensor
    const void* zeros;      // like scales; or int32 words that hold `groups` codes per row; or null
    const float* table;     // [2^bits]
    int64_t rows, columns, words, groups;
    int32_t bits, packing, decoder, scale_type, zero_kind, one_scale;
    int32_t exponent_bits, integer_multiplier;  // multiplier: table * multiplier are int8 values; 0: they are not
    float integer_offset, minifloat_factor;     // of the two arithmetic decoders
} hfl_matrix;

// Runs fn(data) on `threads` threads at once. GOMP_parallel has this type: the pool torch works with is used.
typedef void (*hfl_runner)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
HFL_API void hfl_set_runner(hfl_runner runner);

// The instruction sets of this library that this processor runs, best first, separated by commas.
HFL_API const char* hfl_instruction_sets(void);
// Use one of them (null: the best). Returns 0, or -1 if the processor or the library lacks it.
HFL_API int hfl_use(const char* name);

// y[i] = x * matrices[i]^T for `count` matrices of the same number of columns, accumulated in float32.
// x [m, columns] and y[i] [m, rows] are of `type`, rows of x `stride` elements apart. Returns 0, or -1 for bad arguments.
HFL_API int hfl_linear(const hfl_matrix* const* matrices, int count, const void* x, int type, int64_t m, int64_t stride,
               void* const* y, int threads);

// As hfl_linear for int8 codes x [m, columns] (-127..127) with float32 scales [m, x_groups]: one per row of x, or as many
// as every matrix has groups; integer sums per group. Returns -1 where hfl_multiplies_int8 is 0.
HFL_API int hfl_linear_int8(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale,
                    int64_t x_groups, int64_t m, int type, void* const* y, int threads);
HFL_API int hfl_multiplies_int8(const hfl_matrix* matrix);

// Whether hfl_linear decodes this layout in registers; otherwise it decodes a row at a time, several times slower.
HFL_API int hfl_multiplies_in_registers(const hfl_matrix* matrix);

// Whether hfl_linear multiplies many inputs of this type by a matrix unit, decoding as it goes; otherwise a large number
// is better multiplied with decoded rows.
HFL_API int hfl_has_matrix_unit(const hfl_matrix* matrix, int type);

// Decoded rows [n, columns]: rows index[0..n), or first..first+n where index is null. Returns 0, or -1 if out of range.
HFL_API int hfl_decode(const hfl_matrix* matrix, const int64_t* index, int64_t first, int64_t n, void* out, int type,
               int threads);

// Reads every byte once on `threads` threads: the bandwidth the products are measured against.
HFL_API uint64_t hfl_read(const void* data, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif
