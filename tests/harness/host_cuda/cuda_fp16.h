// fp16 by arithmetic in double, unlike csrc/cpu/half.h, with which it is compared.
#pragma once
#include <cuda_runtime.h>

struct __half { uint16_t bits; };
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }

inline float __half2float(__half h) {
  const int exponent = (h.bits >> 10) & 31, fraction = h.bits & 1023;
  const double size = exponent == 31 ? (fraction ? (double)NAN : (double)INFINITY)
                      : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return (float)copysign(size, h.bits & 0x8000 ? -1.0 : 1.0);
}

inline __half __float2half_rn(float f) {
  if (f != f) return {0x7fff};                          // as the instruction does
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const double size = fabs((double)f);
  if (size >= 65520) return {(uint16_t)(sign | 0x7c00)};
  const int exponent = size < ldexp(1, -14) ? -14 : ilogb(size);
  const double steps = nearbyint(ldexp(size, 10 - exponent));   // to even; of 2^(exponent - 10), up to 2048
  return {(uint16_t)(sign | (uint16_t)(((exponent + 14) << 10) + (int)steps))};
}
