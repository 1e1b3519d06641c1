/* A fake libcuda.so.1, the driver as the CUDA runtime sees it: which version it is, and how it starts, say the
   variables FAKE_CUDA_VERSION (13000 for 13.0) and FAKE_CUDA_INIT (a CUresult). It has no device: whatever is asked
   of one fails. */
#include <stdlib.h>
#include <string.h>

enum { UNKNOWN = 999 };

static int variable(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static int anything_else(void) { return UNKNOWN; }

int cuInit(unsigned flags) { (void)flags; return variable("FAKE_CUDA_INIT", 0); }

int cuDriverGetVersion(int *version) { *version = variable("FAKE_CUDA_VERSION", 13000); return 0; }

int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status);

int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags) {
  (void)version; (void)flags;
  if (!strcmp(name, "cuInit")) *found = (void *)cuInit;
  else if (!strcmp(name, "cuDriverGetVersion")) *found = (void *)cuDriverGetVersion;
  else if (!strcmp(name, "cuGetProcAddress")) *found = (void *)cuGetProcAddress_v2;
  else *found = (void *)anything_else;
  return 0;
}

int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status) {
  if (status) *status = 0;
  return cuGetProcAddress(name, found, version, flags);
}
