// Every entry of libzt_cuda.so on the host (tests/harness/host_cuda), in hostile shapes: the bits must be the CPU kernels',
// and arrays end where a sanitizer watches. The argument names what to try, the second one
// is ZT_BLOCK of the build. Prints how many comparisons were made.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "../../../csrc/cpu/half.h"
#include "../../../csrc/formula.h"
#include "../../../csrc/ranges.h"

extern "C" {
int zt_adamw(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, int64_t, int32_t, int32_t, int32_t, const ZtHyper*, int32_t,
             const char*);
int zt_sum_of_squares(uint64_t, int64_t, int32_t, int32_t, const char*, double*);
// The CUDA sources are built with these names: both libraries have zt_adamw.
int zt_cuda_adamw(const ZtRange*, int64_t, const ZtHyper*, int32_t, int32_t, int32_t, uint64_t, uint64_t, int32_t, uint64_t);
int zt_sums_of_squares(const uint64_t*, const int64_t*, const int32_t*, int64_t, uint64_t, uint64_t, int32_t, uint64_t);
int64_t zt_stream_bytes(int64_t, int32_t, int32_t, int32_t);
int zt_stream_new(int32_t, uint64_t, int64_t, int32_t, int32_t, int32_t, uint64_t*);
int zt_stream_free(uint64_t);
int zt_stream_adamw(uint64_t, const ZtRange*, int64_t, const ZtHyper*, int32_t, int32_t, int32_t, uint64_t, uint64_t, uint64_t,
                    uint64_t, uint64_t, uint64_t);
int zt_pin(uint64_t, int64_t, int32_t);
int zt_unpin(uint64_t);
}

namespace {

enum { NONE, F32, BF16, F16 };
constexpr uint64_t NO_STREAM = ~0ull;
int64_t comparisons = 0, block = ZT_BLOCK;
std::mt19937 random_bits(7);

int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }

void expect(bool right, const std::string& what) {
  ++comparisons;
  if (right) return;
  printf("wrong: %s (seed %u, %d multiprocessors)\n", what.c_str(), host_cuda_seed, host_cuda_multiprocessors);
  exit(1);
}

// n elements of a dtype, `shift` elements into a 16-byte aligned block of the heap that ends with them.
struct Array {
  int64_t n, shift;
  int dtype;
  std::unique_ptr<char[]> block;
  Array(int64_t n, int dtype, int64_t shift) : n(n), shift(shift), dtype(dtype), block(new char[bytes()]) {}
  int64_t bytes() const { return (n + shift) * size_of(dtype); }
  char* data() const { return block.get() + shift * size_of(dtype); }
  uint64_t at() const { return (uint64_t)data(); }
  Array copy() const {
    Array other(n, dtype, shift);
    memcpy(other.block.get(), block.get(), (size_t)bytes());
    return other;
  }
  float get(int64_t i) const {
    if (dtype == F32) return ((const float*)data())[i];
    const uint16_t x = ((const uint16_t*)data())[i];
    return dtype == BF16 ? zt_from_bits((uint32_t)x << 16) : zt_half_widen(x);
  }
  void set(int64_t i, float x) const {
    if (dtype == F32) ((float*)data())[i] = x;
    else ((uint16_t*)data())[i] = dtype == BF16 ? (uint16_t)zt_bf16_round(zt_bits(x)) : zt_half_round(x);
  }
  // Bits of every kind, and among them numbers as they are in a training: `wild` of 8.
  void fill(unsigned wild, bool positive = false) const {
    for (int64_t i = -shift; i < n; ++i) {
      const uint32_t bits = random_bits();
      if (bits % 8 >= wild) set(i, ((int32_t)random_bits() / 2147483648.0f) * (bits % 16 < 8 ? 1.0f : 1e-6f));
      else if (dtype == F32) ((uint32_t*)data())[i] = (uint32_t)random_bits();
      else ((uint16_t*)data())[i] = (uint16_t)random_bits();
      if (positive && dtype == F32) ((uint32_t*)data())[i] &= 0x7fffffffu;
    }
  }
  // Equal bits; which NaN an fp32 is depends on the hardware.
  bool equals(const Array& other) const {
    for (int64_t i = -shift; i < n; ++i) {
      if (dtype == F32) {
        const uint32_t a = ((const uint32_t*)data())[i], b = ((const uint32_t*)other.data())[i];
        const bool nan_a = (a & 0x7fffffffu) > 0x7f800000u, nan_b = (b & 0x7fffffffu) > 0x7f800000u;
        if (a != b && !(nan_a && nan_b)) return false;
      } else if (((const uint16_t*)data())[i] != ((const uint16_t*)other.data())[i]) {
        return false;
      }
    }
    return true;
  }
};

struct Unit {                                           // of an update: states, gradient, output
  Array p, m, v, g, out;
  int hyper;
  bool in_place;
  Unit(int64_t n, int grad, int to, int64_t shift, int hyper, bool in_place, unsigned wild)
      : p(n, F32, shift), m(n, F32, 0), v(n, F32, shift), g(n, grad, shift), out(to == NONE ? 0 : n, to ? to : F32, 0),
        hyper(hyper), in_place(in_place) {
    p.fill(wild); m.fill(wild); v.fill(wild, true); g.fill(wild); out.fill(wild);
  }
  Unit copy() const { return Unit(*this, 0); }
  uint64_t out_at(int to) const { return to == NONE ? 0 : in_place ? g.at() : out.at(); }
  ZtRange range(int to, int place = 0) const { return {p.at(), m.at(), v.at(), g.at(), out_at(to), p.n, hyper, place}; }
  // What the CPU makes of it.
  void reference(const std::vector<ZtHyper>& hypers, int to, bool l2, float factor, bool changed) const {
    if (changed && to != NONE)
      for (int64_t i = 0; i < p.n; ++i) {
        Array rounded(1, to, 0);
        rounded.set(0, p.get(i));
        if (memcmp(rounded.data(), out.data() + i * size_of(to), (size_t)size_of(to))) p.set(i, out.get(i));
      }
    if (!isfinite(factor)) return;
    ZtHyper h = hypers[hyper];
    h.grad_scale *= factor;
    expect(!zt_adamw(p.at(), m.at(), v.at(), g.at(), out_at(to), p.n, g.dtype, to, l2, &h, 1, "generic"), "the CPU's zt_adamw");
  }
  void compare(const Unit& wanted, const std::string& what) const {
    const std::string where = what + ", " + std::to_string(p.n) + " elements, ";
    expect(p.equals(wanted.p), where + "p"); expect(m.equals(wanted.m), where + "m"); expect(v.equals(wanted.v), where + "v");
    expect(g.equals(wanted.g), where + "g"); expect(out.equals(wanted.out), where + "out");
  }

 private:
  Unit(const Unit& u, int)
      : p(u.p.copy()), m(u.m.copy()), v(u.v.copy()), g(u.g.copy()), out(u.out.copy()), hyper(u.hyper), in_place(u.in_place) {}
};

std::vector<ZtHyper> hypers_of(int n, bool l2) {
  std::vector<ZtHyper> hypers;
  for (int i = 0; i < n; ++i)
    hypers.push_back({1e-3f * (i + 1), 0.1f, 0.95f, 0.05f, 1e-8f, l2 ? 1.0f : 0.99f, l2 ? 0.1f : 0.0f, 1.2f, 0.5f});
  return hypers;
}

// factor, changed: null for none.
void update(const std::vector<int64_t>& lengths, int grad, int to, bool l2, int64_t shift, bool in_place, const float* factor,
            const uint8_t* changed, int n_hypers = 3) {
  const std::vector<ZtHyper> hypers = hypers_of(n_hypers, l2);
  std::vector<Unit> units, wanted;
  std::vector<ZtRange> ranges;
  for (size_t i = 0; i < lengths.size(); ++i) {
    units.push_back(Unit(lengths[i], grad, to, i % 2 ? 0 : shift, (int)i % n_hypers, in_place, 1));
    wanted.push_back(units.back().copy());
    ranges.push_back(units.back().range(to));
    wanted.back().reference(hypers, to, l2, factor ? *factor : 1.0f, changed && *changed);
  }
  {
    // Neither the table nor the hypers of a call need to outlive it.
    const std::vector<ZtRange> passing = ranges;
    const std::vector<ZtHyper> gone = hypers;
    expect(!zt_cuda_adamw(passing.data(), (int64_t)passing.size(), gone.data(), grad, to, l2, (uint64_t)factor,
                          (uint64_t)changed, 0, 0), "zt_adamw");
  }
  cudaDeviceSynchronize();
  const std::string what = "gradient " + std::to_string(grad) + " output " + std::to_string(to) + (l2 ? " l2" : "") +
                           (in_place ? " in place" : "") + " shift " + std::to_string(shift);
  for (size_t i = 0; i < units.size(); ++i) units[i].compare(wanted[i], what);
}

void adamw() {
  const std::vector<std::vector<int64_t>> shapes = {{1}, {7, 0, 8, 9}, {0}, {}, {2047, 2048, 2049, 255, 4099}};
  std::vector<int64_t> many;
  for (int i = 0; i < 150; ++i) many.push_back(i % 7 ? i % 41 : 0);
  for (int grad : {F32, BF16, F16})
    for (int to : {NONE, F32, BF16, F16})
      for (bool l2 : {false, true})
        for (int64_t shift : {0, 1, 4}) {
          host_cuda_multiprocessors = shift == 1 ? 132 : 1;
          ++host_cuda_seed;
          for (const auto& lengths : shapes)
            if (lengths.size() < 5 || !l2 || to == grad) update(lengths, grad, to, l2, shift, false, nullptr, nullptr);
          if (size_of(grad) == size_of(to) && to != NONE) update({1, 8, 2100}, grad, to, l2, shift, true, nullptr, nullptr);
        }
  for (int n_hypers : {1, 8, 9, 12}) update(many, BF16, BF16, false, 1, false, nullptr, nullptr, n_hypers);
  update({8 * 2048 * 3 + 5}, BF16, BF16, false, 0, false, nullptr, nullptr);   // more tiles than blocks, several times
  const int before = host_cuda_launches;
  update(std::vector<int64_t>(56, 3), F32, F32, false, 0, false, nullptr, nullptr);
  update(std::vector<int64_t>(57, 3), F32, F32, false, 0, false, nullptr, nullptr);
  update({0, 0}, F32, F32, false, 0, false, nullptr, nullptr);
  expect(host_cuda_launches - before == 3, "56 ranges are one launch, 57 two, and nothing to do none");
}

void skip() {
  for (int grad : {F32, BF16, F16})
    for (int to : {NONE, F32, BF16, F16})
      for (float factor : {0.37f, 1.0f, 0.0f, INFINITY, -INFINITY, NAN})
        for (uint8_t changed : {0, 1, 255}) {
          ++host_cuda_seed;
          update({1, 8, 2055}, grad, to, false, changed == 1, false, &factor, &changed);
        }
  const uint8_t changed = 1;
  update({300}, BF16, BF16, true, 0, false, nullptr, &changed);
}

void sum(const std::vector<int64_t>& lengths, unsigned wild, int multiprocessors, int64_t shift) {
  ++host_cuda_seed;
  host_cuda_multiprocessors = multiprocessors;
  std::vector<Array> arrays;
  std::vector<uint64_t> x;
  std::vector<int32_t> dtypes;
  std::vector<double> wanted;
  int64_t blocks = 0;
  double total = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    arrays.push_back(Array(lengths[i], 1 + (int)i % 3, shift));
    arrays.back().fill(i % 3 == 1 ? 0 : wild);
    x.push_back(arrays.back().at());
    dtypes.push_back(arrays.back().dtype);
    blocks += (lengths[i] + block - 1) / block;
    double sum = -1;
    expect(!zt_sum_of_squares(x.back(), lengths[i], dtypes.back(), 1, "generic", &sum), "the CPU's zt_sum_of_squares");
    wanted.push_back(sum);
    total += sum;
  }
  wanted.push_back(total);
  const std::unique_ptr<double[]> work(new double[2 * blocks]), result(new double[lengths.size() + 1]);
  for (int64_t i = 0; i < 2 * blocks; ++i) work[i] = 1e300;
  expect(!zt_sums_of_squares(x.data(), lengths.data(), dtypes.data(), (int64_t)x.size(), (uint64_t)work.get(),
                             (uint64_t)result.get(), 0, 0), "zt_sums_of_squares");
  cudaDeviceSynchronize();
  for (size_t i = 0; i < wanted.size(); ++i)
    expect(!memcmp(&wanted[i], &result[i], 8) || (wanted[i] != wanted[i] && result[i] != result[i]),
           "sum " + std::to_string(i) + " of " + std::to_string(lengths.size()));
}

void sums() {
  std::vector<int64_t> many;
  for (int i = 0; i < 200; ++i) many.push_back(i * 7 % 90);
  const int64_t deep = block < 100 ? block * block * 2 + block + 3 : 3 * block + 1;
  for (const std::vector<int64_t>& lengths :
       {std::vector<int64_t>{}, {0}, {1}, {31, 32, 33}, {block - 1, block, block + 1, 0, 2 * block}, {deep, 5, deep + block}, many})
    for (unsigned wild : {0, 1})
      for (int multiprocessors : {1, 132})
        for (int64_t shift : {0, 1}) sum(lengths, wild, multiprocessors, shift);
}

// factor, changed: what the kernel finds on the device. Where the factor is not finite, states and outputs come back as they
// were, wherever they live, but for masters that follow a changed output.
void stream(const std::vector<int>& slot_counts, float factor, uint8_t changed) {
  const int64_t chunk = 64;
  const std::vector<int64_t> lengths = {1, 64, 300, 0, 777};
  for (int dtype : {F32, BF16, F16})
    for (int place : {0, ZT_GRAD_ON_HOST, ZT_OUT_ON_HOST, ZT_GRAD_ON_HOST | ZT_OUT_ON_HOST})
      for (int slots : slot_counts)
        for (bool events : {false, true}) {
          ++host_cuda_seed;
          const int32_t grad_size = place & ZT_GRAD_ON_HOST ? (int32_t)size_of(dtype) : 0;
          const int32_t out_size = place & ZT_OUT_ON_HOST ? (int32_t)size_of(dtype) : 0;
          const int64_t bytes = zt_stream_bytes(chunk, slots, grad_size, out_size);
          const std::unique_ptr<char[]> memory(new char[bytes]);
          memset(memory.get(), 255, (size_t)bytes);
          uint64_t handle = 0;
          expect(!zt_stream_new(1, (uint64_t)memory.get(), chunk, slots, grad_size, out_size, &handle), "zt_stream_new");
          cudaStream_t before, after;
          cudaEvent_t begin, done;
          cudaStreamCreateWithFlags(&before, cudaStreamNonBlocking);
          cudaStreamCreateWithFlags(&after, cudaStreamNonBlocking);
          cudaEventCreateWithFlags(&begin, cudaEventDisableTiming);
          cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
          const std::vector<ZtHyper> hypers = hypers_of(2, false);
          std::vector<Unit> units, wanted;
          std::vector<Array> late, seen;
          std::vector<ZtRange> ranges;
          for (size_t i = 0; i < lengths.size(); ++i) {
            units.push_back(Unit(lengths[i], dtype, dtype, 0, (int)i % 2, false, 1));
            wanted.push_back(units.back().copy());
            ranges.push_back(units.back().range(dtype, place));
            late.push_back(Array(lengths[i], dtype, 0));
            late.back().fill(1);
            seen.push_back(Array(lengths[i], dtype, 0));
            memcpy(wanted.back().g.data(), late.back().data(), (size_t)late.back().bytes());
            wanted.back().reference(hypers, dtype, false, factor, changed);
            cudaMemcpyAsync(units.back().g.data(), late.back().data(), (size_t)late.back().bytes(), cudaMemcpyHostToDevice, before);
          }
          float late_factor = -1;                       // whoever reads it now takes a wrong step
          uint8_t late_changed = !changed;
          cudaMemcpyAsync(&late_factor, &factor, 4, cudaMemcpyHostToDevice, before);
          cudaMemcpyAsync(&late_changed, &changed, 1, cudaMemcpyHostToDevice, before);
          cudaEventRecord(begin, before);
          expect(!zt_stream_adamw(handle, ranges.data(), (int64_t)ranges.size(), hypers.data(), dtype, dtype, 0,
                                  (uint64_t)&late_factor, (uint64_t)&late_changed, events ? NO_STREAM : (uint64_t)before, events ? (uint64_t)begin : 0,
                                  events ? NO_STREAM : (uint64_t)after, events ? (uint64_t)done : 0), "zt_stream_adamw");
          if (events) cudaStreamWaitEvent(after, done, 0);
          for (size_t i = 0; i < units.size(); ++i)
            cudaMemcpyAsync(seen[i].data(), units[i].out.data(), (size_t)seen[i].bytes(), cudaMemcpyDeviceToHost, after);
          cudaStreamSynchronize(after);
          for (size_t i = 0; i < units.size(); ++i) {
            units[i].compare(wanted[i], "streamed");
            expect(seen[i].equals(wanted[i].out), "what the caller's stream sees of a streamed update");
          }
          expect(!zt_stream_free(handle), "zt_stream_free");
          cudaStreamDestroy(before); cudaStreamDestroy(after); cudaEventDestroy(begin); cudaEventDestroy(done);
          expect(host_cuda_live == 0, "streams and events are left");
        }
}

