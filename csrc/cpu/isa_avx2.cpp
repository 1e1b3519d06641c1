// x86-64-v3: AVX2 and FMA.
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
  ZT_FN T load(const float* x) { return _mm256_loadu_ps(x); }
  ZT_FN T load(const uint16_t* x) {
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
  template <bool NT>
  ZT_FN void store_bf16(uint16_t* o, T a, T b) {
    const __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(a), round_bf16(b)), 0xd8);
    if (NT) _mm256_stream_si256((__m256i*)o, w); else _mm256_storeu_si256((__m256i*)o, w);
  }
  ZT_FN void fence() { _mm_sfence(); }
};

}}  // namespace zt::avx2

#include "loops.inc"
