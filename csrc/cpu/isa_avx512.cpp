// x86-64-v4: AVX-512 F, BW, CD, DQ, VL. AVX512_BF16's own conversion is not used: it flushes denormals.
#define ZT_ISA avx512
#define ZT_HAVE_VEC
#include <immintrin.h>

#include "kernels.h"

namespace zt { namespace avx512 {

struct Vec {
  using T = __m512;
  static constexpr int LANES = 16;
  ZT_FN T set(float x) { return _mm512_set1_ps(x); }
  ZT_FN T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  ZT_FN T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  ZT_FN T div(T a, T b) { return _mm512_div_ps(a, b); }
  ZT_FN T sqrt(T a) { return _mm512_sqrt_ps(a); }
  ZT_FN T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  ZT_FN T load(Fp32, const float* x) { return _mm512_loadu_ps(x); }
  ZT_FN T load(Fp16, const uint16_t* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
  ZT_FN T load(Bf16, const uint16_t* x) {
    const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  }
  ZT_FN void store(float* x, T a) { _mm512_storeu_ps(x, a); }
  ZT_FN __m256i round_bf16(T x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
  }
  ZT_FN __m256i round_fp16(T x) {
    const __m256i r = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_mask_mov_epi16(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm256_set1_epi16(0x7e00));
  }
  template <bool NT>
  ZT_FN void put(uint16_t* o, __m256i a, __m256i b) {
    const __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    if (NT) _mm512_stream_si512((__m512i*)o, w); else _mm512_storeu_si512(o, w);
  }
  template <bool NT>
  ZT_FN void store2(Bf16, uint16_t* o, T a, T b) { put<NT>(o, round_bf16(a), round_bf16(b)); }
  template <bool NT>
  ZT_FN void store2(Fp16, uint16_t* o, T a, T b) { put<NT>(o, round_fp16(a), round_fp16(b)); }
  template <bool NT>
  ZT_FN void store2(Fp32, float* o, T a, T b) {
    if (NT) { _mm512_stream_ps(o, a); _mm512_stream_ps(o + 16, b); }
    else { _mm512_storeu_ps(o, a); _mm512_storeu_ps(o + 16, b); }
  }
  ZT_FN void fence() { _mm_sfence(); }
};

}}  // namespace zt::avx512

#include "loops.inc"
