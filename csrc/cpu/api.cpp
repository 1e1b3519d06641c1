// The C ABI of libzt_cpu.so: pointers are integers, element counts 64 bit, 0 = done, -1 = no such ISA here, -2 = memory.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#define API extern "C" __attribute__((visibility("default")))

namespace zt {

static const Kernels* const table[] = {                 // best first
#ifdef ZT_HAVE_avx512
  &avx512::kernels,
#endif
#ifdef ZT_HAVE_avx2
  &avx2::kernels,
#endif
#ifdef ZT_HAVE_sve
  &sve::kernels,
#endif
  &generic::kernels};

static bool runs_here(const char* name) {
#if defined(__x86_64__)
  // Features one by one rather than by level: older compilers do not know the level names. gcc and clang ask XCR0 too.
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));   // the builtin doesn't know it before clang 18
  const bool v3 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!strcmp(name, "avx2")) return v3;
  if (!strcmp(name, "avx512"))
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__aarch64__) && defined(__linux__)
  if (!strcmp(name, "sve")) return getauxval(AT_HWCAP) & (1ul << 22);
#endif
  return !strcmp(name, "generic");
}

// An ISA by name, or the best one: forced by argument, else by the environment, else by what the CPU has.
static const Kernels* pick(const char* force) {
  if (!force || !*force) force = getenv("ZEROTOP_ISA");
  for (const Kernels* k : table)
    if ((!force || !*force || !strcmp(force, k->name)) && runs_here(k->name)) return k;
  return nullptr;
}

static int threads_for(int threads, int64_t chunks) {
#ifdef _OPENMP
  if (threads < 1) threads = omp_get_max_threads();
#else
  threads = 1;
#endif
  return chunks < threads ? (int)(chunks ? chunks : 1) : threads;
}

static const int64_t CHUNK = 1 << 16;                   // keeps 64-byte alignment of every array; a multiple of ZT_BLOCK
static const int64_t NT_FROM = 1 << 20;                 // elements; below, out is better left in the cache

static const int64_t IN_CACHE = 2048;                   // moments that are in fp32 at a time, per thread

static int64_t size_of(int32_t dtype) { return dtype == F32 ? 4 : 2; }

static double fold(const double* x, int64_t n) {        // one block of block sums, formula.h's order
  double lane[ZT_LANES] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % ZT_LANES] += x[i];
  for (int64_t w = ZT_LANES / 2; w; w /= 2)
    for (int64_t j = 0; j < w; ++j) lane[j] += lane[j + w];
  return lane[0];
}

}  // namespace zt

API int zt_abi() { return 6; }
API int zt_max_threads() { return zt::threads_for(0, INT32_MAX); }

// The ISA that would run, or null where `force` names one that is not built in or not supported by this CPU.
API const char* zt_isa(const char* force) {
  const zt::Kernels* k = zt::pick(force);
  return k ? k->name : nullptr;
}

// out: 0, or an array of out_dtype; it may be g's memory, from the same address on, when elements have the same size.
API int zt_adamw(uint64_t p, uint64_t m, uint64_t v, uint64_t g, uint64_t out, int64_t n, int32_t grad_dtype,
                 int32_t out_dtype, int32_t l2, const ZtHyper* h, int32_t threads, const char* force) {
  using namespace zt;
  const Kernels* k = pick(force);
  if (!k) return -1;
  const int64_t chunks = (n + CHUNK - 1) / CHUNK, g_size = size_of(grad_dtype);
#pragma omp parallel for schedule(static) num_threads(threads_for(threads, chunks))
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t i = c * CHUNK, len = n - i < CHUNK ? n - i : CHUNK;
    const AdamArgs a = {(float*)p + i, (float*)m + i, (float*)v + i, (const char*)g + i * g_size,
                        out ? (char*)out + i * size_of(out_dtype) : nullptr, len, n >= NT_FROM};
    k->adam(a, (Dtype)grad_dtype, out ? (Dtype)out_dtype : NONE, l2 != 0, *h);
  }
  return 0;
}

