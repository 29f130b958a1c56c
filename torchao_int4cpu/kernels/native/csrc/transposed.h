// Products from the other side, y = x · W: gradients of activations, and `x @ w`.
//
// Sums go over the rows of W, each of which has a scale of its own in a group of columns, so scales meet x:
//
//     y[c] = sum over n of (code[n, c] - 8) * a[n]  +  sum over n of x[n] * zero[n],   a[n] = scale[n] * x[n]
//
// Codes of a column lie together. Lanes are rows of W, in the order of memory for x and W alike, and nothing
// is transposed: only at the end of a chunk of rows the lanes of a sum are added up. `a` is rounded as `Isa`
// says, to bfloat16 or to fixed point (transposed_int16.h); results are summed in float32. A row of x gives the
// same bits beside any number of others.
#pragma once

#include "blocks.h"

namespace {

// `Isa::ColumnExpander` turns the bytes of a column of a block into kVectors operands. An `Isa::Scaler` takes
// the blocks of a row of x and their scales, fills `a` in the same order, and returns their `Isa::Unit`: what
// sums of the row are to be multiplied by.
template <class Isa>
struct Transposed {
  using Base = Blocks<Isa>;
  using Vec = typename Isa::Vec;
  using Operand = typename Isa::Operand;
  using Element = typename Isa::Element;
  using Sum = typename Isa::Sum;
  using Unit = typename Isa::Unit;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kBlock = Base::kBlock;
  static constexpr int kElements = kLanes * Isa::kDepth;  // of an operand
  static constexpr int kVectors = kBlock / kElements;
  static constexpr int kRows = Isa::kTileRows;        // of x that are multiplied together
  static constexpr int kColumns = Isa::kTileColumns;  // of W
  static constexpr int kFusedRows = Isa::kFusedRows;  // of x, if the columns stay in registers
  static constexpr int kChunk = Isa::kChunk;          // rows of W
  static constexpr int kTiles = (Isa::kTaskRows + kRows - 1) / kRows;
  // The rows of x of a task, times the scales of a group.
  struct Scaled {
    Element a[kTiles][kChunk * kRows];  // [tile][vector][row of a tile]
    Unit unit[Isa::kTaskRows];
  };

  // The rows of W of one block in one group.
  struct QParams {
    Vec scale[4], zero[4];
  };

  // Those of a task.
  struct TaskQParams {
    QParams of_block[kChunk / kBlock];
    float largest_scale;
  };

  static QParams qparams(const Problem& p, int64_t group, int64_t first, int64_t count) {
    const uint32_t* pairs = p.scale_and_zero + group * p.qparams_stride + first;
    alignas(64) uint32_t known[kBlock] = {};  // what pads W is not to be multiplied, not even by 0
    if (count < kBlock) {
      memcpy(known, pairs, sizeof(uint32_t) * count);
      pairs = known;
    }
    QParams q;
    for (int v = 0; v < 4; ++v) {
      const Vec both = Isa::load(reinterpret_cast<const float*>(pairs) + v * kLanes);
      if (p.qparams_dtype == int4cpu::kFloat16) {
        Isa::split_float16(both, q.scale[v], q.zero[v]);
      } else {
        Isa::split(both, q.scale[v], q.zero[v]);
      }
    }
    return q;
  }

  static void take_qparams(const Problem& p, const Task& t, TaskQParams& task) {
    const int64_t group = t.block * p.block_columns / p.group_size;
    Vec largest = Isa::splat(0.0F);
    QParams* q = task.of_block;
    for (int64_t s = t.step; s < t.step_end; ++s, ++q) {
      const int64_t first = s * kBlock, left = p.n - first;
      *q = qparams(p, group, first, left < kBlock ? left : kBlock);
      for (const Vec& scale : q->scale) largest = Isa::larger_magnitude(largest, scale);
      // The next task of this thread is most often the next group.
      const uint32_t* next = p.scale_and_zero + (group + 1) * p.qparams_stride + first;
      for (int at = 0; at < kBlock; at += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(next + at), _MM_HINT_T1);
      }
    }
    task.largest_scale = from_bits(Isa::largest_lane_bits(largest));
  }

