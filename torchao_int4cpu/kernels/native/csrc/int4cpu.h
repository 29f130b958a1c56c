// What the sources of the native kernel share: the problem, the tasks it is cut into, the kernels.
//
// Every instruction set has a source of its own, compiled with its own flags. Nothing here may be an
// inline function with external linkage: the linker keeps one copy of those, and the one it keeps may
// be compiled for instructions that this CPU does not have.
#pragma once

#include <cstdint>

namespace int4cpu {

enum Dtype : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// One product, y = x · Wᵀ, or y = x · W of a transposed kernel. A row of x is multiplied by `row_factor`, a
// power of two, and its results by the inverse.
struct Problem {
  // Activation [m, x_columns] in `dtype`, rows `x_stride` elements apart; result [m, y_columns], contiguous.
  const void* x;
  void* y;
  int64_t x_stride;
  int32_t dtype;
  int64_t m, n, k;
  int64_t x_columns, y_columns;  // k and n; n and k of a transposed kernel

  // [n] in `bias_dtype`, added to the rounded results; or null.
  const void* bias;
  int32_t bias_dtype;

  // Packed weight: uint8 [padded_n, padded_k / 2] and pairs of `qparams_dtype`, the scale in the low half of
  // each 32 bits and the zero in the high half: [padded_k / group_size, padded_n], groups
  // `qparams_stride` pairs apart (more than padded_n if these are some rows of a larger weight).
  const uint8_t* qdata;
  const uint32_t* scale_and_zero;
  int64_t qparams_stride;
  int32_t qparams_dtype;  // kBFloat16 or kFloat16
  int64_t padded_n, padded_k;
  int32_t group_size;

  // Columns of y are cut into blocks: the rows of a block of the layout, or columns of one group of W.
  int32_t block_columns;
  int64_t blocks;

  // A step is the part of a group over which codes are summed before scale and zero are applied. For a
  // transposed kernel it is the rows of a block of the layout.
  int32_t step;
  int64_t steps;

  // Steps whose totals are summed alone before they are added to those before, so that a result does
  // not depend on how many threads share K; 0 if that is no matter.
  int64_t chunk_steps;

  // Packed activation, in the element type of the kernel: [steps, packed_rows, step].
  void* packed_x;
  int64_t packed_rows;
  void* records;      // what else the kernel needs to know of it: [steps, packed_rows]
  float* row_factor;  // [packed_rows]; 0 for a row that is not finite, below 0 for one that the kernel
                      // leaves to the float32 kernel
};

// Rows [row, row_end) of x times block `block` of the weight, or blocks [block, block_end), over steps
// [step, step_end).
struct Task {
  int64_t row, row_end;
  int64_t block;
  int64_t step, step_end;
  int64_t block_end;
};

struct Kernel {
  const char* name;
  bool transposed = false;
  int32_t block_rows;      // of the layout that it reads
  int32_t max_step;        // of a transposed kernel: the most columns of a block
  int32_t element_bytes;   // of the packed activation
  int32_t record_bytes;
  int32_t record_steps = 1;  // there are records for a multiple of so many steps
  int32_t row_multiple;    // packed_rows is a multiple of it; rows beyond m are zero
  int32_t task_rows;       // the most rows of a task; a multiple of `tile_rows`
  int32_t tile_rows;       // rows that share one read of the expanded weight
  int32_t chunk_columns;   // see Problem::chunk_steps; 0 for none
  int32_t least_rows;      // fewer are left to the kernels of integers
  // Fills packed_x, sums and row_factor for rows [row, row_end), which may reach packed_rows.
  void (*pack_rows)(const Problem&, int64_t row, int64_t row_end);
  // Writes the sums of a task to `totals`, float32 [row_end - row, block_rows] in the kernel's order.
  void (*multiply)(const Problem&, const Task&, float* totals);
  // Rounds totals to y.
  void (*store)(const Problem&, const Task&, const float* totals);
  // Instead of both, if not null: a whole task of up to `task_blocks` blocks, with memory of the thread.
  void (*run)(const Problem&, const Task&, void* scratch) = nullptr;
  int32_t task_blocks = 1;
  int64_t scratch_bytes = 0;
  // Multiplies only, operands in registers or tiles from a cache; `rounds` times as many operations as it
  // returns.
  int64_t (*spin)(int64_t rounds);
};

// The float32 totals of so many rows and a block take 132 KiB of the stack, which a second-level cache holds
// beside the expanded block. No task of a kernel is larger, or a half of it if it has chunks.
constexpr int32_t kMaxTaskRows = 528;
constexpr int32_t kMaxBlockRows = 64;
// Of a transposed kernel.
constexpr int32_t kMaxBlockColumns = 128;

// Bytes of the weight that are asked for ahead of time; they may lie beyond its end. A 4096 x 4096
// weight, one row, medians on 2 cores of an EPYC 9004: 2 KiB into the first cache 0.344 ms, 4 KiB and
// 8 KiB into the second 0.337 and 0.330.
constexpr int64_t kPrefetch = 8192;
// The same of the scales and zeros of a block, in groups.
constexpr int64_t kPrefetchGroups = 3;

// A chunk of a block is 32 KiB, long enough for its totals to cost nothing beside it.
constexpr int32_t kChunkColumns = 1024;

// Rows of a task of the kernels with chunks, which needs totals twice; a multiple of every `tile_rows`.
constexpr int32_t kChunkedTaskRows = 240;
static_assert(2 * kChunkedTaskRows <= kMaxTaskRows);

// A product: y = x · Wᵀ + bias. x [m, k] with rows `x_stride` elements apart and columns 1, y [m, n]
// contiguous, both in `dtype` (0 bfloat16, 1 float16, 2 float32); of a transposed kernel, y = x · W, x is
// [m, n] and y [m, k]. The bias null, or [n] contiguous in `bias_dtype`. Scales and zeros in `qparams_dtype`,
// bfloat16 or float16; `qparams_stride` pairs lie from one group to the next; of a single group it says
// nothing.
// One block of memory, because ctypes takes longer to convert 16 arguments than a small product takes.
struct Call {
  int32_t kernel, dtype, group_size, threads, bias_dtype, qparams_dtype;
  const void* x;
  int64_t x_stride;
  const void* qdata;
  const void* scale_and_zero;
  int64_t qparams_stride;
  void* y;
  int64_t m, n, k;
  const void* bias;
};

extern const Kernel kAvx2;
extern const Kernel kAvx512;
extern const Kernel kAvx512Bf16;
extern const Kernel kAmx;
extern const Kernel kAmxMany;
extern const Kernel kInt16Avx2;
extern const Kernel kInt16AvxVnni;
extern const Kernel kInt16Avx512;
extern const Kernel kInt16Avx512Vnni;
extern const Kernel kInt16Vbmi;
extern const Kernel kInt8Amx;
extern const Kernel kDynamicAvxVnni;
extern const Kernel kDynamicAvx512Vnni;
extern const Kernel kDynamicAmx;
extern const Kernel kTransposedAvx2;
extern const Kernel kTransposedAvxVnni;
extern const Kernel kTransposedAvx512;
extern const Kernel kTransposedAvx512Vnni;
extern const Kernel kTransposedAvx512Bf16;
extern const Kernel kTransposedAmx;

}  // namespace int4cpu

extern "C" int64_t int4cpu_mm(const int4cpu::Call* call);
