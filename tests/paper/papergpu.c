/* A GPU on paper: the CUDA runtime and driver, NVML, cuBLAS and NCCL as torch calls them, loaded by LD_PRELOAD.

   Device memory is host memory. Copies and collectives move real bytes, at once and in the caller's thread. Kernels do
   nothing, so what they would compute is arbitrary. Python reads `paper_counts` and `paper_kernels` by ctypes.

   CUDA_VISIBLE_DEVICES   its entries are the devices; without it there are PAPER_GPUS (1)
   PAPER_MEMORY_MB        memory of each device (143771)
   PAPER_MAJOR            major compute capability (9)
   PAPER_ALONE            one process stands for all ranks: the others have what it has */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda_runtime_api.h>

typedef cudaError_t Error;
typedef cudaStream_t Stream;

/* What is counted; tests/paper/paper.py names them in this order. */
enum { LAUNCHES, COPIES, MEMSETS, COLLECTIVES, WAITS, HOST_TO_DEVICE, DEVICE_TO_HOST, KINDS };
long paper_counts[KINDS];
static void count(int kind) { __atomic_add_fetch(&paper_counts[kind], 1, __ATOMIC_RELAXED); }

static long setting(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value ? atol(value) : otherwise;
}

/* Functions that succeed and do nothing. The label gives a function its name without C's checks of its prototype. */
#define NOTHING(name) long paper_##name(void) __asm__(#name); long paper_##name(void) { return 0; }

/* ---- kernels ---- */
#define TABLE 65536
struct kernel { const void *function; const char *name; long launches; } paper_kernels[TABLE];
static pthread_mutex_t registering = PTHREAD_MUTEX_INITIALIZER;

static struct kernel *kernel_of(const void *function) {
  unsigned long i = ((unsigned long)function * 0x9E3779B97F4A7C15UL) >> 48;
  while (paper_kernels[i].function && paper_kernels[i].function != function) i = (i + 1) % TABLE;
  return &paper_kernels[i];
}

void __cudaRegisterFunction(void **module, const char *function, char *d, const char *name) {
  static long registered;
  pthread_mutex_lock(&registering);
  struct kernel *kernel = kernel_of(function);
  if (!kernel->function && registered < TABLE - 1000) *kernel = (struct kernel){function, name, 0}, registered++;
  pthread_mutex_unlock(&registering);
}
void **__cudaRegisterFatBinary(void *binary) { static void *module[4]; return module; }
NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaUnregisterFatBinary) NOTHING(__cudaRegisterVar)

static __thread struct { dim3 grid, block; size_t shared; void *stream; } call;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  call.grid = grid, call.block = block, call.shared = shared, call.stream = stream;
  return 0;
}
Error __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = call.grid, *block = call.block, *shared = call.shared, *(void **)stream = call.stream;
  return cudaSuccess;
}
static Error launch(const void *function, dim3 grid, dim3 block) {
  count(LAUNCHES);
  struct kernel *kernel = kernel_of(function);
  if (kernel->function) __atomic_add_fetch(&kernel->launches, 1, __ATOMIC_RELAXED);
  int wrong = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z || grid.y > 65535 || grid.z > 65535;
  return wrong || (long)block.x * block.y * block.z > 1024 ? cudaErrorInvalidConfiguration : cudaSuccess;
}
Error __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }
Error __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t s, Stream st) { return launch(k, g, b); }
Error cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, Stream st) { return launch(f, g, b); }
Error cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launch(f, c->gridDim, c->blockDim); }
Error cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *function) {
  *of = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 90, .ptxVersion = 90};
  return cudaSuccess;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t s, unsigned flags) {
  *n = block > 0 && block < 2048 ? 2048 / block : 1;
  return cudaSuccess;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block, size_t s) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, block, s, 0);
}
NOTHING(cudaFuncSetAttribute)

