/* A stand-in for libnvidia-ml.so.1, for tests: NVML's C interface as far as zerotop's probe uses it.
 *
 * The file that the environment variable FAKE_NVML names says what the GPUs are and how they behave. It is read again
 * whenever it has changed (replace it by a rename), so a test injects faults into a process that is running. Lines:
 *
 *     gpus COUNT
 *     driver missing              nvmlInit answers NVML_ERROR_DRIVER_NOT_LOADED
 *     GPU KEY NUMBER              a value, see `keys` below; GPU is an index or * for all
 *     GPU name TEXT
 *     GPU fail FUNCTION CODE      the function answers this NVML error
 *     GPU hang FUNCTION SECONDS   the function takes this long
 *     GPU xid NUMBER SERIAL       an XID error; every event set delivers each serial number once
 *
 * Counters (energy, PCIe, NVLink) are base + rate x time, so they advance by themselves.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_GPUS = 16, MAX_RULES = 32, MAX_XIDS = 32, NAME = 64 };
enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10, GPU_IS_LOST = 15
};

typedef struct { char function[NAME]; double number; } Rule;
typedef struct { unsigned long long number, serial; } XidEvent;
typedef struct {
    int index;
    char name[NAME];
    double used, total, util, power, power_limit, temperature, slowdown, sm_clock, max_sm_clock, memory_clock,
        max_memory_clock, reasons, sm_activity, tensor_activity, dram_activity, pcie_gen, max_pcie_gen, pcie_width,
        max_pcie_width, pcie_tx, pcie_rx, pcie_tx_rate, pcie_rx_rate, pcie_bits, nvlink_tx, nvlink_rx, nvlink_tx_rate,
        nvlink_rx_rate, nvlinks, nvswitch, ecc_corrected, ecc_uncorrected, remapped, remap_pending, remap_failed,
        energy, mig, lost, gpm, unified, reserved, old_memory_info;
    Rule fails[MAX_RULES], hangs[MAX_RULES];
    int fail_count, hang_count;
    XidEvent xids[MAX_XIDS];
    int xid_count;
} Gpu;

static const struct { const char *name; size_t offset; double start; } keys[] = {
#define KEY(field, value) { #field, offsetof(Gpu, field), value }
    KEY(used, 100e9), KEY(total, 150e9), KEY(util, 97), KEY(power, 650), KEY(power_limit, 700), KEY(temperature, 61),
    KEY(slowdown, 87), KEY(sm_clock, 1980), KEY(max_sm_clock, 1980), KEY(memory_clock, 3201),
    KEY(max_memory_clock, 3201), KEY(reasons, 0), KEY(sm_activity, 81), KEY(tensor_activity, 42),
    KEY(dram_activity, 55), KEY(pcie_gen, 5), KEY(max_pcie_gen, 5), KEY(pcie_width, 16), KEY(max_pcie_width, 16),
    KEY(pcie_tx, 1e14), KEY(pcie_rx, 1e14), KEY(pcie_tx_rate, 2e9), KEY(pcie_rx_rate, 1e9), KEY(pcie_bits, 64),
    KEY(nvlink_tx, 1e15), KEY(nvlink_rx, 1e15), KEY(nvlink_tx_rate, 4e10), KEY(nvlink_rx_rate, 4e10), KEY(nvlinks, 18),
    KEY(nvswitch, 1), KEY(ecc_corrected, 0), KEY(ecc_uncorrected, 0), KEY(remapped, 0), KEY(remap_pending, 0),
    KEY(remap_failed, 0), KEY(energy, 1e6), KEY(mig, 0), KEY(lost, 0), KEY(gpm, 1), KEY(unified, 0), KEY(reserved, 0),
    KEY(old_memory_info, 0),
#undef KEY
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Gpu gpus[MAX_GPUS];
static int gpu_count, driver_missing, initialized;
static char seen_path[4096];
static struct stat seen;

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void pause_s(double seconds) {
    struct timespec left = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };
    while (nanosleep(&left, &left) != 0) {}
}

/* ---- the control file ---------------------------------------------------------------------------------------------- */
static double *value_of(Gpu *gpu, int key) { return (double *)((char *)gpu + keys[key].offset); }

