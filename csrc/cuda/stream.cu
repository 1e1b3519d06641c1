// The offload optimizer: states in page-locked host memory stream through the GPU in chunks. The schedule is ../stream.h's,
// the kernel adam.cu's. Nothing here makes the host wait but zt_stream_free.
#include <new>

#include "../stream.h"
#include "common.cuh"

namespace {

struct Cuda {
  using Stream = cudaStream_t;
  using Event = cudaEvent_t;
  int record(Event& event, Stream stream) { return (int)cudaEventRecord(event, stream); }
  int wait(Stream stream, const Event& event) { return (int)cudaStreamWaitEvent(stream, event, 0); }
  int copy(Stream stream, void* to, const void* from, int64_t bytes, bool in) {
    return (int)cudaMemcpyAsync(to, from, (size_t)bytes, in ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, stream);
  }
};

struct Handle {
  Cuda cuda;
  int device;
  zt::Streamer<Cuda> streamer;
};

int create(zt::Streamer<Cuda>& s) {
  for (cudaStream_t* stream : {&s.in, &s.compute, &s.out})
    ZT_TRY((int)cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
  for (cudaEvent_t* event : {&s.start, &s.done}) ZT_TRY((int)cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  for (int i = 0; i < s.ring.slots; ++i)
    for (cudaEvent_t* event : {&s.loaded[i], &s.updated[i], &s.freed[i]})
      ZT_TRY((int)cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  return 0;
}

void destroy(zt::Streamer<Cuda>& s) {                   // what was never created is null
  for (cudaStream_t stream : {s.in, s.compute, s.out})
    if (stream) cudaStreamDestroy(stream);
  for (cudaEvent_t event : {s.start, s.done})
    if (event) cudaEventDestroy(event);
  for (int i = 0; i < s.ring.slots; ++i)
    for (cudaEvent_t event : {s.loaded[i], s.updated[i], s.freed[i]})
      if (event) cudaEventDestroy(event);
}

constexpr uint64_t NO_STREAM = ~0ull;                   // 0 is a stream: the default one

}  // namespace

// Bytes of device memory that a ring needs. grad_size, out_size: bytes per element of gradients and of outputs that lie on
// the host, 0 where they never do. -1: the arguments are out of bounds.
API int64_t zt_stream_bytes(int64_t chunk, int32_t slots, int32_t grad_size, int32_t out_size) {
  if (chunk < 64 || chunk % 64 || slots < 1 || slots > zt::MAX_SLOTS) return -1;
  return zt::Ring{nullptr, chunk, slots, grad_size, out_size}.slot_bytes() * slots;
}

// memory: zt_stream_bytes() of the device, its address a multiple of 16; the caller's, who keeps it until zt_stream_free.
API int zt_stream_new(int32_t device, uint64_t memory, int64_t chunk, int32_t slots, int32_t grad_size, int32_t out_size,
                      uint64_t* handle) {
  if (zt_stream_bytes(chunk, slots, grad_size, out_size) < 0 || memory % 16) return (int)cudaErrorInvalidValue;
  zt::OnDevice on(device);
  if (on.error != cudaSuccess) return (int)on.error;
  Handle* h = (Handle*)calloc(1, sizeof(Handle));
  if (!h) return (int)cudaErrorMemoryAllocation;
  h = new (h) Handle{{}, device, {h->cuda, {(char*)memory, chunk, slots, grad_size, out_size}, {}, {}, {}, {}, {}, {}, {}, {}}};
  const int error = create(h->streamer);
  if (error) {
    destroy(h->streamer);
    free(h);
    return error;
  }
  *handle = (uint64_t)h;
  return 0;
}

// Waits for what is under way, then gives everything back but the caller's memory.
API int zt_stream_free(uint64_t handle) {
  Handle* h = (Handle*)handle;
  zt::OnDevice on(h->device);
  const int error = (int)cudaStreamSynchronize(h->streamer.out);
  destroy(h->streamer);
  free(h);
  return error;
}

// Ranges' p, m, v on the host; g and out where `place` says. wait_stream, signal_stream: NO_STREAM for none. wait_event,
// signal_event: 0 for none. See ../stream.h for what they order. scale, changed: as zt_adamw's; where the scale is not finite,
// what lies on the host comes back as it was.
API int zt_stream_adamw(uint64_t handle, const ZtRange* ranges, int64_t n_ranges, const ZtHyper* hypers, int32_t grad_dtype,
                        int32_t out_dtype, int32_t l2, uint64_t scale, uint64_t changed, uint64_t wait_stream,
                        uint64_t wait_event, uint64_t signal_stream, uint64_t signal_event) {
  Handle* h = (Handle*)handle;
  const int64_t grad_size = zt::size_of(grad_dtype), out_size = zt::size_of(out_dtype);
  for (int64_t i = 0; i < n_ranges; ++i)
    if (((ranges[i].place & ZT_GRAD_ON_HOST) && grad_size > h->streamer.ring.grad_size) ||
        ((ranges[i].place & ZT_OUT_ON_HOST) && out_size > h->streamer.ring.out_size))
      return (int)cudaErrorInvalidValue;
  zt::OnDevice on(h->device);
  if (on.error != cudaSuccess) return (int)on.error;
  const cudaStream_t after = (cudaStream_t)wait_stream, before = (cudaStream_t)signal_stream;
  const cudaEvent_t after_event = (cudaEvent_t)wait_event;
  cudaEvent_t done_event = (cudaEvent_t)signal_event;
  const zt::Order<Cuda> order = {wait_stream == NO_STREAM ? nullptr : &after, wait_event ? &after_event : nullptr,
                                 signal_stream == NO_STREAM ? nullptr : &before, signal_event ? &done_event : nullptr};
  const zt::AdamCall call = {hypers, grad_dtype, out_dtype, l2 != 0, (const float*)scale, (const uint8_t*)changed, h->device};
  return h->streamer.run(ranges, n_ranges, grad_size, out_size, scale || changed, order,
                         [&](cudaStream_t stream, const ZtRange& piece) { return zt::launch_adam(call, &piece, 1, stream); });
}
