// 16-bit products with AVX2 on its layout, from either side, with and without AVX-VNNI; 8-bit ones with it.
#include "int16.h"
#include "int8.h"
#include "transposed_int16.h"
#include "vec256.h"

namespace {

struct Ints256 : Vec256 {
  using Ints = __m256i;
  static constexpr int kRows = 2;

  static Ints splat_int(int32_t value) { return _mm256_set1_epi32(value); }
  static Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Ints times_16(Ints a) { return _mm256_slli_epi32(a, 4); }
  static Ints over_16(Ints a) { return _mm256_srai_epi32(a, 4); }
  // From the two bytes and nibbles of an expansion to four codes - 8.
  static void subtract_8(Ints (&w)[4]) {
    const __m256i eight = _mm256_set1_epi16(8), low = _mm256_set1_epi16(0x000F);
    const __m256i high = _mm256_srli_epi16(w[1], 4);
    w[0] = _mm256_sub_epi16(w[0], eight);
    w[1] = _mm256_sub_epi16(_mm256_and_si256(w[2], low), eight);
    w[2] = _mm256_sub_epi16(high, eight);
    w[3] = _mm256_sub_epi16(w[3], eight);
  }
  static Vec to_float(Ints a) { return _mm256_cvtepi32_ps(a); }

  // A half of a vector holds 8 bytes of both columns, so rows lie in runs of 4.
  static int nibble(int v, int) { return v >> 1; }
  static int byte(int v, int lane) { return lane / 4 * 8 + (v & 1) * 4 + lane % 4; }
  static Vec take(const float* block, int v) {
    const float* from = block + (v >> 1) * 16 + (v & 1) * 4;
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 8), 1);
  }
  static void put(float* block, int v, Vec value) {
    float* to = block + (v >> 1) * 16 + (v & 1) * 4;
    _mm_storeu_ps(to, _mm256_castps256_ps128(value));
    _mm_storeu_ps(to + 8, _mm256_extractf128_ps(value, 1));
  }

  // Two columns of a block: a half of the vector holds the same 8 bytes of both.
  template <bool Whole>
  static __m256i load_columns(const uint8_t* bytes) {
    __m256i raw;
    if constexpr (Whole) {
      raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    } else {  // a short block is 16 rows, 8 bytes a column
      raw = _mm256_set_m128i(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8)),
                             _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    }
    return _mm256_permute4x64_epi64(raw, 0xD8);
  }

  template <bool Whole>
  class Expander {
   public:
    explicit Expander(int) {
      alignas(32) uint8_t order[32];
      for (int i = 0; i < 32; ++i) order[i] = static_cast<uint8_t>(i % 16 / 4 + i % 4 * 4);
      order_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(order));
    }

    void operator()(const uint8_t* bytes, __m256i (&w)[4]) const {
      const __m256i both = _mm256_shuffle_epi8(load_columns<Whole>(bytes), order_);
      w[0] = _mm256_and_si256(both, _mm256_set1_epi16(0x000F));
      w[1] = _mm256_and_si256(both, _mm256_set1_epi16(0x00FF));
      w[2] = _mm256_srli_epi16(both, 8);
      w[3] = _mm256_srli_epi16(both, 12);
    }

   private:
    __m256i order_;
  };
};

// Assembly: see int16_512.h.
struct WithoutVnni : Ints256 {
  static constexpr int kMostFused = 4;  // as in int16_512.h: M = 4: 1.04 / 1.08, M = 5: 0.93 / 0.99
  static void dot(__m256i& sum, __m256i w, __m256i x) {
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(w, x)));
  }
};

struct WithVnni : Ints256 {
  template <bool Whole>
  class QuadExpander {
   public:
    explicit QuadExpander(int column_bytes) : column_bytes_(column_bytes) {
      alignas(32) uint8_t order[32];
      for (int i = 0; i < 32; ++i) order[i] = static_cast<uint8_t>(i % 16 / 2 + i % 2 * 8);
      order_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(order));
    }