  // Fills `a` for a row, and returns the sum of x * zero.
  static float scale_row(const Problem& p, const Task& t, int64_t row, const TaskQParams& task, Element* a,
                         Unit& unit) {
    const float factor = p.row_factor[row];
    typename Isa::Scaler scaler(a, kRows * kElements, largest_x(p, t.step, row) * factor * task.largest_scale);
    const QParams* q = task.of_block;
    Vec zeros[4];  // so that no addition waits for the one before it
    for (Vec& part : zeros) part = Isa::splat(0.0F);
    int64_t s = t.step;
    const int64_t itemsize = Base::size_of(p.dtype);
    const char* from = static_cast<const char*>(p.x) + row * p.x_stride * itemsize;
    const auto scale = [&](int64_t end, const auto& take, const auto& load) {
      for (; s < end; ++s, ++q) {
        Vec x[4];
        for (int64_t at = 0; at < kBlock * itemsize; at += 64) {  // of the next row, in another page
          _mm_prefetch(from + s * kBlock * itemsize + p.x_stride * itemsize + at, _MM_HINT_T1);
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          x[v] = load(s * kBlock + v * kLanes);
          zeros[v] = Isa::fma(x[v], q->zero[v], zeros[v]);
        }
        take(scaler, x, q->scale);
      }
    };
    const int64_t known = p.n / kBlock < t.step_end ? p.n / kBlock : t.step_end;
    if (factor == 1.0F && p.dtype == int4cpu::kBFloat16) {
      scale(known, take, [&](int64_t n) { return Isa::from_bfloat16(from + 2 * n); });
    } else if (factor == 1.0F && p.dtype == int4cpu::kFloat32) {
      scale(known, take,
            [&](int64_t n) { return Isa::load(reinterpret_cast<const float*>(from) + n); });
    }
    const auto load = [&](int64_t n) {
      return Isa::multiply(Base::load_x(p, row, n), Isa::splat(factor));
    };
    scale(p.padded_n / kBlock < t.step_end ? p.padded_n / kBlock : t.step_end, take, load);
    scale(t.step_end, take_short, load);
    unit = scaler.finish();
    Vec parts[16 / kLanes] = {Isa::add(Isa::add(zeros[0], zeros[1]), Isa::add(zeros[2], zeros[3]))};
    for (int i = 1; i < 16 / kLanes; ++i) parts[i] = Isa::splat(0.0F);
    return Isa::total(parts);
  }

  static inline __attribute__((always_inline)) void take(typename Isa::Scaler& scaler, const Vec (&x)[4],
                                                         const Vec (&scale)[4]) {
    scaler.take(x, scale);
  }

  // A byte of a short block holds neighbouring rows.
  static void take_short(typename Isa::Scaler& scaler, const Vec (&x)[4], const Vec (&scale)[4]) {
    Vec moved[2][4];
    as_whole(x, moved[0]);
    as_whole(scale, moved[1]);
    scaler.take(moved[0], moved[1]);
  }

  static void as_whole(const Vec (&rows)[4], Vec (&to)[4]) {
    alignas(64) float in_order[kBlock], moved[kBlock];
    for (int v = 0; v < 4; ++v) Isa::store(in_order + v * kLanes, rows[v]);
    for (int i = 0; i < kBlock; ++i) moved[i % 2 * (kBlock / 2) + i / 2] = in_order[i];
    for (int v = 0; v < 4; ++v) to[v] = Isa::load(moved + v * kLanes);
  }

