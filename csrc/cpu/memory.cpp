// Where pages lie: asking for NUMA nodes, and touching pages first from the threads that will use them.
#include <errno.h>
#include <stdint.h>
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
