// Vectors of 16 floats, for every kernel that has at least AVX-512 F and BW.
#pragma once

#include <immintrin.h>
#include <string.h>

#include <cstdint>

namespace {

struct Vec512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;

  static Vec splat(float value) { return _mm512_set1_ps(value); }
  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // In an order that Vec256 can keep: halves are added, of the sum again, and so on.
  static float total(const Vec (&parts)[1]) {
    const __m512d both = _mm512_castps_pd(parts[0]);
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(parts[0]),
                                   _mm256_castpd_ps(_mm512_extractf64x4_pd(both, 1)));
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  // to[i] += the sum of the lanes of acc[i].
  static void add_lanes(const Vec (&acc)[4], float* to) {
    const Vec ab = add(_mm512_unpacklo_ps(acc[0], acc[1]), _mm512_unpackhi_ps(acc[0], acc[1]));
    const Vec cd = add(_mm512_unpacklo_ps(acc[2], acc[3]), _mm512_unpackhi_ps(acc[2], acc[3]));
    const __m512d even = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d odd = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const Vec all = add(_mm512_castpd_ps(even), _mm512_castpd_ps(odd));  // four sums of each, in each quarter
    const __m512d wide = _mm512_castps_pd(all);
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(all),
                                   _mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1)));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
  }

  // Pairs of bfloat16 to their low and high halves.
  static void split(Vec pairs, Vec& low, Vec& high) {
    const __m512i both = _mm512_castps_si512(pairs);
    low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(INT32_C(-65536))));
  }

  static void split_float16(Vec pairs, Vec& low, Vec& high) {
    const __m512i both = _mm512_castps_si512(pairs);
    low = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
    high = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
  }

  static Vec from_bfloat16(const void* from) {
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Vec from_float16(const void* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }

  // To nearest, ties to even. A NaN keeps its upper bits, made quiet.
  static __m256i bfloat16_bits(Vec value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static void to_bfloat16(const float* from, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bfloat16_bits(load(from)));
  }
  static void to_float16(const float* from, uint16_t* to) {
    const __m256i half = _mm512_cvtps_ph(load(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  }

  // As bits, so that NaN is larger than infinity and infinity than any number.
  static Vec larger_magnitude(Vec a, Vec b) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32(INT32_MAX));
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), bits));
  }
  static uint32_t largest_lane_bits(Vec a) { return _mm512_reduce_max_epu32(_mm512_castps_si512(a)); }
};

// Rows in the order of memory.
struct InOrder512 : Vec512 {
  // Vector 2 * nibble + half holds the rows of one half of a column's 32 bytes.
  static int nibble(int v, int) { return v >> 1; }
  static int byte(int v, int lane) { return (v & 1) * 16 + lane; }
  static Vec take(const float* block, int v) { return load(block + v * kLanes); }
  static void put(float* block, int v, Vec value) { store(block + v * kLanes, value); }
};

}  // namespace