static void add_rule(Rule *rules, int *count, const char *text) {
    if (*count < MAX_RULES && sscanf(text, "%63s %lf", rules[*count].function, &rules[*count].number) == 2) ++*count;
}

static void take(Gpu *gpu, const char *key, const char *rest) {
    if (strcmp(key, "name") == 0) {
        snprintf(gpu->name, sizeof gpu->name, "%.*s", (int)strcspn(rest, "\n"), rest);
    } else if (strcmp(key, "fail") == 0) {
        add_rule(gpu->fails, &gpu->fail_count, rest);
    } else if (strcmp(key, "hang") == 0) {
        add_rule(gpu->hangs, &gpu->hang_count, rest);
    } else if (strcmp(key, "xid") == 0) {
        XidEvent *event = &gpu->xids[gpu->xid_count];
        if (gpu->xid_count < MAX_XIDS && sscanf(rest, "%llu %llu", &event->number, &event->serial) == 2) ++gpu->xid_count;
    } else {
        for (int k = 0; k < (int)(sizeof keys / sizeof keys[0]); ++k)
            if (strcmp(key, keys[k].name) == 0) { *value_of(gpu, k) = atof(rest); return; }
        fprintf(stderr, "fake_nvml: unknown key %s\n", key);
        abort();
    }
}

static void read_control(const char *path) {
    FILE *file = fopen(path, "r");
    gpu_count = 8;
    driver_missing = 0;
    memset(gpus, 0, sizeof gpus);
    for (int i = 0; i < MAX_GPUS; ++i) {
        gpus[i].index = i;
        strcpy(gpus[i].name, "NVIDIA H200");
        for (int k = 0; k < (int)(sizeof keys / sizeof keys[0]); ++k) *value_of(&gpus[i], k) = keys[k].start;
    }
    char line[512], who[NAME], key[NAME];
    while (file && fgets(line, sizeof line, file)) {
        int at = 0;
        if (sscanf(line, "%63s %63s %n", who, key, &at) != 2) continue;
        if (strcmp(who, "gpus") == 0) gpu_count = atoi(key);
        else if (strcmp(who, "driver") == 0) driver_missing = strcmp(key, "missing") == 0;
        else
            for (int i = 0; i < MAX_GPUS; ++i)
                if (who[0] == '*' || atoi(who) == i) take(&gpus[i], key, line + at);
    }
    if (file) fclose(file);
}

static void refresh(void) { /* the lock is held */
    const char *path = getenv("FAKE_NVML");
    struct stat is = { 0 };
    if (!path) path = "";
    if (stat(path, &is) != 0) memset(&is, 0, sizeof is);
    if (gpu_count && strcmp(path, seen_path) == 0 && is.st_ino == seen.st_ino && is.st_size == seen.st_size
        && is.st_mtim.tv_sec == seen.st_mtim.tv_sec && is.st_mtim.tv_nsec == seen.st_mtim.tv_nsec) return;
    snprintf(seen_path, sizeof seen_path, "%s", path);
    seen = is;
    read_control(path);
}

/* What `function` does on this GPU before anything else: 0, or an error to return. `copy` gets the GPU's state. */
static int begin(Gpu *handle, const char *function, Gpu *copy) {
    double hang = 0;
    int error = SUCCESS;
    pthread_mutex_lock(&lock);
    refresh();
    if (!initialized) error = UNINITIALIZED;
    else if (handle < gpus || handle >= gpus + gpu_count) error = INVALID_ARGUMENT;
    else {
        *copy = *handle;
        for (int i = 0; i < copy->hang_count; ++i)
            if (strcmp(copy->hangs[i].function, function) == 0) hang = copy->hangs[i].number;
        for (int i = 0; i < copy->fail_count; ++i)
            if (strcmp(copy->fails[i].function, function) == 0) error = (int)copy->fails[i].number;
        if (copy->lost != 0) error = GPU_IS_LOST;
    }
    pthread_mutex_unlock(&lock);
    if (hang > 0) pause_s(hang);
    return error;
}
#define BEGIN(handle) \
    Gpu gpu; \
    int error_ = begin(handle, __func__, &gpu); \
    if (error_) return error_

