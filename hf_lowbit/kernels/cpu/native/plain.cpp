// Standard C++ for any processor.
#include "kernels.h"
#include "simd_plain.h"
#include "dot_plain.h"
#include "math_plain.h"
#include "isa.inc"

const Kernels plain_kernels = make_kernels("plain", [] { return true; });
