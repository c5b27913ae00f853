// x86-64 processors with AVX-512 including VBMI and VNNI (Intel since Ice Lake, AMD since Zen 4).
#include "kernels.h"
#include "simd_avx512.h"
#include "dot_avx512.h"
#include "isa.inc"

const Kernels avx512_kernels = make_kernels("avx512", [] {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
});