/* ---- devices ---- */
static __thread int device;
Error cudaGetDeviceCount(int *n) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *n = visible ? *visible != 0 : setting("PAPER_GPUS", 1);
  for (; visible && *visible; visible++) *n += *visible == ',';
  return *n ? cudaSuccess : cudaErrorNoDevice;
}
Error cudaGetDevice(int *d) { *d = device; return cudaSuccess; }
Error cudaSetDevice(int d) {
  int n;
  cudaGetDeviceCount(&n);
  if (d < 0 || d >= n) return cudaErrorInvalidDevice;
  device = d;
  return cudaSuccess;
}
Error cudaGetDeviceProperties(struct cudaDeviceProp *of, int d) {
  *of = (struct cudaDeviceProp){
      .totalGlobalMem = setting("PAPER_MEMORY_MB", 143771) << 20, .sharedMemPerBlock = 49152, .regsPerBlock = 65536,
      .warpSize = 32, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64},
      .maxGridSize = {2147483647, 65535, 65535}, .major = setting("PAPER_MAJOR", 9), .multiProcessorCount = 132,
      .maxThreadsPerMultiProcessor = 2048, .sharedMemPerMultiprocessor = 233472, .regsPerMultiprocessor = 65536,
      .sharedMemPerBlockOptin = 232448, .l2CacheSize = 60 << 20, .maxBlocksPerMultiProcessor = 32, .pciBusID = d + 1};
  strcpy(of->name, "Paper GPU");
  return cudaSuccess;
}
Error cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int d) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *value = setting("PAPER_MAJOR", 9); break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
Error cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
Error cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
Error cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0, *high = -5; return cudaSuccess; }
Error cudaDeviceGetPCIBusId(char *id, int n, int d) { snprintf(id, n, "0000:%02x:00.0", d + 1); return cudaSuccess; }
Error cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return cudaSuccess; }
NOTHING(cudaDeviceEnablePeerAccess) NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError)
NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop)

/* ---- memory: a copy between pageable host memory and the device makes the host wait, as torch then synchronises ---- */
static long used;
Error cudaMalloc(void **p, size_t n) {
  if (used + (long)n > setting("PAPER_MEMORY_MB", 143771) << 20) return cudaErrorMemoryAllocation;
  *p = aligned_alloc(4096, (n + 4095) & ~4095UL);
  memset(*p, 0, n);
  __atomic_add_fetch(&used, malloc_usable_size(*p), __ATOMIC_RELAXED);
  return cudaSuccess;
}
Error cudaFree(void *p) {
  if (p) __atomic_sub_fetch(&used, malloc_usable_size(p), __ATOMIC_RELAXED);
  free(p);
  return cudaSuccess;
}
Error cudaMemGetInfo(size_t *available, size_t *total) {
  *total = setting("PAPER_MEMORY_MB", 143771) << 20, *available = *total - used;
  return cudaSuccess;
}
static struct { char *from, *to; } pinned[4096];
static int pins;
Error cudaHostAlloc(void **p, size_t n, unsigned flags) {
  *p = aligned_alloc(4096, (n + 4095) & ~4095UL);
  int i = __atomic_fetch_add(&pins, 1, __ATOMIC_RELAXED);
  if (i < 4096) pinned[i].from = *p, pinned[i].to = (char *)*p + n;
  return cudaSuccess;
}
Error cudaMallocHost(void **p, size_t n) { return cudaHostAlloc(p, n, 0); }
NOTHING(cudaFreeHost) NOTHING(cudaHostRegister) NOTHING(cudaHostUnregister)
Error cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *p) {
  *of = (struct cudaPointerAttributes){.type = cudaMemoryTypeDevice, .device = device, .devicePointer = (void *)p};
  for (int i = 0; i < pins && i < 4096; i++)
    if ((char *)p >= pinned[i].from && (char *)p < pinned[i].to) of->type = cudaMemoryTypeHost;
  return cudaSuccess;
}
Error cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, Stream stream) {
  count(COPIES);
  if (kind == cudaMemcpyHostToDevice) count(HOST_TO_DEVICE);
  if (kind == cudaMemcpyDeviceToHost) count(DEVICE_TO_HOST);
  memmove(to, from, n);
  return cudaSuccess;
}
Error cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
  count(WAITS);
  return cudaMemcpyAsync(to, from, n, kind, 0);
}
Error cudaMemsetAsync(void *p, int value, size_t n, Stream stream) {
  count(MEMSETS);
  memset(p, value, n);
  return cudaSuccess;
}
Error cudaMemset(void *p, int value, size_t n) { return cudaMemsetAsync(p, value, n, 0); }
Error cudaGetSymbolAddress(void **p, const void *symbol) { static char zeros[1 << 16]; *p = zeros; return cudaSuccess; }

/* ---- streams and events ---- */
static void *next_handle(void) {
  static long last = 0x1000;
  return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}
