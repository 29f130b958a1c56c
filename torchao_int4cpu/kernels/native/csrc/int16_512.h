// What the 16-bit kernels of 512 bits share: two columns of a block of 64 rows in one vector.
#pragma once

#include "int16.h"
#include "vec512.h"

namespace {

// The words of a vector are bytes of columns k and k + 1: of each pair, to the sums that `Int16` takes.
inline void split_bytes(__m512i bytes, __m512i (&w)[4]) {
  w[0] = _mm512_and_si512(bytes, _mm512_set1_epi16(0x000F));
  w[1] = _mm512_and_si512(bytes, _mm512_set1_epi16(0x00FF));
  w[2] = _mm512_srli_epi16(bytes, 8);
  w[3] = _mm512_srli_epi16(bytes, 12);
}

struct Ints512 : Vec512 {
  using Ints = __m512i;
  static constexpr int kRows = 6;

  static Ints splat_int(int32_t value) { return _mm512_set1_epi32(value); }
  static Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Ints times_16(Ints a) { return _mm512_slli_epi32(a, 4); }
  static Ints over_16(Ints a) { return _mm512_srai_epi32(a, 4); }
  // From the two bytes and nibbles of an expansion to four codes - 8.
  static void subtract_8(Ints (&w)[4]) {
    const __m512i eight = _mm512_set1_epi16(8), low = _mm512_set1_epi16(0x000F);
    const __m512i high = _mm512_srli_epi16(w[1], 4);
    w[0] = _mm512_sub_epi16(w[0], eight);
    w[1] = _mm512_sub_epi16(_mm512_and_si512(w[2], low), eight);
    w[2] = _mm512_sub_epi16(high, eight);
    w[3] = _mm512_sub_epi16(w[3], eight);
  }
  // Of each four bytes the one at `byte` % 4, as a number of 32 bits.
  static __m512i bytes_of(__m512i quad, __m512i byte) {
    const __m512i first = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
    return _mm512_shuffle_epi8(quad, _mm512_add_epi32(byte, first));
  }
  static Vec to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
};

// Assembly, because GCC 12 copies every accumulator of the intrinsics in a loop, which makes it spill.
struct Vnni512 {
  // Up to so many rows codes are expanded in registers, for every 6 rows anew. A 4096 x 4096 weight, 2
  // threads of a Zen 5, that against a panel in groups of 128 / 32: M = 24: 1.09 / 1.06, M = 48: 1.05 /
  // 1.00, M = 96: 1.03 / 0.96.
  static constexpr int kMostFused = 48;
  static void dot(__m512i& sum, __m512i w, __m512i x) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  }
};

struct Madd512 {
  // As above: M = 6: 1.11 / 1.16, M = 8: 1.00 / 1.04, M = 12: 0.96 / 0.99.
  static constexpr int kMostFused = 8;
  static void dot(__m512i& sum, __m512i w, __m512i x) {
    __asm__("vpaddd %1, %0, %0" : "+v"(sum) : "v"(_mm512_madd_epi16(w, x)));
  }
};

}  // namespace
