// SVE's vector length is not known when this is compiled: the compiler vectorises the scalar loops.
#define ZT_ISA sve
#include "kernels.h"
#include "loops.inc"
