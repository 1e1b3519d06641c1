// csrc/stream.h's schedule on a GPU of pretence: streams are queues of operations, events are edges between them, and
// drain() runs the queues one operation at a time in a hostile order that respects nothing but those edges. Results go
// through the plain CPU kernel, so they must equal its bits whatever the order is.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "../../../csrc/cpu/kernels.h"
#include "../../../csrc/stream.h"

namespace {

struct Mock {
  using Stream = int;                                   // which queue
  using Event = int;                                    // the record that came last, from 1; 0: never recorded
  struct Op { int waits_for, records; std::function<void()> run; };
  std::vector<std::vector<Op>> queues = std::vector<std::vector<Op>>(5);
  int records = 0;

  void enqueue(Stream stream, std::function<void()> run) { queues[stream].push_back({0, 0, std::move(run)}); }
  int record(Event& event, Stream stream) {
    event = ++records;
    queues[stream].push_back({0, event, [] {}});
    return 0;
  }
  int wait(Stream stream, const Event& event) {
    if (event) queues[stream].push_back({event, 0, [] {}});
    return 0;
  }
  int copy(Stream stream, void* to, const void* from, int64_t bytes, bool) {
    enqueue(stream, [=] { memcpy(to, from, (size_t)bytes); });
    return 0;
  }

  // Mostly the runnable stream that this seed likes best, so that streams run far ahead of others; else any.
  int drain(unsigned seed) {
    std::mt19937 random(seed);
    std::vector<int> favourites = {0, 1, 2, 3, 4};
    std::shuffle(favourites.begin(), favourites.end(), random);
    std::vector<size_t> at(queues.size());
    std::vector<char> done(records + 1);
    for (;;) {
      std::vector<int> runnable;
      bool left = false;
      for (int stream : favourites) {
        if (at[stream] == queues[stream].size()) continue;
        left = true;
        const Op& op = queues[stream][at[stream]];
        if (!op.waits_for || done[op.waits_for]) runnable.push_back(stream);
      }
      if (!left) return 0;
      if (runnable.empty()) return -1;                  // a deadlock
      const int stream = random() % 8 ? runnable[0] : runnable[random() % runnable.size()];
      const Op& op = queues[stream][at[stream]++];
      op.run();
      done[op.records] = 1;
    }
  }
};

const int IN = 0, COMPUTE = 1, OUT = 2, BEFORE = 3, AFTER = 4;   // BEFORE and AFTER are the caller's streams

int64_t size_of(int dtype) { return dtype == zt::F32 ? 4 : 2; }

}  // namespace

// What the caller's streams do around one step: gradients arrive, and afterwards somebody looks at states and outputs.
struct Step {
  const ZtHyper* hyper;
  const char* gradient;  // of all ranges, one after the other
  float* seen;           // p of all ranges as AFTER finds it; when there are no elements at all, one flag
  char* seen_out;
};

template <unsigned DROP>
static int run(unsigned seed, int64_t chunk, int slots, const ZtRange* ranges, int n_ranges, const Step* steps, int n_steps,
               int grad, int out, bool events, bool skips) {
  Mock gpu;
  const int64_t gs = size_of(grad), os = size_of(out), staged = events ? 0 : 4;
  std::vector<char> memory((size_t)(chunk * (12 + 2 * staged) * slots), (char)0xff);   // NaN in every dtype
  zt::Streamer<Mock, DROP> streamer = {gpu, {memory.data(), chunk, slots, staged, staged}, IN, COMPUTE, OUT, 0, 0, {}, {}, {}};
  float flag = 0;
  for (int s = 0; s < n_steps; ++s) {
    const Step& step = steps[s];
    const char* g = step.gradient;
    for (int r = 0; r < n_ranges; g += ranges[r++].n * gs) gpu.copy(BEFORE, (void*)ranges[r].g, g, ranges[r].n * gs, true);
    gpu.enqueue(BEFORE, [&flag] { flag += 1; });
    int begin = 0, done = 0;
    const int before = BEFORE, after = AFTER;
    zt::Order<Mock> order = {&before, nullptr, &after, nullptr};
    if (events) {
      gpu.record(begin, BEFORE);
      order = {nullptr, &begin, nullptr, &done};
    }
    const int error = streamer.run(ranges, n_ranges, gs, os, skips, order, [&](int stream, const ZtRange& x) {
      gpu.enqueue(stream, [=] {
        if (skips) return;
        const zt::AdamArgs a = {(float*)x.p, (float*)x.m, (float*)x.v, (const void*)x.g, (void*)x.out, x.n, false};
        zt::generic::kernels.adam(a, (zt::Dtype)grad, (zt::Dtype)out, false, step.hyper[x.hyper]);
      });
      return 0;
    });
    if (error) return error;
    if (events && !(DROP & zt::DONE)) gpu.wait(AFTER, done);
    float* seen = step.seen;
    char* seen_out = step.seen_out;
    for (int r = 0; r < n_ranges; ++r) {
      const int64_t n = ranges[r].n;
      gpu.copy(AFTER, seen, (const void*)ranges[r].p, 4 * n, false);
      gpu.copy(AFTER, seen_out, (const void*)ranges[r].out, os * n, false);
      seen += n;
      seen_out += os * n;
    }
    if (seen == step.seen) gpu.enqueue(AFTER, [seen, &flag] { *seen = flag; });   // no elements at all
    // The next step's gradients come after this step: BEFORE waits for AFTER.
    int turn = 0;
    gpu.record(turn, AFTER);
    gpu.wait(BEFORE, turn);
  }
  return gpu.drain(seed);
}

extern "C" __attribute__((visibility("default"))) int mock_run(unsigned seed, unsigned drop, int64_t chunk, int slots,
                                                               const ZtRange* ranges, int n_ranges, const Step* steps,
                                                               int n_steps, int grad, int out, int events, int skips) {
  const auto go = [&](auto run) {
    return run(seed, chunk, slots, ranges, n_ranges, steps, n_steps, grad, out, events != 0, skips != 0);
  };
  switch (drop) {
    case 0: return go(run<0>);
    case zt::START_IN: return go(run<zt::START_IN>);
    case zt::START_OUT: return go(run<zt::START_OUT>);
    case zt::FREE: return go(run<zt::FREE>);
    case zt::LOADED: return go(run<zt::LOADED>);
    case zt::UPDATED: return go(run<zt::UPDATED>);
    case zt::DONE: return go(run<zt::DONE>);
  }
  return -2;
}
