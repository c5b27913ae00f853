// C interface of the CPU kernels: products with packed matrices as they lie on disk. No matrix is repacked: the
// activations are put into the order in which the codes come out of their words instead.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HFL_API __attribute__((visibility("default")))
#else
#define HFL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum hfl_type { HFL_FLOAT32 = 0, HFL_BFLOAT16 = 1, HFL_FLOAT16 = 2, HFL_INT8 = 3 };  // int8: of scans only
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
// as every matrix has groups; sums of integers per group, as int32 or as floats that hold them.
// Returns -1 where hfl_multiplies_int8 is 0.
HFL_API int hfl_linear_int8(const hfl_matrix* const* matrices, int count, const int8_t* x, const float* x_scale,
                    int64_t x_groups, int64_t m, int type, void* const* y, int threads);
HFL_API int hfl_multiplies_int8(const hfl_matrix* matrix);

// Codes -limit..limit [m, columns] of inputs x [m, columns] of `type`, and the scales [m, groups] they are in: the largest
// magnitude of each token or group of it over `limit` (1..127). Returns 0, or -1 for bad arguments.
HFL_API int hfl_quantize(const void* x, int type, int64_t m, int64_t columns, int64_t groups, int limit, int8_t* codes,
                         float* scales);

// Whether hfl_linear decodes this layout in registers; otherwise it decodes a row at a time, several times slower.
HFL_API int hfl_multiplies_in_registers(const hfl_matrix* matrix);

// Whether hfl_linear (of HFL_INT8: hfl_linear_int8) decodes once for many inputs of this type, by a matrix unit or by
// panels; otherwise a large number is better multiplied with decoded rows.
HFL_API int hfl_multiplies_many(const hfl_matrix* matrix, int type);

// Decoded rows [n, columns]: rows index[0..n), or first..first+n where index is null. Returns 0, or -1 if out of range.
HFL_API int hfl_decode(const hfl_matrix* matrix, const int64_t* index, int64_t first, int64_t n, void* out, int type,
               int threads);

// Of scans: values [batch, tokens, channels], the channels of a token side by side.
typedef struct {
    const void* values;    // null: there are none
    const float* scale;    // int8: what a code is worth. Floats: they are rounded to such codes first. Null: as they are
    int64_t batch_stride, token_stride, scale_run;  // elements; `scale_run` channels in a row have one scale
    int64_t type;
} hfl_operand;

// h = exp(step A) h + step x B, y = (C h + D x) silu(z), step = softplus(dt + dt_bias) within dt_min..dt_max; float32.
typedef struct {
    hfl_operand x, dt, B, C, z;  // channels: heads * head_dim; heads; groups * n twice; like x
    const float *A, *D, *dt_bias;            // [heads, A_columns], [heads], [heads]; the last two or null
    const void* state;                       // [batch, channels, n] of state_type: float32 or int8; null: zeros
    void* new_state;                         // the same, int8 where there is a state_scale; may be `state`; null: not kept
    const float* state_scale;                // [clusters, state_scale_columns], 1 or n columns
    const int32_t* state_cluster;            // [channels], 0..clusters-1; null: row 0
    void* y;                                 // [batch, tokens, channels] of y_type, a float type
    float* peaks;                            // [batch, ceil(tokens / peaks_every), channels, n]; or null
    int64_t batch, tokens, channels, heads, head_dim, groups, n, A_columns;  // A_columns: 1, or n for own decays
    int64_t state_scale_columns, peaks_every, state_type, y_type;
    double dt_min, dt_max;
    int64_t clusters;
} hfl_scan;
// Returns 0, or -1 for bad arguments.
HFL_API int hfl_selective_scan(const hfl_scan* scan, int threads);

// y[t] = bias + sum over taps of weight[tap] x[t - taps + 1 + tap], SiLU on request; int8: divided by out_scale, rounded.
typedef struct {
    hfl_operand x;
    const float *weight, *bias, *out_scale;  // [channels, taps], [channels], one per out_scale_run channels
    const void* state;                       // [batch, channels, taps] of state_type: inputs so far, the newest last
    void* new_state;                         // the same; may be `state`; null: not kept. int8: codes of x's scale
    void* y;                                 // [batch, tokens, channels] of y_type
    int64_t batch, tokens, channels, taps, out_scale_run, state_type, y_type, silu;
} hfl_convolution;
HFL_API int hfl_causal_convolution(const hfl_convolution* convolution, int threads);

