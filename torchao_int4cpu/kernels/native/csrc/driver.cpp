// The C interface: what this CPU and system offer, how a product is cut into tasks, who runs them.
//
// Compiled for plain x86-64. Threads come from the OpenMP runtime that PyTorch has loaded: its entry
// point is handed over at run time, so no second runtime and no second pool of threads exists.
#include <cpuid.h>
#include <emmintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

#include "int4cpu.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using int4cpu::Kernel;
using int4cpu::Problem;
using int4cpu::Task;

enum Error : int64_t { kUnknownKernel = -1, kNoMemory = -2, kBadArguments = -3, kFreed = -4 };

// In the order of ``KERNELS`` and ``TRANSPOSED_KERNELS`` in library.py.
enum KernelIndex : int32_t {
  kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxMany,
  kInt16Avx2, kInt16AvxVnni, kInt16Avx512, kInt16Avx512Vnni, kInt16Vbmi,
  kInt8Amx,
  kDynamicAvxVnni, kDynamicAvx512Vnni, kDynamicAmx,
  kTransposedAvx2, kTransposedAvxVnni, kTransposedAvx512, kTransposedAvx512Vnni, kTransposedAvx512Bf16,
  kTransposedAmx,
  kKernelCount,
};
const Kernel* const kKernels[kKernelCount] = {
    &int4cpu::kAvx2,           &int4cpu::kAvx512,
    &int4cpu::kAvx512Bf16,     &int4cpu::kAmx,
    &int4cpu::kAmxMany,        &int4cpu::kInt16Avx2,
    &int4cpu::kInt16AvxVnni,   &int4cpu::kInt16Avx512,
    &int4cpu::kInt16Avx512Vnni, &int4cpu::kInt16Vbmi,
    &int4cpu::kInt8Amx,        &int4cpu::kDynamicAvxVnni,
    &int4cpu::kDynamicAvx512Vnni, &int4cpu::kDynamicAmx,
    &int4cpu::kTransposedAvx2, &int4cpu::kTransposedAvxVnni,
    &int4cpu::kTransposedAvx512, &int4cpu::kTransposedAvx512Vnni,
    &int4cpu::kTransposedAvx512Bf16, &int4cpu::kTransposedAmx,
};

#ifdef INT4CPU_EMULATE_AMX
constexpr bool kEmulateTiles = true;  // see amx.cpp
#else
constexpr bool kEmulateTiles = false;
#endif

// --- what the CPU and the system offer ----------------------------------------------------------

uint64_t enabled_states() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the state of the tiles on request only, for the whole process.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return kEmulateTiles || syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

