// Products in bfloat16, two columns an instruction; needs AVX512_VBMI and AVX512_BF16.
#pragma once

#include "vec512.h"

namespace {

// code - 8 by the low 4 bits of a code, twice, because `vpermw` looks up 5.
inline __m512i code_table() {
  alignas(64) uint16_t table[32];
  for (int code = 0; code < 32; ++code) {
    const float value = static_cast<float>((code & 15) - 8);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    table[code] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(table);
}

// Two columns of a block at a time: lane i of a vector is the pair (column k, column k + 1) of one row.
//
// `vpermb` brings a byte of the first half of the rows into the low, one of the second half into the
// high byte of every 16 bits. `vpermw` looks a 16-bit value up by the low 5 bits of an index; the fifth
// bit belongs to a neighbouring code, so the table of 16 values is there twice and nothing is masked.
class Bf16Expander {
 public:
  Bf16Expander(bool whole, int column_bytes) {
    (void)whole;
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 32; ++i) {
      order[2 * i] = static_cast<uint8_t>((i & 1) * column_bytes + i / 2);
      order[2 * i + 1] = static_cast<uint8_t>(order[2 * i] + 16);
    }
    order_ = _mm512_load_si512(order);
    table_ = code_table();
    valid_ = column_bytes == 32 ? ~UINT64_C(0) : (UINT64_C(1) << (2 * column_bytes)) - 1;
  }

  void operator()(const uint8_t* bytes, __m512i (&w)[4]) const {
    const __m512i raw = _mm512_maskz_loadu_epi8(valid_, bytes);
    const __m512i codes = _mm512_permutexvar_epi8(order_, raw);
    w[0] = _mm512_permutexvar_epi16(codes, table_);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table_);
    w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table_);
    w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table_);
  }

 private:
  __m512i order_, table_;
  __mmask64 valid_;
};

struct Bf16 : InOrder512 {
  using Operand = __m512i;
  using Element = uint16_t;
  using Expander = Bf16Expander;
  static constexpr int kDepth = 2;
  static constexpr int kMaxStep = 128;
  static constexpr int kTileRows = 6;

  static Operand broadcast(const Element* x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Vec dot(Vec sum, Operand x, Operand w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }

  // Returns what was stored, so that sums of x are those of the rounded values.
  static Vec pack(Vec value, Element* to) {
    const __m256i bits = bfloat16_bits(value);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

// One column of a block: 32 rows in a vector, in the order of memory.
class ColumnExpander512 {
 public:
  ColumnExpander512(bool, int column_bytes) : table_(code_table()) {
    valid_ = column_bytes == 32 ? ~0U : (1U << column_bytes) - 1;
  }

  void operator()(const uint8_t* bytes, __m512i (&w)[2]) const {
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(valid_, bytes));
    w[0] = _mm512_permutexvar_epi16(codes, table_);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table_);
  }

 private:
  __m512i table_;
  __mmask32 valid_;
};

struct Bf16Transposed : Bf16 {
  using ColumnExpander = ColumnExpander512;
  static constexpr int kChunk = 2048;  // 4 KiB of a row, so that a first-level cache holds a tile
  static constexpr int kTaskRows = 96;  // of which `a` takes 384 KiB, for a second-level cache
  // A 4096 x 4096 weight, 2 threads of a Zen 5, columns in registers / in a panel, ms: M = 4 0.28 / 0.31,
  // M = 8 0.44 / 0.51, M = 12 0.62 / 0.65, M = 16 0.81 / 0.81.
  static constexpr int kFusedRows = 4;
  static constexpr int kMostFused = 16;
  static constexpr int kTileColumns = 4;

  using Sum = Vec;
  struct Unit {};
  static Sum no_sum() { return splat(0.0F); }
  static Operand load_operand(const Element* from) { return _mm512_loadu_si512(from); }
  static void dot(Sum& sum, Operand x, Operand w) { sum = Bf16::dot(sum, x, w); }
  static void add_up(const Sum (&acc)[kTileColumns], Unit, float* to) { add_lanes(acc, to); }

  class Scaler {
   public:
    Scaler(Element* to, int64_t stride, float) : to_(to), stride_(stride) {}
    void take(const Vec (&x)[4], const Vec (&scale)[4]) {
      for (int v = 0; v < 2; ++v, to_ += stride_) {
        const __m512bh rounded = _mm512_cvtne2ps_pbh(multiply(x[2 * v + 1], scale[2 * v + 1]),
                                                     multiply(x[2 * v], scale[2 * v]));
        _mm512_storeu_si512(to_, reinterpret_cast<__m512i>(rounded));
      }
    }
    Unit finish() const { return {}; }

   private:
    Element* to_;
    int64_t stride_;
  };
};

}  // namespace
