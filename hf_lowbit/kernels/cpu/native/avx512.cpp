// x86-64 processors with AVX-512 including VBMI and VNNI (Intel since Ice Lake, AMD since Zen 4).
#include "kernels.h"
#include "simd_avx512.h"
#include "dot_avx512.h"
#include "math_avx512.h"
#include "isa.inc"

const Kernels avx512_kernels = make_kernels("avx512", runs_avx512);
