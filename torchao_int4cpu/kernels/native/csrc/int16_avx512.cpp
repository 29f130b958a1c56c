// 16-bit products with AVX-512 F and BW, with and without VNNI, from either side; 8-bit ones with it.
#include "int16_512.h"
#include "int8.h"
#include "transposed_int16.h"

namespace {

// Without VBMI no instruction moves single bytes between quarters of a vector: quads of both columns come
// together first, so each vector holds rows in runs of 4.
struct Runs512 : Ints512 {
  static int nibble(int v, int) { return v >> 1; }
  static int byte(int v, int lane) { return lane / 4 * 8 + (v & 1) * 4 + lane % 4; }
  static Vec take(const float* block, int v) {
    const float* from = block + (v >> 1) * 32 + (v & 1) * 4;
    __m512 value = _mm512_castps128_ps512(_mm_loadu_ps(from));
    value = _mm512_insertf32x4(value, _mm_loadu_ps(from + 8), 1);
    value = _mm512_insertf32x4(value, _mm_loadu_ps(from + 16), 2);
    return _mm512_insertf32x4(value, _mm_loadu_ps(from + 24), 3);
  }
  static void put(float* block, int v, Vec value) {
    float* to = block + (v >> 1) * 32 + (v & 1) * 4;
    _mm_storeu_ps(to, _mm512_castps512_ps128(value));
    _mm_storeu_ps(to + 8, _mm512_extractf32x4_ps(value, 1));
    _mm_storeu_ps(to + 16, _mm512_extractf32x4_ps(value, 2));
    _mm_storeu_ps(to + 24, _mm512_extractf32x4_ps(value, 3));
  }

  // Two columns of a block: a quarter of the vector holds the same 8 bytes of both.
  template <bool Whole>
  class Load {
   public:
    explicit Load(int column_bytes) : column_bytes_(column_bytes) {
      valid_ = Whole ? ~0U : (1U << column_bytes) - 1;
      quads_ = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    }

    __m512i operator()(const uint8_t* bytes) const {
      __m512i raw;
      if constexpr (Whole) {
        raw = _mm512_loadu_si512(bytes);
      } else {
        raw = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(valid_, bytes));
        raw = _mm512_inserti64x4(raw, _mm256_maskz_loadu_epi8(valid_, bytes + column_bytes_), 1);
      }
      return _mm512_permutexvar_epi64(quads_, raw);
    }

   private:
    __m512i quads_;
    uint32_t valid_;
    int column_bytes_;
  };

  template <bool Whole>
  class Expander {
   public:
    explicit Expander(int column_bytes) : load_(column_bytes) {
      alignas(64) uint8_t order[64];
      for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(i % 16 / 4 + i % 4 * 4);
      order_ = _mm512_load_si512(order);
    }

    void operator()(const uint8_t* bytes, __m512i (&w)[4]) const {
      split_bytes(_mm512_shuffle_epi8(load_(bytes), order_), w);
    }

   private:
    Load<Whole> load_;
    __m512i order_;
  };
};

struct WithoutVnni : Runs512, Madd512 {};
struct WithVnni : Runs512, Vnni512 {
  template <bool Whole>
  class QuadExpander {
   public:
    explicit QuadExpander(int column_bytes) : load_(column_bytes), column_bytes_(column_bytes) {
      alignas(64) uint8_t order[64];
      for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(i % 16 / 2 + i % 2 * 8);
      order_ = _mm512_load_si512(order);
    }

    void operator()(const uint8_t* bytes, __m512i (&w)[4]) const {
      const __m512i first = _mm512_shuffle_epi8(load_(bytes), order_);
      const __m512i second = _mm512_shuffle_epi8(load_(bytes + 2 * column_bytes_), order_);
      const __m512i even = _mm512_unpacklo_epi16(first, second), odd = _mm512_unpackhi_epi16(first, second);
      const __m512i low = _mm512_set1_epi8(15);
      w[0] = _mm512_and_si512(even, low);
      w[1] = _mm512_and_si512(odd, low);
      w[2] = _mm512_and_si512(_mm512_srli_epi16(even, 4), low);
      w[3] = _mm512_and_si512(_mm512_srli_epi16(odd, 4), low);
    }

   private:
    Load<Whole> load_;
    __m512i order_;
    int column_bytes_;
  };

  static void dot_bytes(__m512i& sum, __m512i codes, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  }
};

// Products from the other side.
template <class Dot>
struct Columns512 : Dot {
  static constexpr int kTileRows = 6;
  static constexpr int kTileColumns = 4;
  // A 4096 x 4096 weight, 2 threads of a Zen 5, columns in registers / in a panel, ms: M = 8 0.41 / 0.54,
  // M = 16 0.81 / 0.79; without VNNI 0.54 / 0.60 and 1.01 / 0.88.
  static constexpr int kFusedRows = 4;
  static constexpr int kMostFused = 8;

  // One column of a block: the low nibbles, then the high ones.
  class ColumnExpander {
   public:
    ColumnExpander(bool, int column_bytes) {
      valid_ = column_bytes == 32 ? ~0U : (1U << column_bytes) - 1;
    }

    void operator()(const uint8_t* bytes, __m512i (&w)[2]) const {
      const __m512i codes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(valid_, bytes));
      w[0] = _mm512_and_si512(codes, _mm512_set1_epi16(15));
      w[1] = _mm512_srli_epi16(codes, 4);
    }

   private:
    __mmask32 valid_;
  };

  static __m512i load_operand(const int16_t* from) { return _mm512_loadu_si512(from); }
  static void store_operand(void* to, __m512i value) { _mm512_storeu_si512(to, value); }
  static __m512i to_words(__m512 first, __m512 second) {
    const __m256i low = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(first));
    const __m256i high = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(second));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  // to[i] += unit * (start + the sum of the lanes of acc[i]).
  static inline __attribute__((always_inline)) void add_columns(const __m512i (&acc)[4], int32_t start,
                                                                float unit, float* to) {
    const __m512i ab =
        _mm512_add_epi32(_mm512_unpacklo_epi32(acc[0], acc[1]), _mm512_unpackhi_epi32(acc[0], acc[1]));
    const __m512i cd =
        _mm512_add_epi32(_mm512_unpacklo_epi32(acc[2], acc[3]), _mm512_unpackhi_epi32(acc[2], acc[3]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    sums = _mm_add_epi32(sums, _mm_set1_epi32(start));
    _mm_storeu_ps(to, _mm_fmadd_ps(_mm_cvtepi32_ps(sums), _mm_set1_ps(unit), _mm_loadu_ps(to)));
  }
};

}  // namespace

const int4cpu::Kernel int4cpu::kInt16Avx512 = int16_kernel<WithoutVnni>("int16_avx512");
const int4cpu::Kernel int4cpu::kInt16Avx512Vnni = int16_kernel<WithVnni>("int16_avx512_vnni");
const int4cpu::Kernel int4cpu::kDynamicAvx512Vnni = int8_kernel<WithVnni>("dynamic_avx512_vnni");
const int4cpu::Kernel int4cpu::kTransposedAvx512 =
    transposed_int16_kernel<Columns512<WithoutVnni>>("transposed_avx512");
const int4cpu::Kernel int4cpu::kTransposedAvx512Vnni =
    transposed_int16_kernel<Columns512<WithVnni>>("transposed_avx512_vnni");
