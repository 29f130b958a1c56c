// 16-bit products with AVX-512 F and BW, with and without VNNI.
#include "int16_512.h"

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

  template <bool Whole>
  class Expander {
   public:
    explicit Expander(int column_bytes) : column_bytes_(column_bytes) {
      valid_ = Whole ? ~0U : (1U << column_bytes) - 1;
      alignas(64) uint8_t order[64];
      for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(i % 16 / 4 + i % 4 * 4);
      order_ = _mm512_load_si512(order);
      quads_ = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    }

    void operator()(const uint8_t* bytes, __m512i (&w)[4]) const {
      __m512i raw;
      if constexpr (Whole) {
        raw = _mm512_loadu_si512(bytes);
      } else {
        raw = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(valid_, bytes));
        raw = _mm512_inserti64x4(raw, _mm256_maskz_loadu_epi8(valid_, bytes + column_bytes_), 1);
      }
      split_bytes(_mm512_shuffle_epi8(_mm512_permutexvar_epi64(quads_, raw), order_), w);
    }

   private:
    __m512i order_, quads_;
    uint32_t valid_;
    int column_bytes_;
  };
};

struct WithoutVnni : Runs512, Madd512 {};
struct WithVnni : Runs512, Vnni512 {};

}  // namespace

const int4cpu::Kernel int4cpu::kInt16Avx512 = int16_kernel<WithoutVnni>("int16_avx512");
const int4cpu::Kernel int4cpu::kInt16Avx512Vnni = int16_kernel<WithVnni>("int16_avx512_vnni");
