// Products in floating point, written once for every instruction set that a source defines as `Isa`.
//
// Codes are multiplied as code - 8, which every element type holds exactly, and summed in float32 over
// a step. Then total += scale * sum + zero * (sum of x), the same for every number of rows.
#pragma once

#include "blocks.h"

namespace {

template <class Isa>
struct Gemm : Blocks<Isa> {
  using Base = Blocks<Isa>;
  using typename Base::QParams;
  using Base::block_at, Base::group_of, Base::qparams, Base::prefetch_qparams, Base::prefetch;
  using Base::kLanes, Base::kBlock;
  using Vec = typename Isa::Vec;
  using Operand = typename Isa::Operand;  // expanded codes, or a broadcast of x
  using Element = typename Isa::Element;  // of the packed activation
  static constexpr int kDepth = Isa::kDepth;  // columns that one dot instruction consumes

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

  // Of the packed activation: [steps, packed_rows].
  static float* sums(const Problem& p) { return static_cast<float*>(p.records); }

  static const Element* packed_row(const Problem& p, int64_t step, int64_t row) {
    return static_cast<const Element*>(p.packed_x) + (step * p.packed_rows + row) * p.step;
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
    apply<Rows>(q, acc, sums(p) + step * p.packed_rows + row, totals);
  }

  static void expand_step(const Problem& p, const Block& block, int64_t step, Operand* panel) {
    const typename Isa::Expander expand(block.whole, block.column_bytes);
    const uint8_t* bytes = block.bytes + step * p.step * block.column_bytes;
    prefetch_qparams(p, block, group_of(p, step));
    for (int32_t k = 0; k < p.step; k += kDepth, panel += 4) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes) + kPanelPrefetch, _MM_HINT_T0);
      Operand w[4];
      expand(bytes, w);
      bytes += kDepth * block.column_bytes;
      for (int v = 0; v < 4; ++v) panel[v] = w[v];
    }
  }

  static void multiply(const Problem& p, const Task& t, float* totals) {
    const Block block = block_at(p, t.block);
    memset(totals, 0, sizeof(float) * (t.row_end - t.row) * kBlock);
    alignas(64) Operand panel[Isa::kMaxStep / kDepth * 4];
    for (int64_t s = t.step; s < t.step_end; ++s) {
      expand_step(p, block, s, panel);
      const QParams q = qparams(p, block, group_of(p, s));
      for (int64_t row = t.row; row < t.row_end; row += Isa::kTileRows) {
        with_rows<Isa::kTileRows>(t.row_end - row, [&]<int Rows>() {
          tile<Rows>(p, panel, q, s, row, totals + (row - t.row) * kBlock);
        });
      }
    }
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

  // Where a packed activation lies, and the sums of its steps: a row of a step together.
  struct ByRows {
    static Element* element(const Problem& p, int64_t step, int64_t row, int32_t k) {
      return const_cast<Element*>(packed_row(p, step, row)) + k;
    }
    static void put_sum(const Problem& p, int64_t step, int64_t row, float sum) {
      sums(p)[step * p.packed_rows + row] = sum;
    }
  };

  // One row of x to packed_x and sums, multiplied by `factor`; returns the largest magnitude.
  template <class Place>
  static float pack_row(const Problem& p, int64_t row, float factor) {
    const char* from = static_cast<const char*>(p.x) + row * p.x_stride * Base::size_of(p.dtype);
    Vec largest = Isa::splat(0.0F);
    int64_t s = 0;
    const auto pack_steps = [&](int64_t end, const auto& load, const auto& pack) {
      for (; s < end; ++s) {
        // 16 sums whatever the number of lanes, so that each instruction set gets the same.
        Vec sum[16 / kLanes];
        for (Vec& part : sum) part = Isa::splat(0.0F);
        for (int32_t k = 0; k < p.step; k += kLanes) {
          const Vec value = load(s * p.step + k);
          largest = Isa::larger_magnitude(largest, value);
          Vec& part = sum[k / kLanes % (16 / kLanes)];
          part = Isa::add(part, pack(value, s * p.step + k, Place::element(p, s, row, k)));
        }
        Place::put_sum(p, s, row, Isa::total(sum));
      }
    };
    const int64_t whole = factor == 1.0F ? p.x_columns / p.step : 0;
    const auto pack = [](Vec value, int64_t, Element* to) { return Isa::pack(value, to); };
    if (p.dtype == int4cpu::kBFloat16) {
      pack_steps(
          whole, [&](int64_t k) { return Isa::from_bfloat16(from + 2 * k); },
          [&](Vec value, int64_t k, Element* to) {
            if constexpr (sizeof(Element) == 2) {  // nothing to round
              memcpy(to, from + 2 * k, 2 * kLanes);
              return value;
            } else {
              return Isa::pack(value, to);
            }
          });
    } else if (p.dtype == int4cpu::kFloat32) {
      pack_steps(whole, [&](int64_t k) { return Isa::load(reinterpret_cast<const float*>(from) + k); }, pack);
    }
    const Vec by = Isa::splat(factor);
    pack_steps(
        p.steps, [&](int64_t k) { return Base::load_x(p, row, k); },
        [&](Vec value, int64_t, Element* to) { return Isa::pack(Isa::multiply(value, by), to); });
    return from_bits(Isa::largest_lane_bits(largest));
  }

  template <class Place>
  static void pack_rows(const Problem& p, int64_t row, int64_t row_end) {
    for (; row < row_end; ++row) {
      p.row_factor[row] = 1.0F;
      if (row >= p.m) {
        for (int64_t s = 0; s < p.steps; ++s) {
          for (int32_t k = 0; k < p.step; k += kLanes) {
            memset(Place::element(p, s, row, k), 0, sizeof(Element) * kLanes);
          }
          Place::put_sum(p, s, row, 0.0F);
        }
        continue;
      }
      const float factor = row_factor_for(pack_row<Place>(p, row, 1.0F));
      p.row_factor[row] = factor;
      if (factor != 0.0F && factor != 1.0F) pack_row<Place>(p, row, factor);
    }
  }
};

}  // namespace