uint32_t find_kernels() {
  uint32_t a, b, c, d, leaf7_b, leaf7_c, leaf7_d, leaf7_1a = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool saves_states = c & bit_OSXSAVE;
  const bool fma = c & bit_FMA, f16c = c & bit_F16C;
  uint32_t most;
  if (!saves_states || !__get_cpuid_count(7, 0, &most, &leaf7_b, &leaf7_c, &leaf7_d)) return 0;
  if (most >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf7_1a = a;
  const uint64_t states = enabled_states();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;
  constexpr uint32_t kAvx512Words = (1U << 16) | (1U << 30) | (1U << 31);  // F, BW, VL
  constexpr uint32_t kVbmi = 1U << 1, kVbmi2 = 1U << 6, kVnni = 1U << 11;  // of leaf7_c
  constexpr uint32_t kAvxVnni = 1U << 4, kBf16 = 1U << 5;  // of leaf7_1a
  constexpr uint32_t kTileBf16 = (1U << 22) | (1U << 24), kTileBytes = 1U << 25;  // of leaf7_d

  const bool avx2 = (states & kYmm) == kYmm && (leaf7_b & bit_AVX2) && fma && f16c;
  const bool avx512 =
      avx2 && (states & kZmm) == kZmm && (leaf7_b & kAvx512Words) == kAvx512Words;
  const bool bf16 = avx512 && (leaf7_c & kVbmi) && (leaf7_1a & kBf16);
  const bool tiles = bf16 && ((leaf7_d & kTileBf16) == kTileBf16 || kEmulateTiles);
  const bool usable = tiles && ((states & kTiles) == kTiles || kEmulateTiles) && may_use_tiles();
  const bool vnni = avx512 && (leaf7_c & kVnni), avx_vnni = avx2 && (leaf7_1a & kAvxVnni);
  const bool bytes = usable && vnni && (leaf7_c & kVbmi2) && ((leaf7_d & kTileBytes) || kEmulateTiles);
  return avx2 << kAvx2 | avx512 << kAvx512 | bf16 << kAvx512Bf16 | usable << kAmx | usable << kAmxMany |
         avx2 << kInt16Avx2 | avx_vnni << kInt16AvxVnni |
         avx512 << kInt16Avx512 | vnni << kInt16Avx512Vnni |
         (vnni && (leaf7_c & kVbmi)) << kInt16Vbmi | bytes << kInt8Amx |
         avx_vnni << kDynamicAvxVnni | vnni << kDynamicAvx512Vnni |
         bytes << kDynamicAmx | avx2 << kTransposedAvx2 | avx_vnni << kTransposedAvxVnni |
         avx512 << kTransposedAvx512 | vnni << kTransposedAvx512Vnni | bf16 << kTransposedAvx512Bf16 |
         usable << kTransposedAmx;
}

// --- threads ------------------------------------------------------------------------------------

// `GOMP_parallel`, which the runtimes of GCC, Clang and Intel all have.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using InParallel = int (*)();

Parallel parallel = nullptr;
InParallel in_parallel = nullptr;
// A child of fork() has none of the threads its parent's runtime waits for.
bool forked = false;

void mark_forked() { forked = true; }

int32_t usable_threads(int32_t wanted) {
  if (parallel == nullptr || forked || in_parallel()) return 1;
  return wanted;
}

constexpr int32_t kMaxThreads = 256;

// What is left of one thread's share, alone in its cache line.
struct alignas(64) Share {
  int64_t next, end;
};

// Runs `work(context, i, thread)` for i below `count`: each thread its own consecutive share, which finds
// small weights where the last call left them, and then what others have not begun.
struct Loop {
  void (*work)(void*, int64_t, int32_t);
  void* context;
  int32_t threads;
  int32_t arrived;
  Share shares[kMaxThreads];
};

void run_shares(void* opaque) {
  Loop& loop = *static_cast<Loop*>(opaque);
  const int32_t me = __atomic_fetch_add(&loop.arrived, 1, __ATOMIC_RELAXED);
  for (int32_t t = 0; t < loop.threads; ++t) {
    Share& share = loop.shares[(me + t) % loop.threads];
    for (;;) {
      const int64_t i = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
      if (i >= share.end) break;
      loop.work(loop.context, i, me);
    }
  }
}

void for_each(int64_t count, int32_t threads, void (*work)(void*, int64_t, int32_t), void* context) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(context, i, 0);
    return;
  }
  Loop loop;
  loop.work = work;
  loop.context = context;
  loop.threads = threads < kMaxThreads ? threads : kMaxThreads;
  loop.arrived = 0;
  for (int32_t t = 0; t < loop.threads; ++t) {
    loop.shares[t].next = count * t / loop.threads;
    loop.shares[t].end = count * (t + 1) / loop.threads;
  }
  parallel(run_shares, &loop, static_cast<unsigned>(loop.threads), 0);
}

// --- tasks --------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N is padded to a multiple of 16, K to whole groups.
void cut_weight(const Kernel& kernel, int64_t n, int64_t k, int32_t group_size, Problem& p) {
  p.group_size = group_size;
  p.padded_n = divide_up(n, 16) * 16;
  p.padded_k = divide_up(k, group_size) * group_size;
  const int32_t part_of_group = group_size < kernel.max_step ? group_size : kernel.max_step;
  if (kernel.transposed) {
    p.x_columns = n;
    p.y_columns = k;
    p.block_columns = part_of_group;
    p.blocks = p.padded_k / part_of_group;
    p.step = kernel.block_rows;
    p.steps = divide_up(p.padded_n, p.step);
  } else {
    p.x_columns = k;
    p.y_columns = n;
    p.block_columns = kernel.block_rows;
    p.blocks = divide_up(p.padded_n, p.block_columns);
    p.step = part_of_group;
    p.steps = p.padded_k / p.step;
  }
  p.chunk_steps = kernel.chunk_columns / p.step;
}

