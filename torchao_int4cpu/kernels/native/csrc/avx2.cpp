// AVX2 with FMA and F16C (Haswell and Zen on): float32 products on the AVX2 layout.
#include "gemm.h"

namespace {

// One column of a block at a time. A float that holds code - 8 has two bytes that are not zero; `pshufb`
// looks up each, for the low nibbles in the lower half of a vector and the high nibbles in the upper.
class Expander256 {
 public:
  Expander256(bool whole, int column_bytes) : whole_(whole) {
    (void)column_bytes;
    alignas(32) uint8_t upper[32], lower[32];
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>((i & 15) - 8);
      uint32_t bits;
      memcpy(&bits, &value, sizeof bits);
      upper[i] = static_cast<uint8_t>(bits >> 24);
      lower[i] = static_cast<uint8_t>(bits >> 16);
    }
    upper_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(upper));
    lower_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(lower));
  }

  void operator()(const uint8_t* bytes, __m256 (&w)[4]) const {
    // A short block is 16 rows, 8 bytes a column; vectors 2 and 3 have no rows.
    const __m128i raw = whole_ ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))
                               : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    const __m256i shifted =
        _mm256_srlv_epi64(_mm256_broadcastsi128_si256(raw), _mm256_set_epi64x(4, 4, 0, 0));
    const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi8(0x0F));
    const __m256i upper = _mm256_shuffle_epi8(upper_, codes);
    const __m256i lower = _mm256_shuffle_epi8(lower_, codes);
    const __m256i first = _mm256_unpacklo_epi8(lower, upper);
    const __m256i second = _mm256_unpackhi_epi8(lower, upper);
    const __m256i zero = _mm256_setzero_si256();
    w[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, first));
    w[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, first));
    w[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, second));
    w[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, second));
  }

 private:
  bool whole_;
  __m256i upper_, lower_;
};

struct Avx2 {
  using Vec = __m256;
  using Operand = __m256;
  using Element = float;
  using Expander = Expander256;
  static constexpr int kLanes = 8;
  static constexpr int kDepth = 1;
  static constexpr int kMaxStep = 128;
  static constexpr int kFusedRows = 2;
  static constexpr int kMostFused = 4;
  static constexpr int kTileRows = 3;

  static Vec splat(float value) { return _mm256_set1_ps(value); }
  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Operand broadcast(const Element* x) { return _mm256_broadcast_ss(x); }
  static Vec dot(Vec sum, Operand x, Operand w) { return _mm256_fmadd_ps(x, w, sum); }
  static float total(Vec a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static Vec pack(Vec value, Element* to) {
    store(to, value);
    return value;
  }

  // Vector v holds the rows of bytes 4v to 4v + 3: low nibbles first, then the high ones.
  static int nibble(int, int lane) { return lane >> 2; }
  static int byte(int v, int lane) { return 4 * v + (lane & 3); }
  static Vec take(const float* block, int v) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(block + 4 * v)),
                                _mm_loadu_ps(block + 16 + 4 * v), 1);
  }
  static void put(float* block, int v, Vec value) {
    _mm_storeu_ps(block + 4 * v, _mm256_castps256_ps128(value));
    _mm_storeu_ps(block + 16 + 4 * v, _mm256_extractf128_ps(value, 1));
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
  static float largest_lane(Vec a) {
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_castps_si256(a));
    uint32_t bits = 0;
    for (const uint32_t lane : lanes) bits = lane > bits ? lane : bits;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

using Here = Gemm<Avx2>;

}  // namespace

const int4cpu::Kernel int4cpu::kAvx2 = {
    .name = "avx2",
    .block_rows = Here::kBlock,
    .max_step = Avx2::kMaxStep,
    .element_bytes = sizeof(Avx2::Element),
    .row_multiple = 1,
    .task_rows = int4cpu::kMaxTaskRows,
    .tile_rows = Avx2::kTileRows,
    .pack_rows = &Here::pack_rows,
    .multiply = &Here::multiply,
    .store = &Here::store,
    .spin = &Here::spin,
};