/* ---- the library and its devices ----------------------------------------------------------------------------------- */
int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    refresh();
    int missing = driver_missing;
    if (!missing) ++initialized;
    pthread_mutex_unlock(&lock);
    return missing ? DRIVER_NOT_LOADED : SUCCESS;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    int error = initialized ? SUCCESS : UNINITIALIZED;
    if (initialized) --initialized;
    pthread_mutex_unlock(&lock);
    return error;
}
const char *nvmlErrorString(int error) {
    switch (error) {
        case SUCCESS: return "Success";
        case UNINITIALIZED: return "Uninitialized";
        case NOT_SUPPORTED: return "Not Supported";
        case 4: return "Insufficient Permissions";
        case DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case TIMEOUT: return "Timeout";
        case GPU_IS_LOST: return "GPU is lost";
        default: return "Unknown Error";
    }
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "570.00 (fake)"); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) {
    Gpu gpu;
    int error = begin(&gpus[0], __func__, &gpu);
    *count = (unsigned)gpu_count;
    return error == GPU_IS_LOST || error == INVALID_ARGUMENT ? SUCCESS : error;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **handle) {
    if (index >= MAX_GPUS) return INVALID_ARGUMENT;
    BEGIN(&gpus[index]);
    *handle = &gpus[index];
    return SUCCESS;
}
int nvmlDeviceGetUUID(Gpu *handle, char *text, unsigned size) {
    BEGIN(handle);
    snprintf(text, size, "GPU-00000000-0000-0000-0000-%012d", gpu.index);
    return SUCCESS;
}
int nvmlDeviceGetName(Gpu *handle, char *text, unsigned size) {
    BEGIN(handle);
    snprintf(text, size, "%s", gpu.name);
    return SUCCESS;
}