struct Plan {
  int64_t task_rows, row_tasks, task_blocks, block_tasks, parts;
};

// Enough tasks for every thread to have several. Rows are cut first, because that costs only another
// expansion of the block; then K, which costs a sum of the parts.
Plan plan(const Kernel& kernel, const Problem& p, int32_t threads) {
  Plan plan;
  plan.task_rows = kernel.task_rows;
  plan.task_blocks = kernel.task_blocks;
  const int64_t wanted = threads > 1 ? 4 * threads : 1;
  const int64_t least_rows = 4 * kernel.tile_rows;
  const auto tasks = [&] { return divide_up(p.m, plan.task_rows) * divide_up(p.blocks, plan.task_blocks); };
  // Blocks of a task share its rows of x, which cost more than the expansions that rows share.
  while (plan.task_blocks > 1 && tasks() < threads) plan.task_blocks /= 2;
  while (plan.task_rows > least_rows &&
         (plan.task_rows >= 2 * p.m || tasks() < wanted)) {
    plan.task_rows = divide_up(plan.task_rows / 2, kernel.tile_rows) * kernel.tile_rows;
  }
  plan.row_tasks = divide_up(p.m, plan.task_rows);
  plan.task_rows = divide_up(divide_up(p.m, plan.row_tasks), kernel.tile_rows) * kernel.tile_rows;
  plan.row_tasks = divide_up(p.m, plan.task_rows);
  plan.block_tasks = divide_up(p.blocks, plan.task_blocks);
  plan.parts = 1;
  if (kernel.run != nullptr) return plan;
  // A part reads at least 16 KiB of the weight.
  const int64_t least_steps = divide_up(INT64_C(32768), p.block_columns * p.step);
  int64_t parts = divide_up(wanted, plan.row_tasks * plan.block_tasks);
  const int64_t most = p.chunk_steps > 0 ? divide_up(p.steps, p.chunk_steps) : p.steps / least_steps;
  if (parts > most || (parts > 1 && p.chunk_steps > 0)) parts = most;
  plan.parts = parts < 1 ? 1 : parts;
  return plan;
}

// A task of some rows and a block, over its part of K.
Task task_at(const Problem& p, const Plan& plan, int64_t i) {
  const int64_t part = i % plan.parts;
  const int64_t whole = i / plan.parts;
  const int64_t row = whole % plan.row_tasks * plan.task_rows;
  const int64_t row_end = row + plan.task_rows < p.m ? row + plan.task_rows : p.m;
  const int64_t block = whole / plan.row_tasks;
  if (p.chunk_steps == 0) {
    return {row, row_end, block, p.steps * part / plan.parts, p.steps * (part + 1) / plan.parts, block + 1};
  }
  const int64_t step = part * p.chunk_steps;
  return {row, row_end, block, step, part == plan.parts - 1 ? p.steps : step + p.chunk_steps, block + 1};
}

struct Product {
  const Kernel* kernel;
  const Problem* problem;
  Plan plan;
  float* partial;     // [tasks of rows and blocks, parts, task_rows, block_columns]
  int32_t* finished;  // parts of each
  char* scratch;      // [threads] of `Kernel::scratch_bytes`
};

// Rows that a thread packs at a time.
constexpr int64_t kPackedTogether = 2;

void pack_some(void* opaque, int64_t i, int32_t) {
  const Product& product = *static_cast<const Product*>(opaque);
  const Problem& p = *product.problem;
  const int64_t end = (i + 1) * kPackedTogether;
  product.kernel->pack_rows(p, i * kPackedTogether, end < p.packed_rows ? end : p.packed_rows);
}

void add(float* to, const float* from, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] += from[j];
}

// A whole task of a kernel that takes several blocks: rows of x stay with a thread.
void run_blocks(void* opaque, int64_t i, int32_t thread) {
  const Product& product = *static_cast<const Product*>(opaque);
  const Problem& p = *product.problem;
  const Plan& plan = product.plan;
  const int64_t row = i / plan.block_tasks * plan.task_rows, block = i % plan.block_tasks * plan.task_blocks;
  const int64_t row_end = row + plan.task_rows < p.m ? row + plan.task_rows : p.m;
  const int64_t block_end = block + plan.task_blocks < p.blocks ? block + plan.task_blocks : p.blocks;
  const Task task = {row, row_end, block, 0, p.steps, block_end};
  product.kernel->run(p, task, product.scratch + thread * product.kernel->scratch_bytes);
}

