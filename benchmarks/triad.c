// STREAM's triad with non-temporal stores, a = b + 3 c: the bandwidth that a kernel reading and writing long arrays is
// measured against. 12 bytes per element. Compiled by benchmarks/adam.py for the CPU it runs on.
#include <omp.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Seconds for one pass over n elements (a multiple of 16, arrays on 64-byte boundaries) with that many threads.
double triad(float* a, const float* b, const float* c, int64_t n, int threads) {
  const double begin = omp_get_wtime();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i += 16) {
#if defined(__AVX512F__)
    _mm512_stream_ps(a + i, _mm512_fmadd_ps(_mm512_set1_ps(3), _mm512_load_ps(c + i), _mm512_load_ps(b + i)));
#elif defined(__SSE2__)
    for (int j = 0; j < 16; j += 4)
      _mm_stream_ps(a + i + j, _mm_add_ps(_mm_mul_ps(_mm_set1_ps(3), _mm_load_ps(c + i + j)), _mm_load_ps(b + i + j)));
#else
    for (int j = 0; j < 16; ++j) a[i + j] = b[i + j] + 3 * c[i + j];
#endif
  }
  return omp_get_wtime() - begin;
}
