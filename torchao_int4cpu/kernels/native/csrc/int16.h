// Products in integers, with x as 16-bit fixed point. The same bits on every instruction set, for every
// number of rows and threads.
//
// In a group of columns x = unit * q, and sums of (code - 8) * q are exact in 32 bits. Then
//
//     total += scale * (unit * sum of (code - 8) q);  total += zero * (sum of x)
//
// in float32, each line one fused multiply-add, groups in their order. Of a byte b = 16 h + l of two codes
// one mask gives l, and 16 (sum of h q) = (sum of b q) - (sum of l q), exactly: 255 * 32639 * 256 < 2^31.
//
// What is rounded, and what becomes of outliers, says `Fixed16`.
#pragma once

#include "fixed_point.h"

namespace {

template <class Isa>
struct Int16 : Packing<Isa, Fixed16> {
  using Base = Packing<Isa, Fixed16>;
  using typename Base::QParams;
  using Base::block_at, Base::prefetch_qparams, Base::packed_row, Base::groups;
  using Base::kLanes, Base::kBlock, Base::kMaxStep;
  using Vec = typename Isa::Vec;
  using Ints = typename Isa::Ints;

  // Adds value * (code - 8) of the outliers to f.
  __attribute__((noinline)) static void add_outliers(const Block& block, const uint8_t* bytes,
                                                     const Group& group, Vec (&f)[4]) {
    for (int32_t i = 0; i < group.count; ++i) {
      const uint8_t* column = bytes + group.column[i] * block.column_bytes;
      for (int v = 0; v < 4; ++v) {
        alignas(64) float codes[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const int at = Isa::byte(v, lane);
          const int byte = at < block.column_bytes ? column[at] : 0;
          codes[lane] = static_cast<float>((Isa::nibble(v, lane) != 0 ? byte >> 4 : byte & 15) - 8);
        }
        f[v] = Isa::add(f[v], Isa::multiply(Isa::splat(group.value[i]), Isa::load(codes)));
      }
    }
  }

  // total += scale * unit * (sums of (code - 8) q) + zero * (sum of x), of one row and group.
  template <bool Outliers>
  static inline __attribute__((always_inline)) void apply(const Block& block, const uint8_t* bytes,
                                                          const QParams& qp, const Group& group,
                                                          const Ints (&sums)[4], float* totals) {
    const Vec unit = Isa::splat(group.unit), sum = Isa::splat(group.total);
    Vec f[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) f[v] = Isa::multiply(Isa::to_float(sums[v]), unit);
    if (Outliers && __builtin_expect(group.count != 0, 0)) {
      Vec copy[4] = {f[0], f[1], f[2], f[3]};  // so that f stays in registers
      add_outliers(block, bytes, group, copy);
      for (int v = 0; v < 4; ++v) f[v] = copy[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vec total = Isa::fma(qp.scale[v], f[v], Isa::load(totals + v * kLanes));
      Isa::store(totals + v * kLanes, Isa::fma(qp.zero[v], sum, total));
    }
  }

  // Where the sums of bytes and codes begin.
  template <int Rows>
  static inline __attribute__((always_inline)) void start(const Group* group, Ints (&acc)[Rows][4]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      acc[r][0] = acc[r][3] = Isa::splat_int(group[r].start);
      acc[r][1] = acc[r][2] = Isa::splat_int(group[r].start_of_bytes);
    }
  }

