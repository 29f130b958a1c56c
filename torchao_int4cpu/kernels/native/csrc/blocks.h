// The blocks of the layout, for every instruction set that a source defines as `Isa`: which rows they
// hold, their scales and zeros, and how sums leave them as results.
//
// A block is 4 vectors of rows. `Isa` says which byte of a column, and which nibble of it, a lane holds.
// In a whole block the high nibbles are the second half of the rows; in a short last block a byte holds
// neighbouring rows.
#pragma once

#include <immintrin.h>

#include <math.h>
#include <string.h>

#include "int4cpu.h"

namespace {

using int4cpu::kPrefetch;
using int4cpu::Problem;
using int4cpu::Task;

// 2^60 leaves room for sums over K in float32, 2^-60 keeps products above its smallest normal number.
constexpr float kLargest = 0x1p60F;
constexpr float kSmallest = 0x1p-60F;
constexpr float kLargestFinite = 0x1.fffffep127F;

// What `kPrefetch` is to few rows, while a panel is expanded.
constexpr int64_t kPanelPrefetch = 4096;

inline uint32_t magnitude_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x7FFFFFFF;
}

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The power of two that brings a row with this largest magnitude into that range; 0 if the row is not
// finite.
inline float row_factor_for(float largest) {
  if (!(largest <= kLargestFinite)) return 0.0F;
  if (largest <= kLargest && (largest >= kSmallest || largest == 0.0F)) return 1.0F;
  int exponent = ilogbf(largest);
  exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
  return ldexpf(1.0F, -exponent);
}

// Calls body<Rows>() for a number of rows from 1 to `Most`.
template <int Most, class Body>
void with_rows(int64_t rows, const Body& body) {
  if (rows >= Most) {
    body.template operator()<Most>();
  } else if constexpr (Most > 1) {
    with_rows<Most - 1>(rows, body);
  }
}

struct Block {
  int64_t first_row;
  int32_t rows;
  int32_t column_bytes;
  bool whole;
  const uint8_t* bytes;
};

template <class Isa>
struct Blocks {
  using Vec = typename Isa::Vec;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kBlock = 4 * kLanes;

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

  static int64_t group_of(const Problem& p, int64_t step) { return step * p.step / p.group_size; }

  static QParams qparams(const Problem& p, const Block& block, int64_t group) {
    return block.whole ? qparams<true>(p, block, group) : qparams<false>(p, block, group);
  }

  template <bool Whole>
  static QParams qparams(const Problem& p, const Block& block, int64_t group) {
    const uint32_t* pairs = p.scale_and_zero + group * p.qparams_stride + block.first_row;
    alignas(64) uint32_t ordered[kBlock];
    if constexpr (!Whole) {
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
  static void prefetch_qparams(const Problem& p, const Block& block, int64_t group) {
    const int64_t ahead = group + int4cpu::kPrefetchGroups;
    prefetch(p.scale_and_zero + ahead * p.qparams_stride + block.first_row, kBlock * 4);
  }

  static void prefetch(const void* from, int64_t bytes) {
    const char* line = static_cast<const char*>(from);
    for (const char* end = line + bytes; line < end; line += 64) _mm_prefetch(line, _MM_HINT_T0);
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
      if (count == kBlock) {  // known when compiled, so that it is no call
        store_some<kBlock>(p, at, y, kBlock);
      } else {
        store_some<kBlock>(p, at, y, count);
      }
    }
  }

  // The first `count` of `Most` results, rounded, to element `at` of y.
  template <int Most>
  static inline __attribute__((always_inline)) void store_some(const Problem& p, int64_t at,
                                                               const float* y, int64_t count) {
    switch (p.dtype) {
      case int4cpu::kFloat32:
        memcpy(static_cast<float*>(p.y) + at, y, sizeof(float) * count);
        break;
      case int4cpu::kFloat16:
        store_rounded<Most, &Isa::to_float16>(static_cast<uint16_t*>(p.y) + at, y, count);
        break;
      default:
        store_rounded<Most, &Isa::to_bfloat16>(static_cast<uint16_t*>(p.y) + at, y, count);
    }
  }

  template <int Most, void (*Round)(const float*, uint16_t*)>
  static inline __attribute__((always_inline)) void store_rounded(uint16_t* to, const float* y,
                                                                  int64_t count) {
    alignas(64) uint16_t rounded[Most];
    for (int v = 0; v < Most; v += kLanes) Round(y + v, rounded + v);
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

  // `kLanes` numbers of row `row` of x from `column` on, zero beyond K.
  static Vec load_x(const Problem& p, int64_t row, int64_t column) {
    const int64_t itemsize = size_of(p.dtype);
    const char* from = static_cast<const char*>(p.x) + (row * p.x_stride + column) * itemsize;
    const int64_t left = p.x_columns - column;
    alignas(64) char tail[kLanes * 4] = {};
    if (left < kLanes) {
      if (left > 0) memcpy(tail, from, left * itemsize);
      from = tail;
    }
    return load_as_float32(p.dtype, from);
  }

  // A step of a row times `factor`, to floats. Returns the bits of the largest magnitude.
  static uint32_t load_x(const Problem& p, int64_t row, int64_t column, float factor, float* to) {
    const bool whole = column + p.step <= p.x_columns && factor == 1.0F;
    const char* from = static_cast<const char*>(p.x) + (row * p.x_stride + column) * size_of(p.dtype);
    Vec largest = Isa::splat(0.0F);
    const auto load = [&](const auto& value_at) {
      for (int32_t k = 0; k < p.step; k += kLanes) {
        const Vec value = value_at(k);
        largest = Isa::larger_magnitude(largest, value);
        Isa::store(to + k, value);
      }
    };
    if (whole && p.dtype == int4cpu::kBFloat16) {
      load([&](int32_t k) { return Isa::from_bfloat16(from + 2 * k); });
    } else if (whole && p.dtype == int4cpu::kFloat32) {
      load([&](int32_t k) { return Isa::load(reinterpret_cast<const float*>(from) + k); });
    } else {
      const Vec by = Isa::splat(factor);
      load([&](int32_t k) { return Isa::multiply(load_x(p, row, column + k), by); });
    }
    return Isa::largest_lane_bits(largest);
  }
};

}  // namespace