void run_task(void* opaque, int64_t i, int32_t) {
  const Product& product = *static_cast<const Product*>(opaque);
  const Problem& p = *product.problem;
  const Plan& plan = product.plan;
  const Kernel& kernel = *product.kernel;
  Task task = task_at(p, plan, i);
  const int64_t size = plan.task_rows * p.block_columns;
  const int64_t used = (task.row_end - task.row) * p.block_columns;
  if (plan.parts == 1) {
    alignas(64) float totals[int4cpu::kMaxTaskRows * int4cpu::kMaxBlockRows];
    const int64_t chunk = p.chunk_steps > 0 ? p.chunk_steps : p.steps;
    task.step_end = chunk < p.steps ? chunk : p.steps;
    kernel.multiply(p, task, totals);
    float* const next = totals + used;
    while (task.step_end < p.steps) {
      task.step = task.step_end;
      task.step_end = chunk < p.steps - task.step ? task.step + chunk : p.steps;
      kernel.multiply(p, task, next);
      add(totals, next, used);
    }
    kernel.store(p, task, totals);
    return;
  }
  const int64_t part = i % plan.parts;
  const int64_t whole = i / plan.parts;
  float* first = product.partial + whole * plan.parts * size;
  kernel.multiply(p, task, first + part * size);
  // Whoever ends last sums the parts, always in the same order.
  if (__atomic_add_fetch(&product.finished[whole], 1, __ATOMIC_ACQ_REL) < plan.parts) return;
  for (int64_t other = 1; other < plan.parts; ++other) {
    add(first, first + other * size, used);
  }
  kernel.store(p, task, first);
}

// Multiplications of one row below which waking other threads takes longer than it saves, about.
constexpr int64_t kSerialWork = INT64_C(1) << 17;

int32_t threads_for(const Problem& p, int32_t wanted) {
  return p.padded_n * p.padded_k * (1 + p.m / 4) < kSerialWork ? 1 : usable_threads(wanted);
}

char* carve(char*& from, int64_t bytes) {
  char* at = from;
  from += divide_up(bytes, 64) * 64;
  return at;
}

// Packed rows of x take at most about this, so that memory does not grow with the activation.
constexpr int64_t kPackedBytes = INT64_C(16) << 20;

// A product that needs no more is not to wait for an allocation: one row of K = 8192 in bfloat16.
constexpr int64_t kStackBytes = 32768;

// So much memory is kept by a thread that calls, until it ends. malloc gives what is freed back to the system
// as soon as it lies at the end of the heap, and then every page is mapped anew: MiniLM on 64 sentences had 8800
// page faults, 33 ms instead of 25.
constexpr int64_t kKeptBytes = INT64_C(24) << 20;

struct Kept {
  void* memory;
  int64_t bytes;
  bool used;
};

pthread_key_t kept_key;
bool keeps = false;  // a key for all threads was found

void forget(void* kept) {
  free(static_cast<Kept*>(kept)->memory);
  free(kept);
}

Kept* kept_of_thread() {
  if (!keeps) return nullptr;
  auto* kept = static_cast<Kept*>(pthread_getspecific(kept_key));
  if (kept != nullptr) return kept;
  kept = static_cast<Kept*>(calloc(1, sizeof(Kept)));
  if (kept != nullptr && pthread_setspecific(kept_key, kept) != 0) {
    free(kept);
    return nullptr;
  }
  return kept;
}

