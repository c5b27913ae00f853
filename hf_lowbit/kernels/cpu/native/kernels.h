// What each instruction set provides; api.cpp picks one at run time.
#pragma once
#include "lowbit.h"

struct Kernels {
    const char* name;
    bool (*runs_here)();
    int (*linear)(const hfl_matrix* const*, int, const void*, int, int64_t, int64_t, void* const*, int);
    int (*linear_int8)(const hfl_matrix* const*, int, const int8_t*, const float*, int64_t, int64_t, int, void* const*,
                       int);
    int (*multiplies_int8)(const hfl_matrix*);
    int (*multiplies_in_registers)(const hfl_matrix*);
    int (*multiplies_many)(const hfl_matrix*, int);
    void (*decode)(const hfl_matrix*, const int64_t*, int64_t, int64_t, void*, int, int);
    int (*selective_scan)(const hfl_scan&, int);
    int (*causal_convolution)(const hfl_convolution&, int);
    void (*rounding_errors)(const hfl_rounding&, int);
    void (*quantize)(const void*, int, int64_t, int64_t, int64_t, int, int8_t*, float*);
};

extern const Kernels plain_kernels;
#if defined(HFL_X86)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels amx_kernels;
#endif
