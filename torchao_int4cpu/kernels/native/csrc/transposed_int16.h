// Products from the other side in integers: `a` of transposed.h as 16-bit fixed point.
//
// A row of `a`, in a group of columns and a chunk of rows of W, has one unit, of which it is rounded by half at
// most: 2^-15 of the largest x times the largest scale. A large number leaves few bits to the others, as it
// leaves them little weight in the result, so none is kept apart. Sums of code * q, less 8 times the sum of q,
// are exact in 32 bits: 15 * 32639 * kChunk < 2^31.
#pragma once

#include "fixed_point.h"
#include "transposed.h"

namespace {

// `Isa::to_words` rounds 2 vectors of floats to a vector of 16-bit numbers in their order, `Isa::add_columns`
// gives the sums of the lanes of kTileColumns vectors as integers.
template <class Isa>
struct TransposedInt16 : Isa {
  using typename Isa::Ints, typename Isa::Vec;
  using Isa::kLanes;
  using Operand = Ints;
  using Sum = Ints;
  using Element = int16_t;
  static constexpr int kDepth = 2;
  static constexpr int kChunk = 2048;  // 4 KiB of a row, so that a first-level cache holds a tile
  static constexpr int kTaskRows = 96;  // of which `a` takes 384 KiB, for a second-level cache

  struct Unit {
    float unit;
    int32_t start;  // -8 times the sum of q
  };

  static Sum no_sum() { return Isa::splat_int(0); }
  static inline __attribute__((always_inline)) void add_up(const Sum (&acc)[Isa::kTileColumns],
                                                           Unit unit, float* to) {
    Isa::add_columns(acc, unit.start, unit.unit, to);
  }

  class Scaler {
   public:
    // `largest`: no |a| of the row is larger.
    Scaler(Element* to, int64_t stride, float largest) : to_(to), stride_(stride) {
      unit_ = Fixed16::unit(magnitude_bits(largest));
      inverse_ = Isa::splat(1.0F / unit_);
      // Integers have no infinity: a sum with one would look like any other.
      if (!(largest <= kLargestFinite)) unit_ = __builtin_nanf("");
    }

    void take(const Vec (&x)[4], const Vec (&scale)[4]) {
      Vec a[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) a[v] = Isa::multiply(Isa::multiply(x[v], inverse_), scale[v]);
#pragma GCC unroll 2
      for (int v = 0; v < 4; v += 2, to_ += stride_) {
        const Ints q = Isa::to_words(a[v], a[v + 1]);
        Isa::dot(sum_, q, Isa::splat_int(0x00010001));
        Isa::store_operand(to_, q);
      }
    }

    Unit finish() const {
      alignas(64) int32_t lanes[kLanes];
      Isa::store_operand(lanes, sum_);
      int32_t total = 0;
      for (const int32_t lane : lanes) total += lane;
      return {unit_, -8 * total};
    }

   private:
    Element* to_;
    const int64_t stride_;
    float unit_;
    Vec inverse_;
    Ints sum_ = Isa::splat_int(0);
  };
};

template <class Isa>
constexpr int4cpu::Kernel transposed_int16_kernel(const char* name) {
  return transposed_kernel<TransposedInt16<Isa>>(name, &spin_integers<Isa, &Isa::dot, 2>);
}

}  // namespace