  // acc += w * x, of two columns.
  template <int Rows>
  static inline __attribute__((always_inline)) void dot(const Ints (&w)[4], const int16_t* x, int32_t x_stride,
                                                        Ints (&acc)[Rows][4]) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t both;
      memcpy(&both, x + r * x_stride, sizeof both);
      const Ints broadcast = Isa::splat_int(both);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) Isa::dot(acc[r][v], w[v], broadcast);
    }
  }

  // From these to those of codes - 8.
  template <int Rows>
  static inline __attribute__((always_inline)) void finish(const Block& block, const uint8_t* bytes,
                                                        const QParams& qp, const Group* group,
                                                        const Ints (&acc)[Rows][4], float* totals) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Ints sums[4] = {acc[r][0], Isa::subtract(acc[r][2], Isa::times_16(acc[r][3])),
                            Isa::over_16(Isa::subtract(acc[r][1], acc[r][0])), acc[r][3]};
      apply<true>(block, bytes, qp, group[r], sums, totals + r * kBlock);
    }
  }

  // Few rows: codes are expanded in registers. A task of a block times `Rows` of its rows from `row` on.
  // Each of `passes` over the bytes asks for its share of what comes next: memory has to work during all.
  template <int Rows, bool Whole>
  __attribute__((noinline)) static void fused(const Problem& p, const Task& t, const Block& block,
                                              int64_t row, int pass, int passes, float* totals) {
    const typename Isa::template Expander<Whole> expand(block.column_bytes);
    const int64_t step_bytes = p.step * block.column_bytes;
    const int64_t task_bytes = (t.step_end - t.step) * step_bytes;
    const uint8_t* bytes = block.bytes + t.step * step_bytes;
    const uint8_t* ahead = bytes + (passes == 1 ? kPrefetch : task_bytes + task_bytes / passes * pass);
    const int32_t share = 2 * block.column_bytes / passes;
    for (int64_t s = t.step; s < t.step_end; ++s) {
      const int16_t* x = packed_row(p, s, row);
      const Group* group = groups(p, s) + row;
      const uint8_t* const group_bytes = bytes;
      prefetch_qparams(p, block, s);
      Ints acc[Rows][4];
      start<Rows>(group, acc);
      for (int32_t k = 0; k < p.step; k += 2) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
        ahead += share;
        Ints w[4];
        expand(bytes, w);
        bytes += 2 * block.column_bytes;
        dot<Rows>(w, x + k, p.step, acc);
      }
      finish<Rows>(block, group_bytes, Base::template qparams<Whole>(p, block, s), group, acc, totals);
    }
  }

  // `Rows` rows times a panel: a group of a block as codes - 8, so nothing is left to do for their sums.
  template <int Rows, bool Outliers>
  __attribute__((noinline)) static void tile(const Problem& p, const Block& block, const uint8_t* bytes,
                                             const Ints* panel, const QParams& qp, int64_t s, int64_t row,
                                             float* totals) {
    const int16_t* x = packed_row(p, s, row);
    const Group* group = groups(p, s) + row;
    Base::prefetch(totals, Rows * kBlock * sizeof(float));
    Base::prefetch(x + Rows * p.step, Rows * p.step * sizeof(int16_t));
    Ints acc[Rows][4];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = Isa::splat_int(0);
    }
    for (int32_t k = 0; k < p.step; k += 2, panel += 4) {
      const Ints w[4] = {panel[0], panel[1], panel[2], panel[3]};
      dot<Rows>(w, x + k, p.step, acc);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      apply<Outliers>(block, bytes, qp, group[r], acc[r], totals + r * kBlock);
    }
  }

  // Calls body<Rows>(first) for runs of at most `kRows` rows, as equal as can be.
  template <class Body>
  static void for_each_tile(int64_t rows, const Body& body) {
    const int64_t tiles = (rows + Isa::kRows - 1) / Isa::kRows;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = rows * i / tiles;
      with_rows<Isa::kRows>(rows * (i + 1) / tiles - first,
                            [&]<int Rows>() { body.template operator()<Rows>(first); });
    }
  }

  template <bool Whole>
  static void multiply_few(const Problem& p, const Task& t, const Block& block, float* totals) {
    const int64_t rows = t.row_end - t.row;
    const int passes = static_cast<int>((rows + Isa::kRows - 1) / Isa::kRows);
    int pass = 0;
    for_each_tile(rows, [&]<int Rows>(int64_t first) {
      fused<Rows, Whole>(p, t, block, t.row + first, pass++, passes, totals + first * kBlock);
    });
  }

  template <bool Whole>
  static void expand_group(const Problem& p, const Block& block, const uint8_t* bytes, Ints* panel) {
    const typename Isa::template Expander<Whole> expand(block.column_bytes);
    for (int32_t k = 0; k < p.step; k += 2, panel += 4, bytes += 2 * block.column_bytes) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes) + kPanelPrefetch, _MM_HINT_T0);
      Ints w[4];
      expand(bytes, w);
      Isa::subtract_8(w);
      for (int v = 0; v < 4; ++v) panel[v] = w[v];
    }
  }

  template <bool Whole>
  static void multiply_many(const Problem& p, const Task& t, const Block& block, float* totals) {
    alignas(64) Ints panel[kMaxStep / 2 * 4];
    for (int64_t s = t.step; s < t.step_end; ++s) {
      const uint8_t* const bytes = block.bytes + s * p.step * block.column_bytes;
      prefetch_qparams(p, block, s);
      expand_group<Whole>(p, block, bytes, panel);
      const QParams qp = Base::template qparams<Whole>(p, block, s);
      for_each_tile(t.row_end - t.row, [&]<int Rows>(int64_t first) {
        const Group* group = groups(p, s) + t.row + first;
        int32_t outliers = 0;
        for (int r = 0; r < Rows; ++r) outliers |= group[r].count;
        const auto multiply_tile = outliers == 0 ? tile<Rows, false> : tile<Rows, true>;
        multiply_tile(p, block, bytes, panel, qp, s, t.row + first, totals + first * kBlock);
      });
    }
  }

  template <bool Whole>
  static void multiply_block(const Problem& p, const Task& t, const Block& block, float* totals) {
    if (t.row_end - t.row <= Isa::kMostFused) {
      multiply_few<Whole>(p, t, block, totals);
    } else {
      multiply_many<Whole>(p, t, block, totals);
    }
  }

  static void multiply(const Problem& p, const Task& t, float* totals) {
    const Block block = block_at(p, t.block);
    memset(totals, 0, sizeof(float) * (t.row_end - t.row) * kBlock);
    if (block.whole) {
      multiply_block<true>(p, t, block, totals);
    } else {
      multiply_block<false>(p, t, block, totals);
    }
  }
};

// The kernel of an instruction set.
template <class Isa>
constexpr int4cpu::Kernel int16_kernel(const char* name) {
  using Here = Int16<Isa>;
  return {
      .name = name,
      .block_rows = Here::kBlock,
      .max_step = Here::kMaxStep,
      .element_bytes = sizeof(int16_t),
      .record_bytes = sizeof(Group),
      .row_multiple = 1,
      .task_rows = int4cpu::kChunkedTaskRows,
      .tile_rows = Isa::kRows,
      .chunk_columns = int4cpu::kChunkColumns,
      .least_rows = 1,
      .pack_rows = &Here::template pack_rows<&Here::place>,
      .multiply = &Here::multiply,
      .store = &Here::store,
      .spin = &spin_integers<Isa, &Isa::dot, 2>,
  };
}

}  // namespace