// Memory for a call, until the end of its block; none for 0 bytes.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    if (bytes == 0) return;
    Kept* const kept = bytes <= kKeptBytes ? kept_of_thread() : nullptr;
    if (kept == nullptr || kept->used) {
      allocate(memory_, bytes);
      return;
    }
    if (kept->bytes < bytes) {
      free(kept->memory);
      kept->bytes = allocate(kept->memory, bytes) ? bytes : 0;
    }
    memory_ = kept->memory;
    if (memory_ == nullptr) return;
    kept_ = kept;
    kept->used = true;
  }
  ~Memory() {
    if (kept_ == nullptr) {
      free(memory_);
    } else {
      kept_->used = false;
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Null if there is none.
  char* get() const { return static_cast<char*>(memory_); }

 private:
  static bool allocate(void*& memory, int64_t bytes) {
    if (posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0) memory = nullptr;
    return memory != nullptr;
  }

  void* memory_ = nullptr;
  Kept* kept_ = nullptr;
};

int64_t multiply(const Kernel& kernel, Problem& p, int32_t threads);

// Multiplies the rows that a kernel of integers leaves to the float32 kernel of its layout.
int64_t multiply_left(const Problem& few, int32_t block_rows, int64_t count, int32_t threads) {
  const Kernel& kernel = block_rows == int4cpu::kAvx2.block_rows ? int4cpu::kAvx2 : int4cpu::kAvx512;
  const int64_t itemsize = few.dtype == int4cpu::kFloat32 ? 4 : 2;
  const int64_t x_bytes = few.k * itemsize, y_bytes = few.n * itemsize;
  const Memory memory(count * (x_bytes + y_bytes));
  char* const x = memory.get();
  if (x == nullptr) return kNoMemory;
  char* const y = x + count * x_bytes;
  int64_t at = 0;
  for (int64_t row = 0; row < few.m; ++row) {
    if (few.row_factor[row] >= 0.0F) continue;
    memcpy(x + at++ * x_bytes, static_cast<const char*>(few.x) + row * few.x_stride * itemsize,
           static_cast<size_t>(x_bytes));
  }
  Problem p = few;
  p.x = x;
  p.x_stride = p.k;
  p.y = y;
  p.m = count;
  cut_weight(kernel, p.n, p.k, p.group_size, p);
  const int64_t failed = multiply(kernel, p, threads);
  at = 0;
  for (int64_t row = 0; row < few.m; ++row) {
    if (few.row_factor[row] >= 0.0F) continue;
    memcpy(static_cast<char*>(few.y) + row * y_bytes, y + at++ * y_bytes, static_cast<size_t>(y_bytes));
  }
  return failed;
}

// Multiplies; returns the number of rows that are not finite, or an Error.
int64_t multiply(const Kernel& kernel, Problem& p, int32_t threads) {
  p.packed_rows = divide_up(p.m, kernel.row_multiple) * kernel.row_multiple;
  threads = threads_for(p, threads);

  Product product = {&kernel, &p, plan(kernel, p, threads), nullptr, nullptr, nullptr};
  const Plan& cut = product.plan;
  const int64_t wholes = cut.row_tasks * cut.block_tasks;
  const bool in_parts = cut.parts > 1;
  const int64_t packed_bytes = p.packed_rows * p.padded_k * kernel.element_bytes;
  const int64_t record_bytes =
      p.packed_rows * divide_up(p.steps, kernel.record_steps) * kernel.record_steps * kernel.record_bytes;
  const int64_t tasks = wholes * cut.parts;
  const int32_t workers = tasks < threads ? static_cast<int32_t>(tasks) : threads;
  const int64_t scratch_bytes = workers * kernel.scratch_bytes;
  const int64_t partial_bytes =
      in_parts ? wholes * cut.parts * cut.task_rows * p.block_columns * 4 : 0;
  const int64_t finished_bytes = in_parts ? wholes * 4 : 0;
  const int64_t bytes =
      packed_bytes + record_bytes + p.packed_rows * 4 + partial_bytes + finished_bytes + scratch_bytes + 6 * 64;
  alignas(64) char small[kStackBytes];
  const Memory memory(bytes > kStackBytes ? bytes : 0);
  char* left = bytes > kStackBytes ? memory.get() : small;
  if (left == nullptr) return kNoMemory;
  p.packed_x = carve(left, packed_bytes);
  p.records = carve(left, record_bytes);
  p.row_factor = reinterpret_cast<float*>(carve(left, p.packed_rows * 4));
  product.partial = reinterpret_cast<float*>(carve(left, partial_bytes));
  product.finished = reinterpret_cast<int32_t*>(carve(left, finished_bytes));
  product.scratch = carve(left, scratch_bytes);
  if (in_parts) memset(product.finished, 0, static_cast<size_t>(finished_bytes));

  const bool large = p.packed_rows * p.padded_k >= kSerialWork / 4;
  for_each(divide_up(p.packed_rows, kPackedTogether), large ? threads : 1, pack_some, &product);
  for_each(tasks, workers, kernel.run != nullptr ? run_blocks : run_task, &product);

  int64_t bad = 0, left_rows = 0;
  for (int64_t row = 0; row < p.m; ++row) {
    bad += p.row_factor[row] == 0.0F;
    left_rows += p.row_factor[row] < 0.0F;
  }
  if (left_rows > 0) {
    const int64_t failed = multiply_left(p, kernel.block_rows, left_rows, threads);
    if (failed < 0) bad = failed;
  }
  return bad;
}

// --- reading only -------------------------------------------------------------------------------

struct Read {
  const Kernel* kernel;
  const Problem* problem;
  Plan plan;
  uint64_t found;  // exclusive or of all that was read
};

void take(const void* from, __m128i& found) {
  found = _mm_xor_si128(found, _mm_loadu_si128(static_cast<const __m128i*>(from)));
}

// Reads what `run_task` would, in its order: the codes of a group, then its scales and zeros. The latter
// once, although a kernel that cuts groups into steps takes them at each step.
void read_task(void* opaque, int64_t i, int32_t) {
  Read& read = *static_cast<Read*>(opaque);
  const Problem& p = *read.problem;
  const Task task = task_at(p, read.plan, i);
  const int64_t first = task.block * read.kernel->block_rows;
  const int64_t left = p.padded_n - first;
  const int64_t rows = left < read.kernel->block_rows ? left : read.kernel->block_rows;
  const int64_t step_bytes = p.step * rows / 2;
  const int64_t qparams_bytes = rows * 4;
  const uint8_t* bytes = p.qdata + first * (p.padded_k / 2) + task.step * step_bytes;
  __m128i found[4] = {};
  for (int64_t step = task.step; step < task.step_end; ++step) {
    const int64_t group = step * p.step / p.group_size;
    const uint32_t* const pairs = p.scale_and_zero + group * p.qparams_stride + first;
    const auto* const ahead =
        reinterpret_cast<const char*>(pairs + int4cpu::kPrefetchGroups * p.qparams_stride);
    for (int64_t at = 0; at < qparams_bytes; at += 64) _mm_prefetch(ahead + at, _MM_HINT_T0);
    // At least 32 columns of 16 rows: a multiple of 64 bytes, and so are their scales and zeros.
    for (const uint8_t* const end = bytes + step_bytes; bytes < end; bytes += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes) + int4cpu::kPrefetch, _MM_HINT_T1);
      for (int j = 0; j < 4; ++j) take(bytes + 16 * j, found[j]);
    }
    if (step * p.step % p.group_size != 0) continue;
    for (int64_t at = 0; at < rows; at += 16) {
      for (int j = 0; j < 4; ++j) take(pairs + at + 4 * j, found[j]);
    }
  }
  uint64_t halves[2];
  const __m128i all = _mm_xor_si128(_mm_xor_si128(found[0], found[1]), _mm_xor_si128(found[2], found[3]));
  memcpy(halves, &all, sizeof halves);
  __atomic_fetch_xor(&read.found, halves[0] ^ halves[1], __ATOMIC_RELAXED);
}

}  // namespace

