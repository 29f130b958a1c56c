// Vectors of 8 floats, for the kernels of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>
#include <string.h>

#include <cstdint>

namespace {

struct Vec256 {
  using Vec = __m256;
  static constexpr int kLanes = 8;

  static Vec splat(float value) { return _mm256_set1_ps(value); }
  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // Of 16 numbers, in the order of Vec512.
  static float total(const Vec (&parts)[2]) {
    const Vec a = add(parts[0], parts[1]);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  // to[i] += the sum of the lanes of acc[i].
  static void add_lanes(const Vec (&acc)[2], float* to) {
    const Vec ab = add(_mm256_unpacklo_ps(acc[0], acc[1]), _mm256_unpackhi_ps(acc[0], acc[1]));
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(ab), _mm256_extractf128_ps(ab, 1));
    const __m128 sums = _mm_add_ps(half, _mm_movehl_ps(half, half));
    const __m128 old = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(to)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_castps_si128(_mm_add_ps(old, sums)));
  }

  // Pairs of bfloat16 to their low and high halves.
  static void split(Vec pairs, Vec& low, Vec& high) {
    const __m256i both = _mm256_castps_si256(pairs);
    low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(INT32_C(-65536))));
  }

  static void split_float16(Vec pairs, Vec& low, Vec& high) {
    const __m256i both = _mm256_castps_si256(pairs);
    low = _mm256_cvtph_ps(low_words(_mm256_and_si256(both, _mm256_set1_epi32(0xFFFF))));
    high = _mm256_cvtph_ps(low_words(_mm256_srli_epi32(both, 16)));
  }

  // The low halves of numbers below 2^16.
  static __m128i low_words(__m256i values) {
    return _mm_packus_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  }

  static Vec from_bfloat16(const void* from) {
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Vec from_float16(const void* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  }

  // To nearest, ties to even. A NaN keeps its upper bits, made quiet.
  static void to_bfloat16(const float* from, uint16_t* to) {
    const Vec value = load(from);
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low_words(words));
  }
  static void to_float16(const float* from, uint16_t* to) {
    const __m128i half = _mm256_cvtps_ph(load(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
  }

  // As bits, so that NaN is larger than infinity and infinity than any number.
  static Vec larger_magnitude(Vec a, Vec b) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(INT32_MAX));
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), bits));
  }
  static uint32_t largest_lane_bits(Vec a) {
    const __m256i both = _mm256_castps_si256(a);
    __m128i bits = _mm_max_epu32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    bits = _mm_max_epu32(bits, _mm_unpackhi_epi64(bits, bits));
    bits = _mm_max_epu32(bits, _mm_shuffle_epi32(bits, 1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(bits));
  }
};

}  // namespace