    void operator()(const uint8_t* bytes, __m256i (&w)[4]) const {
      const __m256i first = _mm256_shuffle_epi8(load_columns<Whole>(bytes), order_);
      const __m256i second = _mm256_shuffle_epi8(load_columns<Whole>(bytes + 2 * column_bytes_), order_);
      const __m256i even = _mm256_unpacklo_epi16(first, second), odd = _mm256_unpackhi_epi16(first, second);
      const __m256i low = _mm256_set1_epi8(15);
      w[0] = _mm256_and_si256(even, low);
      w[1] = _mm256_and_si256(odd, low);
      w[2] = _mm256_and_si256(_mm256_srli_epi16(even, 4), low);
      w[3] = _mm256_and_si256(_mm256_srli_epi16(odd, 4), low);
    }

   private:
    __m256i order_;
    int column_bytes_;
  };

  static void dot_bytes(__m256i& sum, __m256i codes, __m256i x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
  }
  // Of each four bytes the one at `byte` % 4, as a number of 32 bits.
  static __m256i bytes_of(__m256i quad, __m256i byte) {
    const __m256i first = _mm256_set_epi32(12, 8, 4, 0, 12, 8, 4, 0);
    return _mm256_shuffle_epi8(quad, _mm256_add_epi32(byte, first));
  }
  static constexpr int kMostFused = 24;  // M = 16: 1.03 / 0.97, M = 24: 1.00 / 0.94, M = 64: 0.97 / 0.89
  static void dot(__m256i& sum, __m256i w, __m256i x) {
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  }
};

// Products from the other side: registers for 12 sums, 2 operands of W, one of x and one product.
template <class Dot>
struct Columns256 : Dot {
  static constexpr int kTileRows = 6;
  static constexpr int kTileColumns = 2;
  // A 4096 x 4096 weight, 2 threads of a Zen 5, columns in registers / in a panel, ms: M = 4 0.56 / 0.63, M = 8
  // 1.02 / 1.11; with AVX-VNNI 0.48 / 0.62 and 0.85 / 0.96.
  static constexpr int kFusedRows = 4;
  static constexpr int kMostFused = 8;

  // One column of a block: the low nibbles, then the high ones.
  class ColumnExpander {
   public:
    ColumnExpander(bool whole, int) : whole_(whole) {}

    void operator()(const uint8_t* bytes, __m256i (&w)[2]) const {
      const __m128i raw = whole_ ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))
                                 : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
      const __m256i codes = _mm256_cvtepu8_epi16(raw);
      w[0] = _mm256_and_si256(codes, _mm256_set1_epi16(15));
      w[1] = _mm256_srli_epi16(codes, 4);
    }

   private:
    bool whole_;
  };

  static __m256i load_operand(const int16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store_operand(void* to, __m256i value) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
  }
  static __m256i to_words(__m256 first, __m256 second) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second));
    return _mm256_permute4x64_epi64(words, 0xD8);
  }
  // to[i] += unit * (start + the sum of the lanes of acc[i]).
  static inline __attribute__((always_inline)) void add_columns(const __m256i (&acc)[2], int32_t start,
                                                                float unit, float* to) {
    const __m256i pairs = _mm256_hadd_epi32(acc[0], acc[1]);
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sums = _mm_add_epi32(_mm_hadd_epi32(sums, sums), _mm_set1_epi32(start));
    const __m128 old = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(to)));
    const __m128 total = _mm_fmadd_ps(_mm_cvtepi32_ps(sums), _mm_set1_ps(unit), old);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_castps_si128(total));
  }
};

}  // namespace

const int4cpu::Kernel int4cpu::kInt16Avx2 = int16_kernel<WithoutVnni>("int16_avx2");
const int4cpu::Kernel int4cpu::kInt16AvxVnni = int16_kernel<WithVnni>("int16_avx_vnni");
const int4cpu::Kernel int4cpu::kDynamicAvxVnni = int8_kernel<WithVnni>("dynamic_avx_vnni");
const int4cpu::Kernel int4cpu::kTransposedAvx2 =
    transposed_int16_kernel<Columns256<WithoutVnni>>("transposed_avx2");
const int4cpu::Kernel int4cpu::kTransposedAvxVnni =
    transposed_int16_kernel<Columns256<WithVnni>>("transposed_avx_vnni");