// Digest of the sources that this library was built from.
EXPORT const char* int4cpu_digest() { return INT4CPU_DIGEST; }

// Kernels that computed wrong numbers on this machine.
uint32_t excluded = 0;

// Bit i: kernel i can run on this CPU under this system, and was not excluded.
EXPORT uint32_t int4cpu_kernels() {
  // Threads that come here at the same time find the same.
  static uint32_t found = 0;
  static bool asked = false;
  if (!__atomic_load_n(&asked, __ATOMIC_ACQUIRE)) {
    found = find_kernels();
    __atomic_store_n(&asked, true, __ATOMIC_RELEASE);
  }
  return found & ~__atomic_load_n(&excluded, __ATOMIC_RELAXED);
}

EXPORT void int4cpu_exclude(int32_t kernel) {
  __atomic_fetch_or(&excluded, 1U << kernel, __ATOMIC_RELAXED);
}

// From how many rows, and for which groups, byte tiles are ahead of 16-bit products: on a Xeon with both,
// group 128, 2 threads, ms for M = 4 / 6 / 8 / 16: 0.447 0.473 0.611 1.018 and 0.420 0.450 0.495 0.625.
constexpr int64_t kTileRowsFrom = 5;
constexpr int32_t kTileGroupsFrom = 64;

// From how many rows tiles are ahead that expand a block for all rows of a task: see amx.cpp.
constexpr int64_t kManyRows = 128;

