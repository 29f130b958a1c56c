// The product, written once for every instruction set that a source defines as `Isa`.
//
// A block of the layout is 4 vectors of rows. `Isa` says which byte of a column, and which nibble of it,
// a lane holds. In a whole block the high nibbles are the second half of the rows; in a short last
// block a byte holds neighbouring rows.
//
// Codes are multiplied as code - 8, which every element type holds exactly, and summed in float32 over
// a step. Then total += scale * sum + zero * (sum of x), the same for every number of rows.
#pragma once

#include <immintrin.h>

#include <math.h>
#include <string.h>

#include "int4cpu.h"

namespace {

using int4cpu::Problem;
using int4cpu::Task;

// 2^60 leaves room for sums over K in float32, 2^-60 keeps products above its smallest normal number.
constexpr float kLargest = 0x1p60F;
constexpr float kSmallest = 0x1p-60F;

// Bytes of the weight that are asked for ahead of time; they may lie beyond its end. A 4096 x 4096
// weight, one row, medians on 2 cores of an EPYC 9004: 2 KiB into the first cache 0.344 ms, 4 KiB and
// 8 KiB into the second 0.337 and 0.330.
constexpr int64_t kPrefetch = 8192;
constexpr int64_t kPanelPrefetch = 4096;

struct Block {
  int64_t first_row;
  int32_t rows;
  int32_t column_bytes;
  bool whole;
  const uint8_t* bytes;
};

template <class Isa>
struct Gemm {
  using Vec = typename Isa::Vec;
  using Operand = typename Isa::Operand;  // expanded codes, or a broadcast of x
  using Element = typename Isa::Element;  // of the packed activation
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kBlock = 4 * kLanes;
  static constexpr int kDepth = Isa::kDepth;  // columns that one dot instruction consumes

  static Block block_at(const Problem& p, int64_t index) {
    const int64_t first = index * kBlock;
    const int64_t left = p.padded_n - first;
    const int32_t rows = left < kBlock ? static_cast<int32_t>(left) : kBlock;
    return {first, rows, rows / 2, rows == kBlock, p.qdata + first * (p.padded_k / 2)};
  }

  // The row in lane `lane` of vector `v`, of a whole block and of a short one (or beyond that).
  static int whole_row(int v, int lane) {
    return Isa::nibble(v, lane) * (kBlock / 2) + Isa::byte(v, lane);
  }
  static int short_row(int v, int lane) { return 2 * Isa::byte(v, lane) + Isa::nibble(v, lane); }

  struct QParams {
    Vec scale[4], zero[4];
  };