Error cudaStreamCreateWithPriority(Stream *s, unsigned flags, int priority) { *s = next_handle(); return cudaSuccess; }
Error cudaStreamCreateWithFlags(Stream *s, unsigned flags) { *s = next_handle(); return cudaSuccess; }
Error cudaStreamCreate(Stream *s) { *s = next_handle(); return cudaSuccess; }
Error cudaStreamIsCapturing(Stream s, enum cudaStreamCaptureStatus *is) { *is = 0; return cudaSuccess; }
Error cudaStreamGetCaptureInfo(Stream s, enum cudaStreamCaptureStatus *is, unsigned long long *id, cudaGraph_t *graph,
                               const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *n) {
  *is = 0;
  if (id) *id = 0;
  if (n) *n = 0;
  return cudaSuccess;
}
Error cudaEventCreate(cudaEvent_t *e) { *e = next_handle(); return cudaSuccess; }
Error cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = next_handle(); return cudaSuccess; }
Error cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return cudaSuccess; }
Error cudaDeviceSynchronize(void) { count(WAITS); return cudaSuccess; }
Error cudaStreamSynchronize(Stream s) { count(WAITS); return cudaSuccess; }
/* In another thread than the process's first it is that of the checkpoints, which keeps no step waiting. */
Error cudaEventSynchronize(cudaEvent_t e) { if (gettid() == getpid()) count(WAITS); return cudaSuccess; }
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamQuery) NOTHING(cudaStreamWaitEvent) NOTHING(cudaEventDestroy)
NOTHING(cudaEventRecord) NOTHING(cudaEventRecordWithFlags) NOTHING(cudaEventQuery)
NOTHING(cudaThreadExchangeStreamCaptureMode)

/* ---- the driver, whose functions torch looks up by name, and NVML, by which Ray counts GPUs ---- */
static long nothing(void) { return 0; }
Error cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                       enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
int cuCtxGetCurrent(void **context) { static int one; *context = &one; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "paper"; return 0; }
int cuMemGetAddressRange_v2(void **base, size_t *n, void *p) { *base = p, *n = 1; return 0; }
int cuPointerGetAttribute(int *value, int which, void *p) { *value = 0; return 0; }
NOTHING(cuInit)
int nvmlDeviceGetCount_v2(unsigned *n) { *n = setting("PAPER_GPUS", 1); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **handle) { *handle = (void *)(long)(i + 1); return 0; }
int nvmlDeviceGetName(void *handle, char *name, unsigned n) { snprintf(name, n, "Paper GPU"); return 0; }
NOTHING(nvmlInit_v2) NOTHING(nvmlInitWithFlags) NOTHING(nvmlShutdown)

/* ---- cuBLAS and cuSOLVER ---- */
int cublasCreate_v2(void **handle) { *handle = malloc(64); return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n, void *r, int *found) {
  *found = 1;
  return 0;
}
#define PRODUCT(name) long paper_##name(void) __asm__(#name); long paper_##name(void) { count(LAUNCHES); return 0; }
PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx) PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemmStridedBatched) PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2) PRODUCT(cublasSdot_v2) PRODUCT(cublasDdot_v2) PRODUCT(cublasDotEx) PRODUCT(cublasLtMatmul)
PRODUCT(cublasDtrsm_v2) PRODUCT(cublasDtrsmBatched) PRODUCT(cusolverDnDpotrf) PRODUCT(cusolverDnXpotrf)
int cusolverDnCreate(void **handle) { *handle = malloc(64); return 0; }
int cusolverDnCreateParams(void **params) { *params = malloc(64); return 0; }
int cusolverDnDpotrf_bufferSize(void *h, int uplo, int n, void *a, int lda, int *size) { *size = 1; return 0; }
int cusolverDnXpotrf_bufferSize(void *h, void *params, int uplo, long n, int type, void *a, long lda, int compute,
                                size_t *on_device, size_t *on_host) {
  *on_device = *on_host = 1;
  return 0;
}
NOTHING(cusolverDnDestroy) NOTHING(cusolverDnSetStream) NOTHING(cusolverDnDestroyParams)
NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasSetSmCountTarget)

/* ---- NCCL: the ranks are processes of this machine, which exchange chunks of their bytes through a shared file ---- */
#define CHUNK (1L << 20)
#define MOST_RANKS 64
enum { SUM, PRODUCT_, MAX, MIN };
typedef struct { char bytes[128]; } Id;
struct shared { volatile long arrived; char chunks[MOST_RANKS][CHUNK]; };
typedef struct { int ranks, rank; long meetings; struct shared *shared; } Group;

