// Numbers that one process posts in shared memory and others wait for. A wait drops Python's lock and burns no core: it
// looks for a moment, then sleeps until the poster wakes it.
#include <stdint.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#define API extern "C" __attribute__((visibility("default")))

static bool reached(const uint32_t* word, uint32_t wanted, uint32_t* seen) {
  *seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
  return (int32_t)(*seen - wanted) >= 0;                // numbers may wrap around
}

// What was written before is visible to whoever has seen the number.
API void zt_post(uint64_t word, uint32_t number) {
  __atomic_store_n((uint32_t*)word, number, __ATOMIC_RELEASE);
#ifdef __linux__
  syscall(SYS_futex, (uint32_t*)word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

// 1 as soon as the number at `word` is at least `wanted`, 0 after timeout_us microseconds.
API int zt_wait(uint64_t word, uint32_t wanted, int64_t timeout_us) {
  const uint32_t* at = (const uint32_t*)word;
  uint32_t seen;
  for (int look = 0; look < 64; ++look) {
    if (reached(at, wanted, &seen)) return 1;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  timespec begin, now;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (;;) {
    if (reached(at, wanted, &seen)) return 1;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const int64_t left = timeout_us * 1000 - ((now.tv_sec - begin.tv_sec) * 1000000000LL + now.tv_nsec - begin.tv_nsec);
    if (left <= 0) return 0;
#ifdef __linux__
    const timespec rest = {(time_t)(left / 1000000000LL), (long)(left % 1000000000LL)};
    syscall(SYS_futex, at, FUTEX_WAIT, seen, &rest, nullptr, 0);
#else
    const timespec rest = {0, left < 100000 ? (long)left : 100000};
    nanosleep(&rest, nullptr);
#endif
  }
}
