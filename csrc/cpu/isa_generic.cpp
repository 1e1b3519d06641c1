// The baseline of the architecture: SSE2 on x86-64, NEON on aarch64. On x86-64 an fma is then a call into libm, which
// gives the right bits but is several times slower than avx2; machines without FMA (before 2013) pay that.
#define ZT_ISA generic
#include "kernels.h"
#include "loops.inc"
