// Where pages lie: asking for NUMA nodes, and touching pages first from the threads that will use them. And copies.
#include <errno.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#define API extern "C" __attribute__((visibility("default")))

// Pages of the range that are not there yet shall come from these nodes (a bit each): one node is preferred, several take
// turns. Without libnuma: the numbers of <linux/mempolicy.h> never change. 0, or an errno: EPERM in many containers.
API int zt_prefer_nodes(uint64_t address, int64_t bytes, uint64_t nodes) {
#if defined(__linux__) && defined(SYS_mbind)
  const int MPOL_PREFERRED = 1, MPOL_INTERLEAVE = 3;
  const unsigned long mask = nodes;
  const int mode = nodes & (nodes - 1) ? MPOL_INTERLEAVE : MPOL_PREFERRED;
  return syscall(SYS_mbind, address, bytes, mode, &mask, 65ul, 0u) ? errno : 0;   // the kernel takes one bit off the count
#else
  (void)address; (void)bytes; (void)nodes;
  return ENOSYS;
#endif
}

// Write a zero to every page. New pages then are there, and on the node of the thread that touched them.
API void zt_touch(uint64_t address, int64_t bytes, int64_t page, int32_t threads) {
  const int64_t pages = (bytes + page - 1) / page;
#ifdef _OPENMP
  if (threads < 1) threads = omp_get_max_threads();
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < pages; ++i) ((volatile char*)address)[i * page] = 0;
}

// Non-temporal stores: the target is not read first, and the cache keeps what training had there. Every x86-64 has these,
// and wider ones are not faster: memory is what is waited for.
static void copy_past_cache(char* to, const char* from, int64_t bytes) {
#ifdef __SSE2__
  const int64_t head = -(uintptr_t)to & 15;
  if (bytes >= head + 64) {
    memcpy(to, from, head);
    to += head; from += head; bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64)
      for (int i = 0; i < 4; ++i) _mm_stream_si128((__m128i*)to + i, _mm_loadu_si128((const __m128i*)from + i));
    _mm_sfence();                                       // whoever is told that the copy is done finds all of it
  }
#endif
  memcpy(to, from, bytes);
}

// A copy that nobody reads soon. The ranges do not overlap.
API void zt_copy(uint64_t to, uint64_t from, int64_t bytes, int32_t threads) {
  const int64_t CHUNK = 1 << 20, chunks = (bytes + CHUNK - 1) / CHUNK;
#ifdef _OPENMP
  if (threads < 1) threads = omp_get_max_threads();
  if (chunks < threads) threads = chunks ? (int32_t)chunks : 1;
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t at = i * CHUNK, left = bytes - at;
    copy_past_cache((char*)to + at, (const char*)from + at, left < CHUNK ? left : CHUNK);
  }
}
