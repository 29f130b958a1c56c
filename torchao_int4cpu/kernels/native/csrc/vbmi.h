// Two columns of a block of 64 rows by one `vpermb`: rows in the order of memory.
#pragma once

#include "int16_512.h"

namespace {

struct Vbmi : Ints512, Vnni512 {
  static int nibble(int v, int) { return v >> 1; }
  static int byte(int v, int lane) { return (v & 1) * 16 + lane; }
  static Vec take(const float* block, int v) { return load(block + v * kLanes); }
  static void put(float* block, int v, Vec value) { store(block + v * kLanes, value); }

  template <bool Whole>
  class Expander {
   public:
    explicit Expander(int column_bytes) {
      valid_ = Whole ? ~UINT64_C(0) : (UINT64_C(1) << (2 * column_bytes)) - 1;
      alignas(64) uint8_t order[64];
      for (int i = 0; i < 64; ++i) {
        order[i] = static_cast<uint8_t>(i / 4 + i % 2 * 16 + i % 4 / 2 * column_bytes);
      }
      order_ = _mm512_load_si512(order);
    }

    void operator()(const uint8_t* bytes, __m512i (&w)[4]) const {
      const __m512i raw =
          Whole ? _mm512_loadu_si512(bytes) : _mm512_maskz_loadu_epi8(valid_, bytes);
      split_bytes(_mm512_permutexvar_epi8(order_, raw), w);
    }

   private:
    __m512i order_;
    uint64_t valid_;
  };
};

}  // namespace