// What grids lose of weights: errors[row, group] = sum over k of importance[group, k] (w - scale (level - zero))^2, with
// the level nearest to w / scale + zero (w + zero where the scale is 0). Without levels they are the integers first..last.
typedef struct {
    const float* values;                // [rows, groups, size]
    const float *scales, *zeros;        // [rows, groups]
    const float* importance;            // [groups, size]
    const float *levels, *boundaries;   // ascending: [count], [count - 1]; what is not above a boundary falls below it
    float* errors;                      // [rows, groups]
    int64_t rows, groups, size, count, first, last;  // first, last: within -2^21..2^21
} hfl_rounding;
HFL_API int hfl_rounding_errors(const hfl_rounding* rounding, int threads);  // 0, or -1 for bad arguments

// The functions of torch's stable C interface that an operator needs, by address; tensors, lists and strings are handles.
typedef struct {
    int32_t (*library_init_impl)(const char* space, const char* key, const char* file, uint32_t line, void** library);
    int32_t (*library_impl)(void* library, const char* name, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t version);
    int32_t (*call_dispatcher)(const char* name, const char* overload, uint64_t* stack, uint64_t version);
    int32_t (*get_num_threads)(uint32_t*);
    int32_t (*get_data_ptr)(void* tensor, void**);
    int32_t (*get_sizes)(void* tensor, int64_t**);
    int32_t (*get_dim)(void* tensor, int64_t*);
    int32_t (*get_numel)(void* tensor, int64_t*);
    int32_t (*get_dtype)(void* tensor, int32_t*);
    int32_t (*get_device_type)(void* tensor, int32_t*);
    int32_t (*is_contiguous)(void* tensor, bool*);
    int32_t (*empty_strided)(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                             int32_t device_type, int32_t device_index, void** tensor);
    int32_t (*delete_tensor)(void* tensor);
    int32_t (*list_size)(void* list, size_t*);
    int32_t (*list_get_item)(void* list, size_t index, uint64_t*);
    int32_t (*delete_list)(void* list);
    int32_t (*string_length)(void* string, size_t*);
    int32_t (*string_c_str)(void* string, const char**);
    int32_t (*delete_string)(void* string);
    int32_t (*dtype_float32)(void);
    int32_t (*dtype_bfloat16)(void);
    int32_t (*dtype_float16)(void);
    const char* (*exception_what)(void);  // of the thread's last exception; null before torch 2.13
    int64_t most_tokens;  // beyond, products that do not multiply many go to the operator in Python
} hfl_torch;
// Implement for CPU tensors, the products of x with packed matrices, flat, one after the other:
//   hf_lowbit::products (Tensor x, Tensor[] stored, str specs, int columns, str activation) -> Tensor, of each matrix its
//       codes, scales, zeros and table, what there is of them;
//   hf_lowbit::kept_products (Tensor x, int[] numbers, int rows, str activation) -> Tensor.
// Operators of the same arguments whose names end in _of_python take what is not known. Returns 0, or -1.
HFL_API int hfl_register_operators(const hfl_torch* functions);
// From now on the operators take products with these matrices together, by their `numbers`; or, where these are null, by
// where their tensors lie, and `specs`. What a table points to must stay, where it is not among the tensors (has_table);
// what has numbers must stay until one of them is forgotten. Inputs become codes of -limit..limit with `groups` scales
// each first, as `activation` says; or stay as they are, where the limit is 0.
HFL_API void hfl_know(const hfl_matrix* const* matrices, const int* has_table, int count, const char* specs,
                      const int64_t* numbers, const char* activation, int limit, int64_t groups);
HFL_API void hfl_forget(int64_t number);

// Reads every byte once on `threads` threads: the bandwidth the products are measured against.
HFL_API uint64_t hfl_read(const void* data, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif
