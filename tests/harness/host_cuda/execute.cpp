// Runs what cuda_runtime.h declares. Nothing runs when it is enqueued: streams are queues, events are edges between them,
// and a synchronisation runs the queues one operation at a time, in a hostile order that respects nothing but those edges.
// A kernel's blocks run one after the other in any order. Its threads are fibers: one warp runs ahead as far as it can
// before the next one begins, so a missing barrier shows.
#include "cuda_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <set>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#define HOST_CUDA_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HOST_CUDA_ASAN
#endif
#endif
#ifdef HOST_CUDA_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned host_cuda_seed = 1;
int host_cuda_multiprocessors = 1, host_cuda_calls_left = -1, host_cuda_live, host_cuda_launches;

namespace {

[[noreturn]] void fail(const char* what) {
  printf("wrong: %s\n", what);
  fflush(stdout);
  _Exit(3);
}

std::mt19937& random_numbers() {
  static std::mt19937 generator;
  static unsigned seed = 0;
  if (seed != host_cuda_seed) generator.seed(seed = host_cuda_seed);
  return generator;
}

std::vector<int> any_order(int n) {
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_numbers());
  return order;
}

// ---- threads of a block ----------------------------------------------------------------------------------------------
constexpr int LANES = 32;
constexpr size_t STACK = 128 << 10;
enum State { READY, IN_SHUFFLE, AT_BARRIER, ENDED };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  void* sanitizer;
};
struct Warp {
  uint64_t values[2][LANES];                            // in turn: a lane may be one shuffle ahead of another
  unsigned shuffles[LANES];
};
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
int current, threads;
const std::function<void()>* body;

const void* scheduler_stack;
size_t scheduler_stack_bytes;
#ifdef HOST_CUDA_ASAN
void leave(void** save, const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(save, stack, bytes); }
void arrive(void* saved, const void** from, size_t* bytes) { __sanitizer_finish_switch_fiber(saved, from, bytes); }
#else
void leave(void**, const void*, size_t) {}
void arrive(void*, const void**, size_t*) {}
#endif

void fiber_main() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  fibers[current]->state = ENDED;
  leave(nullptr, scheduler_stack, scheduler_stack_bytes);
  setcontext(&scheduler);
}

void resume(int thread) {
  current = thread;
  threadIdx = {(unsigned)thread, 0, 0};
  Fiber& fiber = *fibers[thread];
  void* own = nullptr;
  leave(&own, fiber.stack.get(), STACK);
  swapcontext(&scheduler, &fiber.context);
  arrive(own, nullptr, nullptr);
}

void yield(State state) {
  Fiber& fiber = *fibers[current];
  fiber.state = state;
  leave(&fiber.sanitizer, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fiber.context, &scheduler);
  arrive(fiber.sanitizer, &scheduler_stack, &scheduler_stack_bytes);
}

int count(int from, int to, State state) {
  int n = 0;
  for (int i = from; i < to; ++i) n += fibers[i]->state == state;
  return n;
}

void set_ready(int from, int to, State state) {
  for (int i = from; i < to; ++i)
    if (fibers[i]->state == state) fibers[i]->state = READY;
}

bool advance(int warp) {                                // its runnable lanes, each up to where it waits
  bool ran = false;
  const int from = warp * LANES, to = std::min(threads, from + LANES);
  if (!count(from, to, READY)) return false;
  for (int lane : any_order(to - from))
    if (fibers[from + lane]->state == READY) {
      resume(from + lane);
      ran = true;
    }
  if (count(from, to, IN_SHUFFLE) == LANES) set_ready(from, to, IN_SHUFFLE);
  return ran;
}

void run_block() {
  while ((int)fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new char[STACK]);
  }
  warps.assign((threads + LANES - 1) / LANES, Warp{});
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.state = READY;
  }
  const std::vector<int> favourites = any_order((int)warps.size());
  for (int ended = 0; ended < threads; ended = count(0, threads, ENDED)) {
    if (std::any_of(favourites.begin(), favourites.end(), advance)) continue;
    const int waiting = count(0, threads, AT_BARRIER);
    if (!waiting || waiting + count(0, threads, ENDED) < threads) fail("threads of one warp wait in different places");
    set_ready(0, threads, AT_BARRIER);
  }
}

// ---- streams -----------------------------------------------------------------------------------------------------------
struct Op { int waits_for, records; std::function<void()> run; };

}  // namespace

struct HostStream { std::deque<Op> queue; };
struct HostEvent { int record; };                       // the one that came last, from 1; 0: none yet

namespace {

HostStream default_stream;
std::set<HostStream*> streams = {&default_stream};
std::vector<char> recorded = {1};
std::set<void*> registered;
cudaError_t last_error = cudaSuccess;
int device = 0;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

HostStream& of(cudaStream_t stream) {
  HostStream* known = stream ? stream : &default_stream;
  if (!streams.count(known)) fail("a stream that does not exist");
  return *known;
}

bool refused() {
  if (host_cuda_calls_left < 0) return false;
  if (host_cuda_calls_left == 0) return true;
  --host_cuda_calls_left;
  return false;
}

// Runs operations until the queue of `wanted` is empty, or with null all queues. Mostly of the runnable stream that this
// seed likes best, so that streams run far ahead of others.
void drain(const HostStream* wanted) {
  std::vector<HostStream*> favourites(streams.begin(), streams.end());
  std::shuffle(favourites.begin(), favourites.end(), random_numbers());
  for (;;) {
    std::vector<HostStream*> runnable;
    bool left = false;
    for (HostStream* stream : favourites) {
      if (stream->queue.empty()) continue;
      left = left || !wanted || stream == wanted;
      if (!stream->queue.front().waits_for || recorded[stream->queue.front().waits_for]) runnable.push_back(stream);
    }
    if (!left) return;
    if (runnable.empty()) fail("a deadlock of streams");
    HostStream* stream = random_numbers()() % 8 ? runnable[0] : runnable[random_numbers()() % runnable.size()];
    const Op op = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (op.run) op.run();
    if (op.records) recorded[op.records] = 1;
  }
}

}  // namespace

void __syncthreads() {
#ifndef HOST_CUDA_WITHOUT_BARRIERS                      // that a test notices it is what makes it a test
  yield(AT_BARRIER);
#endif
}

uint64_t host_cuda_shuffle_xor(uint32_t mask, uint64_t value, int lanes) {
  if (mask != ~0u) fail("a shuffle that leaves out lanes");
  Warp& warp = warps[current / LANES];
  const int lane = current % LANES, turn = warp.shuffles[lane]++ % 2;
  warp.values[turn][lane] = value;
  yield(IN_SHUFFLE);
  return warp.values[turn][lane ^ lanes];
}

cudaError_t host_cuda_launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  if (!config.gridDim.x || !config.blockDim.x || config.blockDim.x > 1024) return result(cudaErrorInvalidValue);
  ++host_cuda_launches;
  of(config.stream).queue.push_back({0, 0, [grid = config.gridDim, block = config.blockDim, thread = std::move(thread)] {
    gridDim = grid;
    blockDim = block;
    threads = (int)block.x;
    body = &thread;
    for (int index : any_order((int)grid.x)) {
      blockIdx = {(unsigned)index, 0, 0};
      run_block();
    }
  }});
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  of(stream).queue.push_back({0, 0, [=] { memcpy(to, from, bytes); }});
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->record = (int)recorded.size();
  recorded.push_back(0);
  of(stream).queue.push_back({0, event->record, nullptr});
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (event->record) of(stream).queue.push_back({event->record, 0, nullptr});
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags != cudaStreamNonBlocking) fail("a stream that waits for the default stream");
  if (refused()) return result(cudaErrorMemoryAllocation);
  streams.insert(*stream = new HostStream);
  ++host_cuda_live;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {    // CUDA finishes its work first
  drain(&of(stream));
  streams.erase(stream);
  delete stream;
  --host_cuda_live;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { drain(&of(stream)); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { drain(nullptr); return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (refused()) return result(cudaErrorMemoryAllocation);
  *event = new HostEvent{0};
  ++host_cuda_live;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) { delete event; --host_cuda_live; return cudaSuccess; }

cudaError_t cudaHostRegister(void* address, size_t, unsigned) {
  return result(registered.insert(address).second ? cudaSuccess : cudaErrorHostMemoryAlreadyRegistered);
}
cudaError_t cudaHostUnregister(void* address) {
  return result(registered.erase(address) ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaGetDevice(int* to) { *to = device; return cudaSuccess; }
cudaError_t cudaSetDevice(int to) { device = to; return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { *n = 2; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? host_cuda_multiprocessors : which == cudaDevAttrComputeCapabilityMajor ? 7 : 5;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