/* ---- figures --------------------------------------------------------------------------------------------------------- */
typedef struct { unsigned long long total, free, used; } MemoryInfo;
int nvmlDeviceGetMemoryInfo(Gpu *handle, MemoryInfo *memory) {
    BEGIN(handle);
    if (gpu.unified != 0) return NOT_SUPPORTED;
    memory->total = (unsigned long long)gpu.total;
    memory->used = (unsigned long long)gpu.used;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryInfoV2;
int nvmlDeviceGetMemoryInfo_v2(Gpu *handle, MemoryInfoV2 *memory) {
    BEGIN(handle);
    if (gpu.unified != 0 || gpu.old_memory_info != 0) return NOT_SUPPORTED;
    memory->total = (unsigned long long)gpu.total;
    memory->reserved = (unsigned long long)gpu.reserved;
    memory->used = (unsigned long long)gpu.used - memory->reserved;
    memory->free = memory->total - (unsigned long long)gpu.used;
    return SUCCESS;
}
typedef struct { unsigned gpu, memory; } Utilization;
int nvmlDeviceGetUtilizationRates(Gpu *handle, Utilization *rates) {
    BEGIN(handle);
    if (gpu.mig != 0) return NOT_SUPPORTED;
    rates->gpu = (unsigned)gpu.util;
    rates->memory = (unsigned)gpu.dram_activity;
    return SUCCESS;
}
#define UNSIGNED(function, expression) \
    int function(Gpu *handle, unsigned *value) { BEGIN(handle); *value = (unsigned)(expression); return SUCCESS; }
#define UNSIGNED_OF(function, expression) \
    int function(Gpu *handle, unsigned which, unsigned *value) { \
        BEGIN(handle); (void)which; *value = (unsigned)(expression); return SUCCESS; }
UNSIGNED(nvmlDeviceGetPowerUsage, gpu.power * 1000)
UNSIGNED(nvmlDeviceGetEnforcedPowerLimit, gpu.power_limit * 1000)
UNSIGNED(nvmlDeviceGetCurrPcieLinkGeneration, gpu.pcie_gen)
UNSIGNED(nvmlDeviceGetMaxPcieLinkGeneration, gpu.max_pcie_gen)
UNSIGNED(nvmlDeviceGetCurrPcieLinkWidth, gpu.pcie_width)
UNSIGNED(nvmlDeviceGetMaxPcieLinkWidth, gpu.max_pcie_width)
UNSIGNED_OF(nvmlDeviceGetTemperature, gpu.temperature)
UNSIGNED_OF(nvmlDeviceGetTemperatureThreshold, gpu.slowdown)
UNSIGNED_OF(nvmlDeviceGetClockInfo, which == 2 ? gpu.memory_clock : gpu.sm_clock)
UNSIGNED_OF(nvmlDeviceGetMaxClockInfo, which == 2 ? gpu.max_memory_clock : gpu.max_sm_clock)

int nvmlDeviceGetCurrentClocksEventReasons(Gpu *handle, unsigned long long *mask) {
    BEGIN(handle);
    *mask = (unsigned long long)gpu.reasons;
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(Gpu *handle, unsigned long long *millijoules) {
    BEGIN(handle);
    *millijoules = (unsigned long long)(1000 * (gpu.energy + gpu.power * now_s()));
    return SUCCESS;
}
int nvmlDeviceGetTotalEccErrors(Gpu *handle, unsigned type, unsigned counter, unsigned long long *count) {
    BEGIN(handle);
    (void)counter;
    *count = (unsigned long long)(type == 1 ? gpu.ecc_uncorrected : gpu.ecc_corrected);
    return SUCCESS;
}
int nvmlDeviceGetRemappedRows(Gpu *handle, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failed) {
    BEGIN(handle);
    *corrected = 0;
    *uncorrected = (unsigned)gpu.remapped;
    *pending = gpu.remap_pending != 0;
    *failed = gpu.remap_failed != 0;
    return SUCCESS;
}
int nvmlDeviceGetMigMode(Gpu *handle, unsigned *current, unsigned *pending) {
    BEGIN(handle);
    *current = *pending = gpu.mig != 0;
    return SUCCESS;
}

typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency;
    int type, error;
    union { double d; unsigned ui; unsigned long long ull; } value;
} FieldValue;
int nvmlDeviceGetFieldValues(Gpu *handle, int count, FieldValue *values) {
    BEGIN(handle);
    for (int i = 0; i < count; ++i) {
        struct timespec wall;
        clock_gettime(CLOCK_REALTIME, &wall);
        values[i].timestamp = (int64_t)wall.tv_sec * 1000000 + wall.tv_nsec / 1000;
        values[i].error = SUCCESS;
        values[i].type = 3;
        double now = now_s(), total = 0;
        int pcie = 0;
        switch (values[i].field) {
            case 138: total = (gpu.nvlink_tx + gpu.nvlink_tx_rate * now) / 1024; break;
            case 139: total = (gpu.nvlink_rx + gpu.nvlink_rx_rate * now) / 1024; break;
            case 197: total = gpu.pcie_tx + gpu.pcie_tx_rate * now; pcie = 1; break;
            case 198: total = gpu.pcie_rx + gpu.pcie_rx_rate * now; pcie = 1; break;
            default: values[i].error = NOT_SUPPORTED;
        }
        if (!pcie && gpu.nvlinks == 0) values[i].error = NOT_SUPPORTED;
        values[i].value.ull = (unsigned long long)total;
        if (pcie && gpu.pcie_bits == 32) {
            values[i].type = 1;
            values[i].value.ull &= 0xffffffffull;
        }
    }
    return SUCCESS;
}

/* ---- topology -------------------------------------------------------------------------------------------------------- */
int nvmlDeviceGetTopologyCommonAncestor(Gpu *handle, Gpu *other, unsigned *level) {
    BEGIN(handle);
    if (other < gpus || other >= gpus + gpu_count) return INVALID_ARGUMENT;
    *level = gpu.index / 4 == other->index / 4 ? 40 : 50; /* four GPUs to each NUMA node */
    return SUCCESS;
}
int nvmlDeviceGetNvLinkState(Gpu *handle, unsigned link, unsigned *active) {
    BEGIN(handle);
    if (link >= (unsigned)gpu.nvlinks) return gpu.nvlinks == 0 ? NOT_SUPPORTED : INVALID_ARGUMENT;
    *active = 1;
    return SUCCESS;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(Gpu *handle, unsigned link, unsigned *type) {
    BEGIN(handle);
    (void)link;
    *type = gpu.nvswitch != 0 ? 2 : 0;
    return SUCCESS;
}
typedef struct {
    char legacy_id[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char id[32];
} PciInfo;
static void write_pci(int index, PciInfo *pci) {
    memset(pci, 0, sizeof *pci);
    pci->bus = (unsigned)index + 1;
    snprintf(pci->id, sizeof pci->id, "00000000:%02X:00.0", index + 1);
}
int nvmlDeviceGetPciInfo_v3(Gpu *handle, PciInfo *pci) { BEGIN(handle); write_pci(gpu.index, pci); return SUCCESS; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(Gpu *handle, unsigned link, PciInfo *pci) {
    BEGIN(handle);
    (void)link;
    write_pci(gpu.index ^ 1, pci); /* without a switch: bridges between pairs */
    return SUCCESS;
}

/* ---- GPM ------------------------------------------------------------------------------------------------------------- */
typedef struct { Gpu gpu; double at; } Sample;
typedef struct { unsigned version, supported; } GpmSupport;
typedef struct { unsigned id; int error; double value; const char *names[3]; } Metric;
typedef struct { unsigned version, count; Sample *before, *after; Metric metrics[1]; } MetricsGet;
int nvmlGpmQueryDeviceSupport(Gpu *handle, GpmSupport *support) {
    BEGIN(handle);
    support->supported = gpu.gpm != 0 && gpu.mig == 0;
    return SUCCESS;
}
int nvmlGpmSampleAlloc(Sample **sample) { *sample = calloc(1, sizeof **sample); return SUCCESS; }
int nvmlGpmSampleFree(Sample *sample) { free(sample); return SUCCESS; }
int nvmlGpmSampleGet(Gpu *handle, Sample *sample) {
    BEGIN(handle);
    sample->gpu = gpu;
    sample->at = now_s();
    return SUCCESS;
}
int nvmlGpmMetricsGet(MetricsGet *get) {
    if (get->after->at <= get->before->at) return INVALID_ARGUMENT;
    for (unsigned i = 0; i < get->count; ++i) {
        Metric *metric = &get->metrics[i];
        const Gpu *gpu = &get->after->gpu;
        metric->error = SUCCESS;
        switch (metric->id) {
            case 2: metric->value = gpu->sm_activity; break;
            case 5: metric->value = gpu->tensor_activity; break;
            case 10: metric->value = gpu->dram_activity; break;
            case 20: metric->value = gpu->pcie_tx_rate / 1048576; break;
            case 21: metric->value = gpu->pcie_rx_rate / 1048576; break;
            case 60: metric->value = gpu->nvlink_rx_rate / 1048576; break;
            case 61: metric->value = gpu->nvlink_tx_rate / 1048576; break;
            default: metric->error = NOT_SUPPORTED;
        }
    }
    return SUCCESS;
}

/* ---- events ---------------------------------------------------------------------------------------------------------- */
typedef struct { char registered[MAX_GPUS]; unsigned long long delivered[MAX_GPUS]; } EventSet;
typedef struct { Gpu *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } EventData;
int nvmlEventSetCreate(EventSet **set) { *set = calloc(1, sizeof **set); return SUCCESS; }
int nvmlEventSetFree(EventSet *set) { free(set); return SUCCESS; }
int nvmlDeviceRegisterEvents(Gpu *handle, unsigned long long types, EventSet *set) {
    BEGIN(handle);
    (void)types;
    set->registered[gpu.index] = 1;
    return SUCCESS;
}
int nvmlEventSetWait_v2(EventSet *set, EventData *data, unsigned timeout_ms) {
    double end = now_s() + timeout_ms / 1000.0;
    for (;;) {
        pthread_mutex_lock(&lock);
        refresh();
        for (int i = 0; i < gpu_count; ++i) {
            for (int k = 0; set->registered[i] && k < gpus[i].xid_count; ++k) {
                if (gpus[i].xids[k].serial <= set->delivered[i]) continue;
                set->delivered[i] = gpus[i].xids[k].serial;
                memset(data, 0, sizeof *data);
                data->device = &gpus[i];
                data->type = 8;
                data->data = gpus[i].xids[k].number;
                pthread_mutex_unlock(&lock);
                return SUCCESS;
            }
        }
        pthread_mutex_unlock(&lock);
        if (now_s() >= end) return TIMEOUT;
        pause_s(0.005);
    }
}
