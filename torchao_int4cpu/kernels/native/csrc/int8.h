// Products of many rows in integers, with x as 8-bit fixed point, for those who ask for it: half the work of
// 16 bits, for an error of 6e-3. The same bits on every instruction set, for every number of rows and threads.
//
// In a group of columns x = unit * q, and sums of code * q are exact in 32 bits: they begin at -8 times the sum
// of q. Scale and zero meet them as in int16.h; what becomes of outliers says `Fixed8`.
#pragma once

#include "fixed_point.h"

namespace {

// `Isa::QuadExpander` turns four columns of a block into four vectors, one byte a column in the 32 bits of a
// row, and `Isa::dot_bytes` adds the products of such a vector with four numbers of x.
template <class Isa>
struct Int8 : Packing<Isa, Fixed8> {
  using Base = Packing<Isa, Fixed8>;
  using typename Base::QParams;
  using Base::block_at, Base::prefetch_qparams, Base::packed_row, Base::groups;
  using Base::kLanes, Base::kBlock, Base::kMaxStep;
  using Vec = typename Isa::Vec;
  using Ints = typename Isa::Ints;

  // total += scale * (unit * sums + products of outliers) + zero * (sum of x), of one row and group.
  static inline __attribute__((always_inline)) void apply(const Ints* panel, const QParams& qp,
                                                          const Group& group, const Ints (&sums)[4],
                                                          float* totals) {
    const Vec unit = Isa::splat(group.unit), sum = Isa::splat(group.total);
    Vec f[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) f[v] = Isa::multiply(Isa::to_float(sums[v]), unit);
    for (int32_t i = 0; i < group.count; ++i) {
      const Vec value = Isa::splat(group.value[i]), eight = Isa::splat(-8.0F * group.value[i]);
      const Ints* quad = panel + group.column[i] / 4 * 4;
      const Ints byte = Isa::splat_int(static_cast<int32_t>(0x80808000 + group.column[i] % 4));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec codes = Isa::to_float(Isa::bytes_of(quad[v], byte));
        f[v] = Isa::add(f[v], Isa::fma(value, codes, eight));
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vec total = Isa::fma(qp.scale[v], f[v], Isa::load(totals + v * kLanes));
      Isa::store(totals + v * kLanes, Isa::fma(qp.zero[v], sum, total));
    }
  }

  // `Rows` rows times a group of a block.
  template <int Rows>
  __attribute__((noinline)) static void tile(const Problem& p, const Ints* panel, const QParams& qp,
                                             int64_t s, int64_t row, float* totals) {
    const int8_t* x = packed_row(p, s, row);
    const Group* group = groups(p, s) + row;
    Base::prefetch(totals, Rows * kBlock * sizeof(float));
    Base::prefetch(x + Rows * p.step, Rows * p.step);
    Ints acc[Rows][4];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] = Isa::splat_int(group[r].start);
    }
    const Ints* w = panel;
    for (int32_t k = 0; k < p.step; k += 4, w += 4) {
      const Ints quad[4] = {w[0], w[1], w[2], w[3]};
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        memcpy(&four, x + r * p.step + k, sizeof four);
        const Ints broadcast = Isa::splat_int(four);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) Isa::dot_bytes(acc[r][v], quad[v], broadcast);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) apply(panel, qp, group[r], acc[r], totals + r * kBlock);
  }

  template <bool Whole>
  static void expand_group(const Problem& p, const Block& block, int64_t s, Ints* panel) {
    const typename Isa::template QuadExpander<Whole> expand(block.column_bytes);
    const uint8_t* bytes = block.bytes + s * p.step * block.column_bytes;
    for (int32_t k = 0; k < p.step; k += 4, panel += 4, bytes += 4 * block.column_bytes) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes) + kPanelPrefetch, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(bytes) + kPanelPrefetch + 64, _MM_HINT_T0);
      Ints w[4];
      expand(bytes, w);
      for (int v = 0; v < 4; ++v) panel[v] = w[v];
    }
  }

  static void multiply(const Problem& p, const Task& t, float* totals) {
    const Block block = block_at(p, t.block);
    memset(totals, 0, sizeof(float) * (t.row_end - t.row) * kBlock);
    alignas(64) Ints panel[kMaxStep];
    for (int64_t s = t.step; s < t.step_end; ++s) {
      prefetch_qparams(p, block, s);
      if (block.whole) {
        expand_group<true>(p, block, s, panel);
      } else {
        expand_group<false>(p, block, s, panel);
      }
      const QParams qp = Base::qparams(p, block, s);
      for (int64_t row = t.row; row < t.row_end; row += Isa::kRows) {
        with_rows<Isa::kRows>(t.row_end - row, [&]<int Rows>() {
          tile<Rows>(p, panel, qp, s, row, totals + (row - t.row) * kBlock);
        });
      }
    }
  }
};

// Up to 16 rows have the same bits whatever was asked for, and gain nothing: memory takes the time.
constexpr int32_t kInt8LeastRows = 17;

template <class Isa>
constexpr int4cpu::Kernel int8_kernel(const char* name) {
  using Here = Int8<Isa>;
  return {
      .name = name,
      .block_rows = Here::kBlock,
      .max_step = Here::kMaxStep,
      .element_bytes = 1,
      .record_bytes = sizeof(Group),
      .row_multiple = 1,
      .task_rows = int4cpu::kChunkedTaskRows,
      .tile_rows = Isa::kRows,
      .chunk_columns = int4cpu::kChunkColumns,
      .least_rows = kInt8LeastRows,
      .pack_rows = &Here::template pack_rows<&Here::place>,
      .multiply = &Here::multiply,
      .store = &Here::store,
      .spin = &spin_integers<Isa, &Isa::dot_bytes, 4>,
  };
}

}  // namespace
