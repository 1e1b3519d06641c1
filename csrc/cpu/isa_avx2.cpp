// x86-64-v3: AVX2, FMA and F16C.
#define ZT_ISA avx2
#define ZT_HAVE_VEC
#include <immintrin.h>

#include "kernels.h"

namespace zt { namespace avx2 {

struct Vec {
  using T = __m256;
  static constexpr int LANES = 8;
  ZT_FN T set(float x) { return _mm256_set1_ps(x); }
  ZT_FN T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  ZT_FN T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  ZT_FN T div(T a, T b) { return _mm256_div_ps(a, b); }
  ZT_FN T sqrt(T a) { return _mm256_sqrt_ps(a); }
  ZT_FN T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  ZT_FN T load(Fp32, const float* x) { return _mm256_loadu_ps(x); }
  ZT_FN T load(Fp16, const uint16_t* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
  ZT_FN T load(Bf16, const uint16_t* x) {
    const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  }
  ZT_FN void store(float* x, T a) { _mm256_storeu_ps(x, a); }
  ZT_FN __m256i round_bf16(T x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd)), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  }
  ZT_FN __m256i pack(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }
  template <bool NT>
  ZT_FN void put(uint16_t* o, __m256i w) {
    if (NT) _mm256_stream_si256((__m256i*)o, w); else _mm256_storeu_si256((__m256i*)o, w);
  }
  template <bool NT>
  ZT_FN void store2(Bf16, uint16_t* o, T a, T b) { put<NT>(o, pack(round_bf16(a), round_bf16(b))); }
  template <bool NT>
  ZT_FN void store2(Fp16, uint16_t* o, T a, T b) {
    const __m256i w = _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                                       _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m256i na = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i nb = _mm256_castps_si256(_mm256_cmp_ps(b, b, _CMP_UNORD_Q));
    const __m256i nan = _mm256_permute4x64_epi64(_mm256_packs_epi32(na, nb), 0xd8);
    put<NT>(o, _mm256_blendv_epi8(w, _mm256_set1_epi16(0x7e00), nan));
  }
  template <bool NT>
  ZT_FN void store2(Fp32, float* o, T a, T b) {
    if (NT) { _mm256_stream_ps(o, a); _mm256_stream_ps(o + 8, b); }
    else { _mm256_storeu_ps(o, a); _mm256_storeu_ps(o + 8, b); }
  }
  ZT_FN void fence() { _mm_sfence(); }
};

}}  // namespace zt::avx2

#include "loops.inc"
