// fp16 <-> fp32. A conversion to fp32 is exact; one to fp16 rounds to nearest even, to infinity from 65520 on, and makes
// every NaN the quiet 0x7e00, as the vector code of the ISAs and CUDA do. aarch64 has instructions that compilers reach
// through __fp16; elsewhere the scalar code works on bits, without branches so that loops over it become vectors.
#pragma once
#include "../formula.h"

ZT_FN uint32_t zt_bits(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }
ZT_FN float zt_from_bits(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }

#if defined(__aarch64__)
ZT_FN float zt_half_widen(uint16_t x) { __fp16 h; __builtin_memcpy(&h, &x, 2); return (float)h; }
ZT_FN uint16_t zt_half_round(float f) {
  const __fp16 h = (__fp16)f;
  uint16_t x;
  __builtin_memcpy(&x, &h, 2);
  return (zt_bits(f) & 0x7fffffffu) > 0x7f800000u ? 0x7e00 : x;
}
#else
ZT_FN float zt_half_widen(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, e = (uint32_t)(x & 0x7fff) << 13;
  const uint32_t normal = e + 0x38000000u;              // exponent bias 15 -> 127
  const uint32_t special = normal + 0x38000000u + (e > 0x0f800000u ? (0x400000u & ~e) : 0u);   // inf; NaN made quiet
  // A subnormal is e * 2^-24 steps above zero: put it above 2^-14, where a step is the same, and take that away again.
  const uint32_t tiny = zt_bits(zt_from_bits(e + 0x38800000u) - zt_from_bits(0x38800000u));
  return zt_from_bits(sign | (e >= 0x0f800000u ? special : e < 0x00800000u ? tiny : normal));
}
ZT_FN uint16_t zt_half_round(float f) {
  const uint32_t u = zt_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 the step is 2^-24, which is that of floats at 0.5: the addition rounds.
  const uint32_t tiny = zt_bits(zt_from_bits(a) + 0.5f) - 0x3f000000u;
  const uint32_t number = a >= 0x477ff000u ? 0x7c00u : a < 0x38800000u ? tiny : normal;
  return (uint16_t)(a > 0x7f800000u ? 0x7e00u : sign | number);
}
#endif