int ncclGetVersion(int *v) { *v = 23007; return 0; }
int ncclGetUniqueId(Id *id) {
  static int made;
  memset(id, 0, sizeof *id);
  sprintf(id->bytes, "/dev/shm/papergpu-%d-%d", getpid(), made++);
  int file = open(id->bytes, O_RDWR | O_CREAT, 0600); /* sparse: only the bytes that are used take memory */
  ftruncate(file, sizeof(struct shared));
  return close(file);
}
static void meet(Group *g) {
  long all = ++g->meetings * g->ranks;
  __atomic_add_fetch(&g->shared->arrived, 1, __ATOMIC_SEQ_CST);
  while (g->shared->arrived < all) usleep(50);
}
int ncclCommInitRankConfig(Group **of, int ranks, Id id, int rank, void *config) {
  Group *g = *of = calloc(1, sizeof *g);
  g->ranks = ranks, g->rank = rank;
  if (ranks == 1 || getenv("PAPER_ALONE")) return 0;
  int file = open(id.bytes, O_RDWR);
  g->shared = mmap(0, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  meet(g);
  unlink(id.bytes);
  return 0;
}
int ncclCommInitRank(Group **of, int ranks, Id id, int rank) { return ncclCommInitRankConfig(of, ranks, id, rank, 0); }
int ncclCommCount(Group *g, int *n) { *n = g->ranks; return 0; }
int ncclCommUserRank(Group *g, int *rank) { *rank = g->rank; return 0; }
int ncclCommGetAsyncError(Group *g, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int e) { return "paper"; }
const char *ncclGetLastError(void *g) { return ""; }
int ncclCommWindowRegister(void *g, void *p, size_t n, void **window, int flags) { *window = p; return 0; }
int ncclCommRegister(void *g, void *p, size_t n, void **handle) { *handle = p; return 0; }
int ncclMemAlloc(void **p, size_t n) { return cudaMalloc(p, n); }
int ncclMemFree(void *p) { return cudaFree(p); }
NOTHING(ncclCommDestroy) NOTHING(ncclCommAbort) NOTHING(ncclCommFinalize) NOTHING(ncclCommDeregister)
NOTHING(ncclCommWindowDeregister) NOTHING(ncclCommMemStats)

/* An all-gather into a list is a group of broadcasts, one of each rank; that of rank 0 comes first. */
static __thread int depth;
static __thread const void *own;
int ncclGroupStart(void) { if (!depth++) own = 0; return 0; }
int ncclGroupEnd(void) { depth--; return 0; }

static size_t size_of(int type) { /* ncclDataType_t */
  static const char sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return sizes[type];
}
#define FOLD(T) for (long i = 0; i < n; i++) { T *a = (T *)into + i, b = ((T *)from)[i]; \
    *a = op == SUM ? *a + b : op == MAX ? (b > *a ? b : *a) : (b < *a ? b : *a); } break
static void fold(void *into, const void *from, long n, int type, int op) {
  switch (type) { /* others, as float16, keep the first rank's bytes */
    case 0: FOLD(signed char);
    case 1: FOLD(unsigned char);
    case 2: FOLD(int);
    case 4: FOLD(long);
    case 7: FOLD(float);
    case 8: FOLD(double);
  }
}
/* Each rank offers `n` bytes; `took` is called for each chunk of each rank, in the order of the ranks. */
#define EXCHANGE(g, from, n, took)                                                       \
  for (long at = 0; at < (long)(n); at += CHUNK) {                                       \
    long some = (long)(n) - at < CHUNK ? (long)(n) - at : CHUNK;                         \
    memcpy(g->shared->chunks[g->rank], (const char *)(from) + at, some);                 \
    meet(g);                                                                             \
    for (int r = 0; r < g->ranks; r++) { char *chunk = g->shared->chunks[r]; took; }     \
    meet(g);                                                                             \
  }
int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, Group *g, Stream s) {
  count(COLLECTIVES);
  size_t size = size_of(type);
  if (!g->shared) return memmove(to, from, n * size), 0;
  EXCHANGE(g, from, n * size,
           r ? fold((char *)to + at, chunk, some / size, type, op) : (void)memcpy((char *)to + at, chunk, some))
  return 0;
}
int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, Group *g, Stream s) {
  count(COLLECTIVES);
  n *= size_of(type);
  if (root == g->rank) own = from;
  if (!g->shared) return memmove(to, depth && own ? own : from, n), 0;
  EXCHANGE(g, from, n, if (r == root) memcpy((char *)to + at, chunk, some))
  return 0;
}
int ncclBcast(void *p, size_t n, int type, int root, Group *g, Stream s) { return ncclBroadcast(p, p, n, type, root, g, s); }
int ncclAllGather(const void *from, void *to, size_t n, int type, Group *g, Stream s) {
  count(COLLECTIVES);
  n *= size_of(type);
  for (int r = 0; !g->shared && r < g->ranks; r++) memmove((char *)to + r * n, from, n);
  if (g->shared) EXCHANGE(g, from, n, memcpy((char *)to + r * n + at, chunk, some))
  return 0;
}