// zt_adamw with moments in bf16, rounded stochastically; index: the unit's index of the first element.
API int zt_adamw_bf16(uint64_t p, uint64_t m, uint64_t v, uint64_t g, uint64_t out, int64_t n, int32_t grad_dtype,
                      int32_t out_dtype, int32_t l2, const ZtHyper* h, uint32_t index, uint32_t key, uint32_t second_key,
                      int32_t threads, const char* force) {
  using namespace zt;
  const Kernels* k = pick(force);
  if (!k) return -1;
  const int64_t chunks = (n + CHUNK - 1) / CHUNK, g_size = size_of(grad_dtype);
#pragma omp parallel for schedule(static) num_threads(threads_for(threads, chunks))
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t end = n - c * CHUNK < CHUNK ? n : (c + 1) * CHUNK;
    alignas(64) float wide_m[IN_CACHE], wide_v[IN_CACHE];
    for (int64_t i = c * CHUNK; i < end; i += IN_CACHE) {
      const int64_t len = end - i < IN_CACHE ? end - i : IN_CACHE;
      uint16_t *mi = (uint16_t*)m + i, *vi = (uint16_t*)v + i;
      k->widen_bf16(mi, wide_m, len);
      k->widen_bf16(vi, wide_v, len);
      const AdamArgs a = {(float*)p + i, wide_m, wide_v, (const char*)g + i * g_size,
                          out ? (char*)out + i * size_of(out_dtype) : nullptr, len, n >= NT_FROM};
      k->adam(a, (Dtype)grad_dtype, out ? (Dtype)out_dtype : NONE, l2 != 0, *h);
      k->round_moments(wide_m, wide_v, mi, vi, len, index + (uint32_t)i, {key, second_key});
    }
  }
  return 0;
}

API int zt_sum_of_squares(uint64_t x, int64_t n, int32_t dtype, int32_t threads, const char* force, double* result) {
  using namespace zt;
  const Kernels* k = pick(force);
  if (!k) return -1;
  *result = 0;
  if (n <= 0) return 0;
  int64_t blocks = (n + ZT_BLOCK - 1) / ZT_BLOCK;
  const int64_t size = size_of(dtype);
  double* sums = (double*)malloc((size_t)blocks * sizeof(double));
  if (!sums) return -2;
#pragma omp parallel for schedule(static) num_threads(threads_for(threads, blocks))
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t i = b * ZT_BLOCK, len = n - i < ZT_BLOCK ? n - i : ZT_BLOCK;
    sums[b] = k->block((const char*)x + i * size, len, (Dtype)dtype);
  }
  while (blocks > 1) {                                  // in place: block b's sum is written after its inputs were read
    const int64_t next = (blocks + ZT_BLOCK - 1) / ZT_BLOCK;
    for (int64_t b = 0; b < next; ++b) {
      const int64_t i = b * ZT_BLOCK;
      sums[b] = fold(sums + i, blocks - i < ZT_BLOCK ? blocks - i : ZT_BLOCK);
    }
    blocks = next;
  }
  *result = sums[0];
  free(sums);
  return 0;
}

// acc += scale * g in one pass. torch converts a 16-bit g into a temporary first, which takes several times longer.
API int zt_accumulate(uint64_t acc, uint64_t g, int64_t n, int32_t dtype, float scale, int32_t threads,
                      const char* force) {
  using namespace zt;
  const Kernels* k = pick(force);
  if (!k) return -1;
  const int64_t chunks = (n + CHUNK - 1) / CHUNK, size = size_of(dtype);
#pragma omp parallel for schedule(static) num_threads(threads_for(threads, chunks))
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t i = c * CHUNK, len = n - i < CHUNK ? n - i : CHUNK;
    k->accumulate((float*)acc + i, (const char*)g + i * size, len, (Dtype)dtype, scale);
  }
  return 0;
}

// dst[i] = (add ? dst[i] : 0) + sum over s of srcs[s][begin + i], in fp32, in the order of the sources, rounded once.
API int zt_sum(uint64_t dst, int32_t dst_dtype, const uint64_t* srcs, int64_t n_srcs, int64_t begin, int64_t n,
               int32_t src_dtype, int32_t add, int32_t threads, const char* force) {
  using namespace zt;
  const Kernels* k = pick(force);
  if (!k) return -1;
  const int64_t chunks = (n + CHUNK - 1) / CHUNK, size = size_of(dst_dtype);
#pragma omp parallel for schedule(static) num_threads(threads_for(threads, chunks))
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t i = c * CHUNK, len = n - i < CHUNK ? n - i : CHUNK;
    k->sum((char*)dst + i * size, (Dtype)dst_dtype, srcs, n_srcs, begin + i, len, (Dtype)src_dtype, add != 0);
  }
  return 0;
}
