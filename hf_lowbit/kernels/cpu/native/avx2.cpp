// x86-64 processors since 2013: AVX2, FMA, F16C, BMI2.
#include "kernels.h"
#include "simd_avx2.h"
#include "dot_avx2.h"
#include "math_avx2.h"
#include "isa.inc"

const Kernels avx2_kernels = make_kernels("avx2", [] {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("f16c");
});
