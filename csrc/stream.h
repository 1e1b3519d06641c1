// The streamed optimizer's schedule. States lie in host memory and pass through a ring of device slots:
//
//   in       | load 0 | load 1 | load 2 | . . . . | load 3 |            p, m, v (and gradient and parameters that lie on the host)
//   compute           | update 0 | update 1 | update 2 | . . . | update 3 |
//   out                          | store 0  | store 1  | store 2  |     p, m, v (and the parameters that the host wants)
//
// [Note: waits]  Each is one edge, and nothing else orders the three streams:
//   START    in begins after what the caller names: host states that are still being written, a gradient that a kernel
//            still produces, parameters that a forward pass still reads. The first update and store follow by LOADED and
//            UPDATED; out waits too, for calls with nothing to do (DONE is recorded there).
//   FREE     load k overwrites the slot that store k - slots still reads.
//   LOADED   update k reads what load k brought.
//   UPDATED  store k takes away what update k made.
//   DONE     what the caller names to be held back begins after the last store (and so after the last update).
// Two calls on the same range need an order between them that the caller gives: START of the one after DONE of the other.
// Calls on different ranges may overlap freely: the ring goes on where the last call left it.
//
// Device is a policy: CUDA's (cuda/stream.cu), or a mock that runs streams in hostile orders
// (tests/unit/native/stream_mock.cpp).
//   Stream, Event                      handles
//   int record(Event&, Stream)         all of these enqueue and return 0, or an error code
//   int wait(Stream, const Event&)     for the record that came last before this call; none: no wait
//   int copy(Stream, void* to, const void* from, int64_t bytes, bool in)
// DROP leaves out waits: that a test notices each of them missing is what makes it a test.
#pragma once
#include <stdint.h>

#include "ranges.h"

#define ZT_TRY(call) do { const int zt_error_ = (call); if (zt_error_) return zt_error_; } while (0)

namespace zt {

enum Wait : unsigned {
  START_IN = 1, START_OUT = 2, FREE = 4, LOADED = 8, UPDATED = 16, DONE = 32
};
constexpr int MAX_SLOTS = 16;

template <class Device>
struct Order {                                          // null: nothing to wait for, nobody to hold back
  const typename Device::Stream* after_stream;          // begin after what is enqueued there now
  const typename Device::Event* after_event;
  const typename Device::Stream* before_stream;         // what is enqueued there from now on begins after us
  typename Device::Event* done_event;                   // recorded when all is done
};

struct Ring {                                           // one slot: p, m, v, gradient, output, `chunk` elements of each
  char* memory;
  int64_t chunk;                                        // elements, a multiple of 64
  int slots;
  int64_t grad_size, out_size;                          // bytes per element that the slots have room for; 0: never staged
  int64_t slot_bytes() const { return chunk * (12 + grad_size + out_size); }
};

template <class Device, unsigned DROP = 0>
struct Streamer {
  using Stream = typename Device::Stream;
  using Event = typename Device::Event;

  Device& device;
  Ring ring;
  Stream in, compute, out;
  Event start, done, loaded[MAX_SLOTS], updated[MAX_SLOTS], freed[MAX_SLOTS];
  int next = 0;

  int wait(Wait which, Stream stream, const Event& event) { return DROP & which ? 0 : device.wait(stream, event); }

  // update(stream, ZtRange): enqueues the kernel; all addresses in its range are the device's. Sizes are bytes per element.
  // load_out: outputs on the host pass through the slots in both directions, because the kernel may leave them as they are.
  template <class Update>
  int run(const ZtRange* ranges, int64_t n_ranges, int64_t grad_size, int64_t out_size, bool load_out,
          const Order<Device>& order, Update&& update) {
    ZT_TRY(begin(order));
    for (int64_t r = 0; r < n_ranges; ++r)
      for (int64_t at = 0; at < ranges[r].n; at += ring.chunk)
        ZT_TRY(piece(ranges[r], at, grad_size, out_size, load_out, update));
    return end(order);
  }

 private:
  int begin(const Order<Device>& order) {
    const Event* events[2] = {nullptr, order.after_event};
    if (order.after_stream) {
      ZT_TRY(device.record(start, *order.after_stream));
      events[0] = &start;
    }
    for (const Event* event : events) {
      if (!event) continue;
      ZT_TRY(wait(START_IN, in, *event));
      ZT_TRY(wait(START_OUT, out, *event));
    }
    return 0;
  }

  template <class Update>
  int piece(const ZtRange& range, int64_t at, int64_t grad_size, int64_t out_size, bool load_out, Update&& update) {
    const int slot = next;
    next = (next + 1) % ring.slots;
    const int64_t n = range.n - at < ring.chunk ? range.n - at : ring.chunk;
    char* const base = ring.memory + slot * ring.slot_bytes();
    char* const states[3] = {base, base + 4 * ring.chunk, base + 8 * ring.chunk};
    char* const g = base + 12 * ring.chunk;
    char* const o = g + ring.grad_size * ring.chunk;
    const uint64_t homes[3] = {range.p + 4 * at, range.m + 4 * at, range.v + 4 * at};
    const uint64_t g_home = range.g + grad_size * at, o_home = range.out ? range.out + out_size * at : 0;
    const bool load_g = range.place & ZT_GRAD_ON_HOST, store_out = range.out && (range.place & ZT_OUT_ON_HOST);

    ZT_TRY(wait(FREE, in, freed[slot]));
    for (int s = 0; s < 3; ++s) ZT_TRY(device.copy(in, states[s], (const void*)homes[s], 4 * n, true));
    if (load_g) ZT_TRY(device.copy(in, g, (const void*)g_home, grad_size * n, true));
    if (load_out && store_out) ZT_TRY(device.copy(in, o, (const void*)o_home, out_size * n, true));
    ZT_TRY(device.record(loaded[slot], in));

    ZT_TRY(wait(LOADED, compute, loaded[slot]));
    ZT_TRY(update(compute, ZtRange{(uint64_t)states[0], (uint64_t)states[1], (uint64_t)states[2], load_g ? (uint64_t)g : g_home,
                                   store_out ? (uint64_t)o : o_home, n, range.hyper, 0}));
    ZT_TRY(device.record(updated[slot], compute));

    ZT_TRY(wait(UPDATED, out, updated[slot]));
    for (int s = 0; s < 3; ++s) ZT_TRY(device.copy(out, (void*)homes[s], states[s], 4 * n, false));
    if (store_out) ZT_TRY(device.copy(out, (void*)o_home, o, out_size * n, false));
    return device.record(freed[slot], out);
  }

  int end(const Order<Device>& order) {
    ZT_TRY(device.record(done, out));
    if (order.before_stream) ZT_TRY(wait(DONE, *order.before_stream, done));
    return order.done_event ? device.record(*order.done_event, out) : 0;
  }
};

}  // namespace zt