  static QParams qparams(const Problem& p, const Block& block, int64_t column) {
    const uint32_t* pairs =
        p.scale_and_zero + column / p.group_size * p.qparams_stride + block.first_row;
    alignas(64) uint32_t ordered[kBlock];
    if (!block.whole) {
      for (int v = 0; v < 4; ++v) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const int row = short_row(v, lane);
          uint32_t pair = 0;
          if (row < block.rows) memcpy(&pair, pairs + row, sizeof pair);
          ordered[whole_row(v, lane)] = pair;
        }
      }
      pairs = ordered;
    }
    QParams q;
    for (int v = 0; v < 4; ++v) {
      const Vec both = Isa::take(reinterpret_cast<const float*>(pairs), v);
      if (p.qparams_dtype == int4cpu::kFloat16) {
        Isa::split_float16(both, q.scale[v], q.zero[v]);
      } else {
        Isa::split(both, q.scale[v], q.zero[v]);
      }
    }
    return q;
  }

  // Scales of one block are a page or more apart, so no hardware prefetcher follows them.
  static void prefetch_qparams(const Problem& p, const Block& block, int64_t step) {
    const int64_t group = step * p.step / p.group_size + 3;
    prefetch(p.scale_and_zero + group * p.qparams_stride + block.first_row, kBlock * 4);
  }

  static void prefetch(const void* from, int64_t bytes) {
    const char* line = static_cast<const char*>(from);
    for (const char* end = line + bytes; line < end; line += 64) _mm_prefetch(line, _MM_HINT_T0);
  }

  // total += scale * acc + zero * (sum of x), for `Rows` rows.
  template <int Rows>
  static inline __attribute__((always_inline)) void apply(
      const QParams& q, const Vec (&acc)[Rows][4], const float* sums, float* totals) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec sum = Isa::splat(sums[r]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        float* at = totals + r * kBlock + v * kLanes;
        const Vec total = Isa::fma(q.scale[v], acc[r][v], Isa::load(at));
        Isa::store(at, Isa::fma(q.zero[v], sum, total));
      }
    }
  }

  template <int Rows>
  static inline __attribute__((always_inline)) void dot(
      Vec (&acc)[Rows][4], const Operand (&w)[4], const Element* x, int32_t x_stride) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Operand broadcast = Isa::broadcast(x + r * x_stride);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = Isa::dot(acc[r][v], broadcast, w[v]);
    }
  }

  static const Element* packed_row(const Problem& p, int64_t step, int64_t row) {
    return static_cast<const Element*>(p.packed_x) + (step * p.packed_rows + row) * p.step;
  }

  // Few rows: codes are expanded in registers, and read once.
  template <int Rows>
  static void fused(const Problem& p, const Task& t, const Block& block, int64_t row,
                    float* totals) {
    const typename Isa::Expander expand(block.whole, block.column_bytes);
    const uint8_t* bytes = block.bytes + t.step * p.step * block.column_bytes;
    for (int64_t s = t.step; s < t.step_end; ++s) {
      const Element* x = packed_row(p, s, row);
      prefetch_qparams(p, block, s);
      Vec acc[Rows][4];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) acc[r][v] = Isa::splat(0.0F);
      }
      for (int32_t k = 0; k < p.step; k += kDepth) {
        // Into the second cache: its queue of misses is longer than that of the first.
        _mm_prefetch(reinterpret_cast<const char*>(bytes) + kPrefetch, _MM_HINT_T1);
        Operand w[4];
        expand(bytes, w);
        bytes += kDepth * block.column_bytes;
        dot<Rows>(acc, w, x + k, p.step);
      }
      apply<Rows>(qparams(p, block, s * p.step), acc, p.sums + s * p.packed_rows + row, totals);
    }
  }

  // `Rows` rows times an expanded step of a block.
  template <int Rows>
  static void tile(const Problem& p, const Operand* panel, const QParams& q, int64_t step, int64_t row,
                   float* totals) {
    const Element* x = packed_row(p, step, row);
    prefetch(totals, Rows * kBlock * sizeof(float));
    prefetch(x + Rows * p.step, Rows * p.step * sizeof(Element));
    Vec acc[Rows][4];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = Isa::splat(0.0F);
    }
    for (int32_t k = 0; k < p.step; k += kDepth, panel += 4) {
      const Operand w[4] = {panel[0], panel[1], panel[2], panel[3]};
      dot<Rows>(acc, w, x + k, p.step);
    }
    apply<Rows>(q, acc, p.sums + step * p.packed_rows + row, totals);
  }

  static void expand_step(const Problem& p, const Block& block, int64_t step, Operand* panel) {
    const typename Isa::Expander expand(block.whole, block.column_bytes);
    const uint8_t* bytes = block.bytes + step * p.step * block.column_bytes;
    prefetch_qparams(p, block, step);
    for (int32_t k = 0; k < p.step; k += kDepth, panel += 4) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes) + kPanelPrefetch, _MM_HINT_T0);
      Operand w[4];
      expand(bytes, w);
      bytes += kDepth * block.column_bytes;
      for (int v = 0; v < 4; ++v) panel[v] = w[v];
    }
  }

  // Calls body<Rows>() for a number of rows from 1 to `Most`.
  template <int Most, class Body>
  static void with_rows(int64_t rows, const Body& body) {
    if (rows >= Most) {
      body.template operator()<Most>();
    } else if constexpr (Most > 1) {
      with_rows<Most - 1>(rows, body);
    }
  }

  static void multiply(const Problem& p, const Task& t, float* totals) {
    const Block block = block_at(p, t.block);
    const int64_t rows = t.row_end - t.row;
    memset(totals, 0, sizeof(float) * rows * kBlock);
    if (rows <= Isa::kMostFused) {
      const int64_t passes = (rows + Isa::kFusedRows - 1) / Isa::kFusedRows;
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t begin = rows * pass / passes;
        const int64_t count = rows * (pass + 1) / passes - begin;
        with_rows<Isa::kFusedRows>(count, [&]<int Rows>() {
          fused<Rows>(p, t, block, t.row + begin, totals + begin * kBlock);
        });
      }
      return;
    }
    alignas(64) Operand panel[Isa::kMaxStep / kDepth * 4];
    for (int64_t s = t.step; s < t.step_end; ++s) {
      expand_step(p, block, s, panel);
      const QParams q = qparams(p, block, s * p.step);
      for (int64_t row = t.row; row < t.row_end; row += Isa::kTileRows) {
        with_rows<Isa::kTileRows>(t.row_end - row, [&]<int Rows>() {
          tile<Rows>(p, panel, q, s, row, totals + (row - t.row) * kBlock);
        });
      }
    }
  }

  static void store(const Problem& p, const Task& t, const float* totals) {
    const Block block = block_at(p, t.block);
    const int64_t left = p.n - block.first_row;  // rows of W that are no padding
    const int count = static_cast<int>(left < block.rows ? left : block.rows);
    alignas(64) float bias_floats[kBlock];
    const float* bias = nullptr;
    if (p.bias != nullptr) {
      load_bias(p, block, count, bias_floats);
      bias = bias_floats;
    }
    for (int64_t row = t.row; row < t.row_end; ++row, totals += kBlock) {
      const Vec back = Isa::splat(1.0F / p.row_factor[row]);
      alignas(64) float y[kBlock];
      for (int v = 0; v < 4; ++v) {
        Isa::put(y, v, Isa::multiply(Isa::load(totals + v * kLanes), back));
      }
      if (!block.whole) {
        alignas(64) float whole[kBlock];
        memcpy(whole, y, sizeof y);
        for (int v = 0; v < 4; ++v) {
          for (int lane = 0; lane < kLanes; ++lane) {
            const int at = short_row(v, lane);
            if (at < block.rows) y[at] = whole[whole_row(v, lane)];
          }
        }
      }
      if (bias != nullptr) add_bias(p.dtype, bias, y);
      const int64_t at = row * p.n + block.first_row;
      switch (p.dtype) {
        case int4cpu::kFloat32:
          memcpy(static_cast<float*>(p.y) + at, y, sizeof(float) * count);
          break;
        case int4cpu::kFloat16:
          store_rounded<&Isa::to_float16>(static_cast<uint16_t*>(p.y) + at, y, count);
          break;
        default:
          store_rounded<&Isa::to_bfloat16>(static_cast<uint16_t*>(p.y) + at, y, count);
      }
    }
  }

  template <void (*Round)(const float*, uint16_t*)>
  static void store_rounded(uint16_t* to, const float* y, int count) {
    alignas(64) uint16_t rounded[kBlock];
    for (int v = 0; v < kBlock; v += kLanes) Round(y + v, rounded + v);
    memcpy(to, rounded, sizeof(uint16_t) * count);
  }

  // The bias of the rows of a block, zero beyond `count`.
  static void load_bias(const Problem& p, const Block& block, int count, float* to) {
    const int64_t itemsize = size_of(p.bias_dtype);
    alignas(64) char from[kBlock * 4] = {};
    memcpy(from, static_cast<const char*>(p.bias) + block.first_row * itemsize, count * itemsize);
    for (int v = 0; v < kBlock; v += kLanes) {
      Isa::store(to + v, load_as_float32(p.bias_dtype, from + v * itemsize));
    }
  }

  // The product is rounded before the bias is added, as if that were an op of its own.
  static void add_bias(int32_t dtype, const float* bias, float* y) {
    alignas(64) uint16_t rounded[kLanes];
    for (int v = 0; v < kBlock; v += kLanes) {
      Vec product = Isa::load(y + v);
      if (dtype == int4cpu::kFloat16) {
        Isa::to_float16(y + v, rounded);
        product = Isa::from_float16(rounded);
      } else if (dtype == int4cpu::kBFloat16) {
        Isa::to_bfloat16(y + v, rounded);
        product = Isa::from_bfloat16(rounded);
      }
      Isa::store(y + v, Isa::add(product, Isa::load(bias + v)));
    }
  }

  static int64_t size_of(int32_t dtype) { return dtype == int4cpu::kFloat32 ? 4 : 2; }

  static Vec load_as_float32(int32_t dtype, const void* from) {
    return dtype == int4cpu::kFloat32   ? Isa::load(static_cast<const float*>(from))
           : dtype == int4cpu::kFloat16 ? Isa::from_float16(from)
                                        : Isa::from_bfloat16(from);
  }

  static int64_t spin(int64_t rounds) {
    // Not zeros, with which some units run faster: every element is 0.0115 in either type.
    Element values[kDepth];
    memset(values, 0x3C, sizeof values);
    const Operand x = Isa::broadcast(values);
    Vec acc[Isa::kTileRows][4];
    for (int r = 0; r < Isa::kTileRows; ++r) {
      for (int v = 0; v < 4; ++v) acc[r][v] = Isa::splat(0.0F);
    }
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 6
      for (int r = 0; r < Isa::kTileRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) acc[r][v] = Isa::dot(acc[r][v], x, x);
      }
    }
    for (int r = 0; r < Isa::kTileRows; ++r) {
      for (int v = 0; v < 4; ++v) __asm__ volatile("" ::"x"(acc[r][v]));
    }
    return INT64_C(2) * Isa::kTileRows * 4 * kLanes * kDepth;
  }

  // One row of x to packed_x and sums, multiplied by `factor`; returns the largest magnitude.
  static float pack_row(const Problem& p, int64_t row, float factor) {
    const Vec by = Isa::splat(factor);
    Vec largest = Isa::splat(0.0F);
    const char* x = static_cast<const char*>(p.x);
    const int64_t itemsize = size_of(p.dtype);
    x += row * p.x_stride * itemsize;
    for (int64_t s = 0; s < p.steps; ++s) {
      Element* to = const_cast<Element*>(packed_row(p, s, row));
      Vec sum = Isa::splat(0.0F);
      for (int32_t k = 0; k < p.step; k += kLanes) {
        const int64_t column = s * p.step + k;
        const int64_t left = p.k - column;
        alignas(64) char tail[kLanes * 4] = {};
        const char* from = x + column * itemsize;
        if (left < kLanes) {
          if (left > 0) memcpy(tail, from, left * itemsize);
          from = tail;
        }
        Vec value = load_as_float32(p.dtype, from);
        largest = Isa::larger_magnitude(largest, value);
        value = Isa::pack(Isa::multiply(value, by), to + k);
        sum = Isa::add(sum, value);
      }
      p.sums[s * p.packed_rows + row] = Isa::total(sum);
    }
    return Isa::largest_lane(largest);
  }

  static void pack_rows(const Problem& p, int64_t row, int64_t row_end) {
    for (; row < row_end; ++row) {
      p.row_factor[row] = 1.0F;
      if (row >= p.m) {
        for (int64_t s = 0; s < p.steps; ++s) {
          memset(const_cast<Element*>(packed_row(p, s, row)), 0, sizeof(Element) * p.step);
          p.sums[s * p.packed_rows + row] = 0.0F;
        }
        continue;
      }
      const float largest = pack_row(p, row, 1.0F);
      if (!(largest <= 0x1.fffffep127F)) {
        p.row_factor[row] = 0.0F;
      } else if (largest > kLargest || (largest < kSmallest && largest > 0.0F)) {
        int exponent = ilogbf(largest);
        exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
        p.row_factor[row] = ldexpf(1.0F, -exponent);
        pack_row(p, row, p.row_factor[row]);
      }
    }
  }
};

}  // namespace
