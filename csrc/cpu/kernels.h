// What each ISA offers; api.cpp picks one set at run time.
#pragma once
#include <stdint.h>

#include "../formula.h"
#include "half.h"

namespace zt {

enum Dtype : int32_t { NONE = 0, F32 = 1, BF16 = 2, F16 = 3 };   // runtime/native/loading.py mirrors these

// What the loops are compiled for. S: how an element lies in memory; bf16 and fp16 are bit patterns of one C type, since
// an array of the one may be overwritten by the other.
struct Fp32 { using S = float; };
struct Bf16 { using S = uint16_t; };
struct Fp16 { using S = uint16_t; };
struct NoOut { using S = char; };

struct AdamArgs {
  float *p, *m, *v;
  const void* g;        // of `grad`
  void* out;            // of `to`; null when that is NONE. Either g's very memory (same element size) or apart from it
  int64_t n;
  bool nt;              // non-temporal stores for out: it will not be read from this cache soon
};

struct Kernels {
  const char* name;
  void (*adam)(const AdamArgs&, Dtype grad, Dtype to, bool l2, const ZtHyper&);
  void (*widen_bf16)(const uint16_t* from, float* to, int64_t n);
  // m and v to bf16, stochastically; `index` is the unit's index of their first element.
  void (*round_moments)(const float* m, const float* v, uint16_t* to_m, uint16_t* to_v, int64_t n, uint32_t index, ZtKey);
  double (*block)(const void* x, int64_t n, Dtype);     // sum of squares of one block, n <= ZT_BLOCK
  void (*accumulate)(float* acc, const void* g, int64_t n, Dtype, float scale);
  // dst = (add ? dst : 0) + (srcs[0] + srcs[1] + ...), from element `begin` of each source; dst begins at its element 0.
  void (*sum)(void* dst, Dtype, const uint64_t* srcs, int64_t n_srcs, int64_t begin, int64_t n, Dtype, bool add);
};

#define ZT_DECLARE(isa) namespace isa { extern const Kernels kernels; }
ZT_DECLARE(generic) ZT_DECLARE(avx2) ZT_DECLARE(avx512) ZT_DECLARE(sve)
#undef ZT_DECLARE

}  // namespace zt