// The kernel that multiplies `m` rows when `kernel` is asked for.
EXPORT int32_t int4cpu_kernel_for(int32_t kernel, int64_t m, int32_t group_size) {
  if (kernel == kAmx && m >= kManyRows && (int4cpu_kernels() >> kAmxMany & 1)) return kAmxMany;
  if (m >= kKernels[kernel]->least_rows) return kernel;
  const uint32_t found = int4cpu_kernels();
  const auto first_of = [&](std::initializer_list<int32_t> candidates) {
    for (const int32_t candidate : candidates) {
      if (found >> candidate & 1) return candidate;
    }
    return kernel;
  };
  if (kernel == kDynamicAvxVnni) return first_of({kInt16AvxVnni, kInt16Avx2});
  if (kernel == kTransposedAmx) return first_of({kTransposedAvx512Bf16});
  if ((kernel == kAmx || kernel == kDynamicAmx) && m >= kTileRowsFrom && group_size >= kTileGroupsFrom) {
    return first_of({kInt8Amx, kInt16Vbmi});
  }
  return first_of({kInt16Vbmi, kInt16Avx512Vnni, kInt16Avx512});
}

EXPORT const char* int4cpu_kernel_name(int32_t kernel) {
  return kernel >= 0 && kernel < kKernelCount ? kKernels[kernel]->name : nullptr;
}

// Hands over the OpenMP runtime of this process: `GOMP_parallel` and `omp_in_parallel`, or nulls.
EXPORT void int4cpu_use_runtime(Parallel run, InParallel inside) {
  static bool watched = false;
  if (!watched) {
    watched = pthread_atfork(nullptr, nullptr, mark_forked) == 0;
    keeps = pthread_key_create(&kept_key, forget) == 0;
  }
  parallel = run != nullptr && inside != nullptr ? run : nullptr;
  in_parallel = inside;
}

// How many threads a product may use that asks for `wanted`.
EXPORT int32_t int4cpu_threads(int32_t wanted) { return usable_threads(wanted); }

// How many tasks a product is cut into: {rows of a task, tasks over rows, over columns of y, over x's}.
EXPORT int32_t int4cpu_plan(int32_t kernel, int64_t m, int64_t n, int64_t k, int32_t group_size,
                            int32_t threads, int64_t* counts) {
  if (kernel < 0 || kernel >= kKernelCount) return kUnknownKernel;
  Problem p = {};
  p.m = m;
  cut_weight(*kKernels[kernel], n, k, group_size, p);
  const Plan cut = plan(*kKernels[kernel], p, threads);
  counts[0] = cut.task_rows;
  counts[1] = cut.row_tasks;
  counts[2] = cut.block_tasks;
  counts[3] = cut.parts;
  return 0;
}

struct Spin {
  const Kernel* kernel;
  int64_t rounds;
};

// Multiplies in registers only, to measure what the arithmetic units can do at best. Returns the number
// of operations of all threads, or an Error.
EXPORT int64_t int4cpu_spin(int32_t kernel, int32_t threads, int64_t rounds) {
  if (kernel < 0 || kernel >= kKernelCount || !(int4cpu_kernels() >> kernel & 1)) {
    return kUnknownKernel;
  }
  Spin spin = {kKernels[kernel], rounds};
  threads = usable_threads(threads);
  const auto work = [](void* context, int64_t, int32_t) {
    const Spin& spin = *static_cast<const Spin*>(context);
    spin.kernel->spin(spin.rounds);
  };
  for_each(threads, threads, work, &spin);
  return threads * rounds * spin.kernel->spin(0);
}

