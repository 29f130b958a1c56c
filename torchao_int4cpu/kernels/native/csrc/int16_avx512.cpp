// 16-bit products with AVX-512 F and BW, with and without VNNI; 8-bit ones with it.
#include "int16_512.h"
#include "int8.h"

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

}  // namespace

const int4cpu::Kernel int4cpu::kInt16Avx512 = int16_kernel<WithoutVnni>("int16_avx512");
const int4cpu::Kernel int4cpu::kInt16Avx512Vnni = int16_kernel<WithVnni>("int16_avx512_vnni");
const int4cpu::Kernel int4cpu::kDynamicAvx512Vnni = int8_kernel<WithVnni>("dynamic_avx512_vnni");