  // totals[row][column] += the sums of the lanes of acc, in the unit of the row.
  template <int Rows>
  static inline __attribute__((always_inline)) void add_up(const Sum (&acc)[Rows][kColumns], const Unit* unit,
                                                           float* totals, int32_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) Isa::add_up(acc[r], unit[r], totals + r * stride);
  }

  template <int Rows>
  static inline __attribute__((always_inline)) void clear(Sum (&acc)[Rows][kColumns]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) acc[r][c] = Isa::no_sum();
    }
  }

  // Columns of W that few rows are multiplied with together: enough sums for an instruction not to wait for
  // the one before it.
  template <int Rows>
  static constexpr int kFusedColumns = Rows < kFusedRows ? 2 * kColumns : kColumns;

  // `Rows` rows times some columns, from `column` on, of the blocks of a task, expanded in registers.
  template <int Rows>
  __attribute__((noinline)) static void fused(const Problem& p, const Task& t, int64_t column,
                                              const Element* a, const Unit* unit, float* totals) {
    constexpr int kParts = kFusedColumns<Rows> / kColumns;
    Sum acc[kParts][Rows][kColumns];
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) clear<Rows>(acc[i]);
    // Inlined, or GCC 12 keeps the sums in memory.
    const auto add = [&](const uint8_t* bytes, int64_t column_bytes, const auto& expand)
                         __attribute__((always_inline)) {
      bytes += column * column_bytes;
      prefetch<kFusedColumns<Rows>>(bytes);
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c, bytes += column_bytes) {
          Operand w[kVectors];
          expand(bytes, w);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
              Isa::dot(acc[i][r][c], Isa::load_operand(a + (v * kRows + r) * kElements), w[v]);
            }
          }
        }
      }
      a += kVectors * kRows * kElements;
    };
    for_each_block(p, t, add);
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) add_up<Rows>(acc[i], unit, totals + i * kColumns, p.block_columns);
  }

  // Calls body(bytes of column 0, bytes of a column, expander) for the blocks of a task.
  template <class Body>
  static inline __attribute__((always_inline)) void for_each_block(const Problem& p, const Task& t,
                                                                   const Body& body) {
    const typename Isa::ColumnExpander expand(true, kBlock / 2);
    const int64_t block_bytes = p.padded_k / 2 * kBlock;
    const uint8_t* bytes = p.qdata + t.step * block_bytes;
    const int64_t whole = p.padded_n / kBlock;
    const int64_t end = whole < t.step_end ? whole : t.step_end;
    for (int64_t s = t.step; s < end; ++s, bytes += block_bytes) body(bytes, int64_t{kBlock / 2}, expand);
    if (end < t.step_end) {
      const int32_t column_bytes = static_cast<int32_t>(p.padded_n % kBlock) / 2;
      body(bytes, int64_t{column_bytes}, typename Isa::ColumnExpander(false, column_bytes));
    }
  }

  // Of each of the blocks of a chunk: as many bytes as a first-level cache has room for.
  template <int Columns>
  static inline __attribute__((always_inline)) void prefetch(const uint8_t* bytes) {
    constexpr int kAhead = 512;
    for (int at = 0; at < Columns * kBlock / 2; at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes) + kAhead + at, _MM_HINT_T1);
    }
  }

  // kColumns columns of the blocks of a task: [block][vector][column].
  static void expand_columns(const Problem& p, const Task& t, int64_t column, Operand* panel) {
    for_each_block(p, t, [&](const uint8_t* bytes, int64_t column_bytes, const auto& expand) {
      bytes += column * column_bytes;
      prefetch<kColumns>(bytes);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c, bytes += column_bytes) {
        Operand w[kVectors];
        expand(bytes, w);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) panel[v * kColumns + c] = w[v];
      }
      panel += kVectors * kColumns;
    });
  }

  template <int Rows>
  __attribute__((noinline)) static void multiply_tile(const Operand* panel, int64_t vectors,
                                                      const Element* a, const Unit* unit, float* totals,
                                                      int32_t stride) {
    Sum acc[Rows][kColumns];
    clear<Rows>(acc);
    for (int64_t i = 0; i < vectors; ++i, panel += kColumns, a += kRows * kElements) {
      Operand w[kColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) w[c] = panel[c];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Operand x = Isa::load_operand(a + r * kElements);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) Isa::dot(acc[r][c], x, w[c]);
      }
    }
    add_up<Rows>(acc, unit, totals, stride);
  }

  // Calls body(tile, first row, rows) for runs of at most `most` rows, as equal as can be.
  template <class Body>
  static void for_each_tile(int64_t rows, int most, const Body& body) {
    const int64_t tiles = (rows + most - 1) / most;
    for (int64_t i = 0; i < tiles; ++i) body(i, rows * i / tiles, rows * (i + 1) / tiles - rows * i / tiles);
  }

  // Fills tiles of at most `most` rows, and totals with the sums of x * zero.
  static void scale_rows(const Problem& p, const Task& t, int most, Scaled& scaled, float* totals) {
    TaskQParams q;
    take_qparams(p, t, q);
    for_each_tile(t.row_end - t.row, most, [&](int64_t tile, int64_t first, int64_t count) {
      for (int64_t r = 0; r < count; ++r) {
        const float zero = scale_row(p, t, t.row + first + r, q, scaled.a[tile] + r * kElements,
                                     scaled.unit[first + r]);
        for (int32_t c = 0; c < p.block_columns; ++c) *totals++ = zero;
      }
    });
  }

  static void multiply(const Problem& p, const Task& t, float* totals) {
    const int64_t rows = t.row_end - t.row;
    const int32_t columns = p.block_columns;
    const int64_t first_column = t.block * columns;
    const bool few = rows <= Isa::kMostFused;
    alignas(64) Scaled scaled;
    scale_rows(p, t, few ? kFusedRows : kRows, scaled, totals);
    if (few) {
      constexpr int32_t kTogether = 2 * kColumns;
      for (int32_t c = 0; c < columns; c += kTogether) {
        for_each_tile(rows, kFusedRows, [&](int64_t tile, int64_t first, int64_t count) {
          with_rows<kFusedRows>(count, [&]<int Rows>() {
            for (int32_t i = 0; i < kTogether; i += kFusedColumns<Rows>) {
              fused<Rows>(p, t, first_column + c + i, scaled.a[tile], scaled.unit + first,
                          totals + first * columns + c + i);
            }
          });
        });
      }
      return;
    }
    const int64_t vectors = (t.step_end - t.step) * kVectors;
    alignas(64) Operand panel[kChunk / kElements * kColumns];
    for (int32_t c = 0; c < columns; c += kColumns) {
      expand_columns(p, t, first_column + c, panel);
      for_each_tile(rows, kRows, [&](int64_t tile, int64_t first, int64_t count) {
        with_rows<kRows>(count, [&]<int Rows>() {
          multiply_tile<Rows>(panel, vectors, scaled.a[tile], scaled.unit + first,
                              totals + first * columns + c, columns);
        });
      });
    }
  }

  // Of a row of x in the chunk that begins with a step.
  static float& largest_x(const Problem& p, int64_t step, int64_t row) {
    return static_cast<float*>(p.records)[step * p.packed_rows + row];
  }

  // Nothing is packed before the tasks: `a` depends on the group.
  static void find_factors(const Problem& p, int64_t row, int64_t row_end) {
    for (; row < row_end; ++row) {
      uint32_t most = 0;
      for (int64_t s = 0; s < p.steps;) {
        uint32_t most_of_chunk = 0;
        const int64_t first = s, end = s + p.chunk_steps < p.steps ? s + p.chunk_steps : p.steps;
        for (; s < end; ++s) {
          alignas(64) float x[kBlock];
          const uint32_t bits = Base::load_x(p, row, s * p.step, 1.0F, x);
          most_of_chunk = bits > most_of_chunk ? bits : most_of_chunk;
        }
        largest_x(p, first, row) = from_bits(most_of_chunk);
        most = most_of_chunk > most ? most_of_chunk : most;
      }
      p.row_factor[row] = row_factor_for(from_bits(most));
    }
  }

  static void store(const Problem& p, const Task& t, const float* totals) {
    constexpr int kTogether = 32;  // the fewest columns of a block
    const int64_t first = t.block * p.block_columns;
    const int64_t left = p.k - first;
    for (int64_t row = t.row; row < t.row_end; ++row, totals += p.block_columns) {
      const Vec back = Isa::splat(1.0F / p.row_factor[row]);
      for (int64_t c = 0; c < p.block_columns && c < left; c += kTogether) {
        alignas(64) float y[kTogether];
        for (int i = 0; i < kTogether; i += kLanes) {
          Isa::store(y + i, Isa::multiply(Isa::load(totals + c + i), back));
        }
        const int64_t at = row * p.k + first + c;
        if (left - c >= kTogether) {
          Base::template store_some<kTogether>(p, at, y, kTogether);
        } else {
          Base::template store_some<kTogether>(p, at, y, left - c);
        }
      }
    }
  }
};

// Whether the totals of a task and of a chunk, one after the other, fit where the driver has them.
template <class Isa>
constexpr bool totals_fit() {
  return 2 * Isa::kTaskRows * int4cpu::kMaxBlockColumns <= int4cpu::kMaxTaskRows * int4cpu::kMaxBlockRows;
}

template <class Isa>
constexpr int4cpu::Kernel transposed_kernel(const char* name, int64_t (*spin)(int64_t)) {
  using Here = Transposed<Isa>;
  static_assert(totals_fit<Isa>());
  return {
      .name = name,
      .transposed = true,
      .block_rows = Here::kBlock,
      .max_step = int4cpu::kMaxBlockColumns,
      .element_bytes = 0,
      .record_bytes = sizeof(float),
      .row_multiple = 1,
      .task_rows = Isa::kTaskRows,
      .tile_rows = Here::kRows,
      .chunk_columns = Here::kChunk,
      .least_rows = 1,
      .pack_rows = &Here::find_factors,
      .multiply = &Here::multiply,
      .store = &Here::store,
      .spin = spin,
  };
}

}  // namespace