void stream() {
  stream({1, 2, 3, 16}, 0.37f, 0);
  stream({3}, 0.37f, 1);
}

void stream_skip() {
  for (float factor : {INFINITY, -INFINITY, NAN})
    for (uint8_t changed : {0, 1}) stream({1, 3}, factor, changed);
}

void errors() {
  expect(zt_stream_bytes(63, 3, 0, 0) == -1 && zt_stream_bytes(96, 3, 0, 0) == -1 && zt_stream_bytes(64, 0, 0, 0) == -1 &&
             zt_stream_bytes(64, 17, 0, 0) == -1 && zt_stream_bytes(64, 3, 2, 4) == 64 * 3 * 18, "zt_stream_bytes");
  const int64_t bytes = zt_stream_bytes(64, 3, 0, 0);
  const std::unique_ptr<char[]> memory(new char[bytes]);
  uint64_t handle = 0;
  expect(zt_stream_new(0, (uint64_t)memory.get() + 8, 64, 3, 0, 0, &handle) == cudaErrorInvalidValue, "a misaligned ring");
  for (int calls = 0; calls < 3 + 2 + 9; ++calls) {      // each stream and event in turn can't be made
    host_cuda_calls_left = calls;
    expect(zt_stream_new(0, (uint64_t)memory.get(), 64, 3, 0, 0, &handle) == cudaErrorMemoryAllocation, "an event is refused");
    expect(handle == 0 && host_cuda_live == 0, "a stream that was not made leaves something");
  }
  host_cuda_calls_left = -1;
  expect(!zt_stream_new(0, (uint64_t)memory.get(), 64, 3, 0, 0, &handle), "zt_stream_new");
  const Unit unit(64, F32, F32, 0, 0, false, 0);
  const std::vector<ZtHyper> hypers = hypers_of(1, false);
  for (int place : {ZT_GRAD_ON_HOST, ZT_OUT_ON_HOST}) {
    const ZtRange range = unit.range(F32, place);
    expect(zt_stream_adamw(handle, &range, 1, hypers.data(), F32, F32, 0, 0, 0, NO_STREAM, 0, NO_STREAM, 0) == cudaErrorInvalidValue,
           "the slots have no room for what is on the host");
  }
  expect(!zt_stream_free(handle), "zt_stream_free");
  // A page-lock that is refused must not look like the next launch's error.
  expect(!zt_pin((uint64_t)memory.get(), bytes, 0), "zt_pin");
  expect(zt_pin((uint64_t)memory.get(), bytes, 0) == cudaErrorHostMemoryAlreadyRegistered, "zt_pin twice");
  update({5}, F32, F32, false, 0, false, nullptr, nullptr);
  expect(zt_pin((uint64_t)memory.get(), bytes, 0) == cudaErrorHostMemoryAlreadyRegistered, "zt_pin twice");
  sum({5, 9000}, 0, 1, 0);
  expect(!zt_unpin((uint64_t)memory.get()), "zt_unpin");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (argc > 2) block = atoi(argv[2]);
  const struct { const char* name; void (*run)(); } all[] = {
      {"adamw", adamw}, {"skip", skip}, {"sums", sums}, {"stream", stream}, {"stream-skip", stream_skip},
      {"errors", errors}};
  for (const auto& one : all)
    if (what == one.name) one.run();
  printf("%lld comparisons\n", (long long)comparisons);
  return comparisons ? 0 : 2;
}