// Checks a call, and fills in its weight for the kernel that multiplies `call.m` rows. Returns 0 or an
// Error.
static int64_t take_weight(const int4cpu::Call& call, bool transposed, const Kernel*& chosen, Problem& p) {
  const int32_t kernel = call.kernel, dtype = call.dtype, group_size = call.group_size;
  const int64_t m = call.m, n = call.n, k = call.k;
  if (kernel < 0 || kernel >= kKernelCount || !(int4cpu_kernels() >> kernel & 1)) {
    return kUnknownKernel;
  }
  if (kKernels[kernel]->transposed != transposed) return kUnknownKernel;
  const bool group_fits =
      group_size == 32 || group_size == 64 || group_size == 128 || group_size == 256;
  if (m < 0 || n < 1 || k < 1 || dtype < 0 || dtype > 2 || call.bias_dtype < 0 ||
      call.bias_dtype > 2 || call.qparams_dtype < 0 || call.qparams_dtype > 1 || !group_fits) {
    return kBadArguments;
  }
  if (m == 0) return 0;
  if (call.qdata == nullptr || call.scale_and_zero == nullptr) return kFreed;
  chosen = kKernels[int4cpu_kernel_for(kernel, m, group_size)];
  p.n = n;
  p.k = k;
  p.qdata = static_cast<const uint8_t*>(call.qdata);
  p.scale_and_zero = static_cast<const uint32_t*>(call.scale_and_zero);
  p.qparams_dtype = call.qparams_dtype;
  cut_weight(*chosen, n, k, group_size, p);
  p.qparams_stride = p.padded_k == group_size ? p.padded_n : call.qparams_stride;
  if (p.qparams_stride < p.padded_n) return kBadArguments;
  return 0;
}

// Goes through a weight as a product of one row does, with the same tasks, but only reads. x, y and bias
// of the call are not used. Returns the exclusive or of all 32-bit words read, each once, or an Error.
EXPORT int64_t int4cpu_read(const int4cpu::Call* call) {
  int4cpu::Call one = *call;
  one.m = 1;
  const Kernel* kernel = nullptr;
  Problem p = {};
  const int64_t failed = take_weight(one, false, kernel, p);
  if (failed != 0) return failed;
  p.m = 1;
  const int32_t threads = threads_for(p, one.threads);
  Read read = {kernel, &p, plan(*kernel, p, threads), 0};
  for_each(read.plan.row_tasks * p.blocks * read.plan.parts, threads, read_task, &read);
  return static_cast<uint32_t>(read.found ^ read.found >> 32);
}

// Returns how many rows of x hold a NaN or an infinity: these rows of y are not to be used. Negative:
// an Error.
static int64_t product(const int4cpu::Call* call, bool transposed) {
  const int64_t m = call->m;
  const Kernel* kernel = nullptr;
  Problem p = {};
  const int64_t failed = take_weight(*call, transposed, kernel, p);
  if (failed != 0 || m == 0) return failed;
  const Kernel& chosen = *kernel;
  p.x_stride = call->x_stride;
  p.dtype = call->dtype;
  p.bias = call->bias;
  p.bias_dtype = call->bias_dtype;

  const int64_t itemsize = p.dtype == int4cpu::kFloat32 ? 4 : 2;
  int64_t rows = chosen.transposed ? m : kPackedBytes / (p.padded_k * chosen.element_bytes);
  if (rows < chosen.task_rows) rows = chosen.task_rows;
  rows = divide_up(m, divide_up(m, rows));
  int64_t bad = 0;
  for (int64_t row = 0; row < m; row += rows) {
    p.m = rows < m - row ? rows : m - row;
    p.x = static_cast<const char*>(call->x) + row * call->x_stride * itemsize;
    p.y = static_cast<char*>(call->y) + row * p.y_columns * itemsize;
    const int64_t found = multiply(chosen, p, call->threads);
    if (found < 0) return found;
    bad += found;
  }
  return bad;
}

// y = x · Wᵀ + bias.
EXPORT int64_t int4cpu_mm(const int4cpu::Call* call) { return product(call, false); }

// y = x · W, by a transposed kernel; the bias is not used.
EXPORT int64_t int4cpu_mm_transposed(const int4cpu::Call* call) { return product(call, true); }
