// Every entry of libzt_cpu.so over arrays that end where the sanitizer watches, on each ISA of this CPU. Built with
// -fsanitize=address,undefined by test_sanitized.py; a finding ends the process. Prints how many calls were made.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "../../../csrc/formula.h"

extern "C" {
const char* zt_isa(const char*);
int zt_adamw(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, int64_t, int32_t, int32_t, int32_t, const ZtHyper*, int32_t,
             const char*);
int zt_sum_of_squares(uint64_t, int64_t, int32_t, int32_t, const char*, double*);
int zt_accumulate(uint64_t, uint64_t, int64_t, int32_t, float, int32_t, const char*);
int zt_sum(uint64_t, int32_t, const uint64_t*, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, const char*);
void zt_post(uint64_t, uint32_t);
int zt_wait(uint64_t, uint32_t, int64_t);
int zt_prefer_nodes(uint64_t, int64_t, uint64_t);
void zt_touch(uint64_t, int64_t, int64_t, int32_t);
void zt_copy(uint64_t, uint64_t, int64_t, int32_t);
}

enum { NONE, F32, BF16, F16 };
static int calls = 0;

// n elements of a dtype, `shift` elements into a block of the heap that ends with them; all kinds of bit patterns.
struct Array {
  std::unique_ptr<char[]> block;
  uint64_t at;
  Array(int64_t n, int dtype, int64_t shift) {
    const int64_t size = dtype == F32 ? 4 : 2;
    block.reset(new char[(n + shift) * size]);
    static const std::vector<char> noise = [] {
      std::mt19937 random(1);
      std::vector<char> bytes(70001);
      for (char& byte : bytes) byte = (char)random();
      return bytes;
    }();
    const int64_t bytes = (n + shift) * size;
    for (int64_t i = 0; i < bytes; i += noise.size())
      memcpy(block.get() + i, noise.data(), (size_t)std::min<int64_t>(bytes - i, noise.size()));
    at = (uint64_t)(block.get() + shift * size);
  }
};

static void expect(bool right, const char* what) {
  ++calls;
  if (right) return;
  printf("wrong: %s\n", what);
  exit(1);
}

static void updates(const char* isa, int64_t n, int64_t shift, int threads, bool all) {
  const ZtHyper h = {1e-3f, 0.1f, 0.95f, 0.05f, 1e-8f, 0.99f, 0.0f, 1.2f, 0.5f};
  for (int grad : {F32, BF16, F16})
    for (int out : {NONE, F32, BF16, F16})
      for (int l2 = 0; l2 <= all; ++l2) {
        if (!all && out != grad) continue;
        Array p(n, F32, shift), m(n, F32, 0), v(n, F32, shift), g(n, grad, shift), o(n, out == NONE ? F32 : out, shift);
        expect(!zt_adamw(p.at, m.at, v.at, g.at, out ? o.at : 0, n, grad, out, l2, &h, threads, isa), "zt_adamw");
        if (out && (grad == F32) == (out == F32))
          expect(!zt_adamw(p.at, m.at, v.at, g.at, g.at, n, grad, out, l2, &h, threads, isa), "zt_adamw in place");
      }
}

static void sums(const char* isa, int64_t n, int64_t shift, int threads) {
  for (int from : {F32, BF16, F16}) {
    Array x(n, from, shift), y(n, from, shift), acc(n, F32, shift);
    double total = 0;
    expect(!zt_sum_of_squares(x.at, n, from, threads, isa, &total), "zt_sum_of_squares");
    expect(!zt_accumulate(acc.at, x.at, n, from, 0.5f, threads, isa), "zt_accumulate");
    const int64_t begin = n / 3, rest = n - begin;
    const uint64_t sources[2] = {x.at, y.at};
    for (int to : {F32, BF16, F16})
      for (int add : {0, 1}) {
        Array target(rest, to, shift);
        expect(!zt_sum(target.at, to, sources, 2, begin, rest, from, add, threads, isa), "zt_sum");
      }
    expect(!zt_sum(x.at + begin * (from == F32 ? 4 : 2), from, sources, 2, begin, rest, from, 0, threads, isa), "zt_sum in place");
  }
}

int main() {
  for (const char* isa : {"generic", "avx2", "avx512", "sve"}) {
    if (!zt_isa(isa)) continue;
    for (int64_t n : {0, 1, 31, 32, 33, 99, 8193, 65536 + 77})
      for (int64_t shift : {0, 1, 5})
        for (int threads : {1, 3}) {
          if (n > 9000 && (shift || threads == 1)) continue;
          updates(isa, n, shift, threads, n < 1000);
          sums(isa, n, shift, threads);
        }
    if (strcmp(isa, "generic")) updates(isa, (1 << 20) + 45, 3, 2, false);   // long enough for non-temporal stores
    printf("%s ", isa);
  }
  expect(zt_isa("sse9") == nullptr, "an unknown ISA");
  uint32_t word = 0;
  zt_post((uint64_t)&word, 7);
  expect(zt_wait((uint64_t)&word, 7, 1000) == 1 && zt_wait((uint64_t)&word, 8, 1000) == 0, "zt_wait");
  Array pages(8192, F32, 0);
  zt_touch(pages.at, 32768, 4096, 2);
  expect(((char*)pages.at)[0] == 0 && ((char*)pages.at)[28672] == 0, "zt_touch");
  for (int64_t shift : {0, 1, 5})
    for (int64_t bytes : {0, 1, 63, 64, 79, 80, 200, (1 << 20) - 1, (2 << 20) + 77}) {
      Array from(bytes + 2, BF16, shift), to(bytes + 2, F32, 0);
      const char before = ((char*)to.at)[bytes + 3];
      zt_copy(to.at + 3, from.at + 1, bytes, 2);
      expect(!memcmp((char*)to.at + 3, (char*)from.at + 1, (size_t)bytes), "zt_copy");
      expect(((char*)to.at)[bytes + 3] == before, "zt_copy went too far");
    }
  zt_prefer_nodes(pages.at & ~4095ull, 4096, 1);        // refused in many containers
  printf("%d calls\n", calls);
  return 0;
}
