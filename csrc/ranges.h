// What several calls take as a list. runtime/native/loading.py mirrors this layout.
#pragma once
#include <stdint.h>

struct ZtRange {
  uint64_t p, m, v;     // addresses of n floats each
  uint64_t g;           // of n elements of the call's gradient dtype
  uint64_t out;         // of n elements of the call's output dtype; 0 where that is none
  int64_t n;
  int32_t hyper;        // which of the call's ZtHyper
  int32_t place;        // ZT_GRAD_ON_HOST | ZT_OUT_ON_HOST: only the streamed optimizer looks at it
};
#define ZT_GRAD_ON_HOST 1
#define ZT_OUT_ON_HOST 2
