// Activations as fixed-point numbers: in a group of columns x = unit * q, so that products are of integers.
//
// x is rounded by at most half a unit. An outlier, much larger than the mean of the other numbers that are
// not 0, would leave these with few bits: up to kOutliers of a group are left out of q and added in float32.
#pragma once

#include "blocks.h"

namespace {

constexpr int kOutliers = 4;
constexpr int kMostInGroup = 256;

// A row of x in one group.
struct Group {
  float unit;
  float total;    // sum of x as it is multiplied
  int32_t start;  // -8 and -136 times the sum of q, where sums of code * q and byte * q begin
  int32_t start_of_bytes;
  int32_t count;  // of outliers
  int32_t column[kOutliers];
  float value[kOutliers];
};

// 16 bits, the unit a power of two and |q| <= 32639, so that q splits into two signed bytes as well. What is
// rounded is at most 64 times the mean, and the rounding at most 1/510 of it, about that of bfloat16. A row
// with more outliers is left to the float32 kernel.
struct Fixed16 {
  using Value = int16_t;
  static constexpr float kOutlierRatio = 64.0F;
  static constexpr float kRoundedUp = 0.0F;  // by which a magnitude may be larger than it was
  static constexpr bool kLeavesRows = true;

  static float unit(uint32_t largest) {
    int32_t exponent = static_cast<int32_t>(largest >> 23) - 127;
    exponent = exponent < -112 ? -112 : exponent;  // so that the unit is a normal number
    uint32_t bits = static_cast<uint32_t>(exponent - 14 + 127) << 23;
    if (from_bits(largest) / from_bits(bits) > 32639.0F) bits += 1U << 23;
    return from_bits(bits);
  }
};

// 8 bits, |q| <= 127: an error of 6.5e-3 for normal numbers in groups of 128. More than kOutliers outliers are
// rounded with the others. The ratio weighs error against time, for normal numbers / SwiGLU's silu(a) * b / one
// column of 10 / of 50 times the others: 6: 6.5 6.0 5.1 1.4 e-3, 12: 6.5 10.1 8.0 1.7, 24: 6.5 12.9 14.4 3.3;
// and 99%, 34%, 1% of the groups of SwiGLU have outliers, which take time.
struct Fixed8 {
  using Value = int8_t;
  static constexpr float kOutlierRatio = 12.0F;
  static constexpr float kRoundedUp = 0.5F;
  static constexpr bool kLeavesRows = false;

  static float unit(uint32_t largest) {
    const float most = from_bits(largest);
    return (most < 0x1p-112F ? 0x1p-112F : most) / 127.0F;
  }
};

// Fills q and the group for `n` numbers of which `largest` is the largest magnitude; returns the sum of |q|.
template <class Fixed>
int32_t quantize(const float* x, int32_t n, uint32_t largest, typename Fixed::Value* q, Group& group) {
  group.unit = Fixed::unit(largest);
  const float inverse = 1.0F / group.unit;
  int32_t sum = 0, magnitudes = 0;
  for (int32_t i = 0; i < n; ++i) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
    const float shifted = x[i] * inverse + 0x1.8p23F;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    const int32_t value = bits - 0x4B400000;
    q[i] = static_cast<typename Fixed::Value>(value);
    sum += value;
    magnitudes += value < 0 ? -value : value;
  }
  group.start = -8 * sum;
  group.start_of_bytes = -136 * sum;
  group.total = static_cast<float>(sum) * group.unit;
  return magnitudes;
}

inline int32_t count_nonzero(const float* x, int32_t n) {
  int32_t count = 0;
  for (int32_t i = 0; i < n; ++i) count += x[i] != 0.0F;
  return count;
}

// Whether there can be outliers at all: |x| > ratio * mean of the others, for one of the first 5 in falling
// order, needs largest * (count + 5 * ratio - 5) > ratio * sum. The 5 more make up for the rounding of q.
template <class Fixed>
bool may_have_outliers(const float* x, int32_t n, uint32_t largest, int32_t magnitudes, float unit) {
  constexpr float kRatio = Fixed::kOutlierRatio;
  const float most = from_bits(largest) / unit;
  const float sum = static_cast<float>(magnitudes) - Fixed::kRoundedUp * static_cast<float>(n);
  return most * (static_cast<float>(n) + 5 * kRatio) > kRatio * sum &&  // seldom with dense x, so count later
         most * (static_cast<float>(count_nonzero(x, n)) + 5 * kRatio) > kRatio * sum;
}

// Where a number is, of those there are.
inline int32_t find(const uint32_t* bits, uint32_t number) {
  for (int32_t at = 0;; at += 16) {
    uint32_t found = 0;
    for (int32_t i = 0; i < 16; ++i) found |= static_cast<uint32_t>(bits[at + i] == number) << i;
    if (found != 0) return at + __builtin_ctz(found);
  }
}

// Moves the outliers of x to the group, and leaves zeros for them. False if they are too many.
template <class Fixed>
__attribute__((noinline)) bool take_outliers(float* x, int32_t n, Group& group) {
  uint32_t bits[kMostInGroup];
  double parts[8] = {};  // the same sums on every instruction set
  for (int32_t i = 0; i < n; i += 8) {
    for (int32_t j = 0; j < 8; ++j) {
      bits[i + j] = magnitude_bits(x[i + j]);
      parts[j] += from_bits(bits[i + j]);
    }
  }
  double rest = 0.0;
  for (const double part : parts) rest += part;
  const int32_t count = count_nonzero(x, n);
  int32_t largest[kOutliers + 1], taken = 0;
  for (int32_t c = 0; c <= kOutliers && c + 1 < count; ++c) {
    uint32_t most = 0;
    for (int32_t i = 0; i < n; ++i) most = bits[i] > most ? bits[i] : most;
    const int32_t at = find(bits, most);
    bits[at] = 0;
    largest[c] = at;
    const double value = from_bits(most);
    rest -= value;
    if (value * (count - c - 1) > Fixed::kOutlierRatio * rest) {
      taken = c + 1;
    } else if (value * (count - c - 1) <= Fixed::kOutlierRatio * (rest - (kOutliers - c) * value)) {
      break;  // nor will one of those after it be, none of which is larger
    }
  }
  if (taken > kOutliers) {
    if (Fixed::kLeavesRows) return false;
    taken = kOutliers;
  }
  for (; group.count < taken; ++group.count) {  // in the order of columns
    int32_t next = group.count;
    for (int32_t j = next + 1; j < taken; ++j) next = largest[j] < largest[next] ? j : next;
    const int32_t column = largest[next];
    largest[next] = largest[group.count];
    group.column[group.count] = column;
    group.value[group.count] = x[column];
    x[column] = 0.0F;
  }
  return true;
}

inline uint32_t largest_magnitude(const float* x, int32_t n) {
  uint32_t largest = 0;
  for (int32_t i = 0; i < n; ++i) {
    const uint32_t bits = magnitude_bits(x[i]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// False if the group has too many outliers.
template <class Fixed>
bool pack_group(float* x, int32_t n, uint32_t largest, typename Fixed::Value* q, Group& group) {
  group.count = 0;
  bool fits = true;
  const int32_t magnitudes = quantize<Fixed>(x, n, largest, q, group);
  if (may_have_outliers<Fixed>(x, n, largest, magnitudes, group.unit)) {
    fits = take_outliers<Fixed>(x, n, group);
    if (group.count > 0) quantize<Fixed>(x, n, largest_magnitude(x, n), q, group);
  }
  for (int32_t i = 0; i < group.count; ++i) group.total += group.value[i];
  return fits;
}

// A packed activation: q as [steps, packed_rows, step], a group of each step and row.
template <class Isa, class Fixed>
struct Packing : Blocks<Isa> {
  using Base = Blocks<Isa>;
  using Value = typename Fixed::Value;
  static constexpr int kMaxStep = kMostInGroup;

  static Value* packed_row(const Problem& p, int64_t step, int64_t row) {
    return static_cast<Value*>(p.packed_x) + (step * p.packed_rows + row) * p.step;
  }
  static Group* groups(const Problem& p, int64_t step) {
    return static_cast<Group*>(p.records) + step * p.packed_rows;
  }

  // Where q of a group is kept.
  using Place = void (*)(const Problem& p, int64_t step, int64_t row, const Value* q);

  static void place(const Problem& p, int64_t step, int64_t row, const Value* q) {
    memcpy(packed_row(p, step, row), q, sizeof(Value) * p.step);
  }

  // Returns the largest magnitude; `fits` becomes false if a group has too many outliers.
  template <Place Put>
  static float pack_row(const Problem& p, int64_t row, float factor, bool& fits) {
    alignas(64) float x[kMaxStep];
    alignas(64) Value q[kMaxStep] = {};
    uint32_t most = 0;
    for (int64_t s = 0; s < p.steps; ++s) {
      const uint32_t bits = Base::load_x(p, row, s * p.step, factor, x);
      most = bits > most ? bits : most;
      if (bits > magnitude_bits(kLargest)) {  // another factor is needed, or the row is not finite
        groups(p, s)[row] = {};
      } else {
        fits = pack_group<Fixed>(x, p.step, bits, q, groups(p, s)[row]) && fits;
      }
      Put(p, s, row, q);
    }
    return from_bits(most);
  }

  template <Place Put>
  static void pack_rows(const Problem& p, int64_t row, int64_t row_end) {
    for (; row < row_end; ++row) {
      if (row >= p.m) {
        const Value q[kMaxStep] = {};
        p.row_factor[row] = 1.0F;
        for (int64_t s = 0; s < p.steps; ++s) {
          groups(p, s)[row] = {};
          Put(p, s, row, q);
        }
        continue;
      }
      bool fits = true;
      const float factor = row_factor_for(pack_row<Put>(p, row, 1.0F, fits));
      if (factor != 0.0F && factor != 1.0F) {
        fits = true;
        pack_row<Put>(p, row, factor, fits);
      }
      p.row_factor[row] = fits ? factor : -factor;
    }
  }
};

// Multiplies in registers only: `Kernel::spin` of a dot product of `PerLane` numbers in 32 bits.
template <class Isa, void (*Dot)(typename Isa::Ints&, typename Isa::Ints, typename Isa::Ints), int PerLane>
int64_t spin_integers(int64_t rounds) {
  typename Isa::Ints x = Isa::splat_int(0x01230123);
  typename Isa::Ints acc[Isa::kRows][4];
#pragma GCC unroll 6
  for (int r = 0; r < Isa::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[r][v] = Isa::splat_int(0);
  }
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 6
    for (int r = 0; r < Isa::kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        __asm__ volatile("" : "+x"(x));  // or equal products are computed once
        Dot(acc[r][v], x, x);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Isa::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) __asm__ volatile("" ::"x"(acc[r][v]));
  }
  return INT64_C(2) * Isa::kRows * 4 * Isa::kLanes * PerLane;
}

}  // namespace
