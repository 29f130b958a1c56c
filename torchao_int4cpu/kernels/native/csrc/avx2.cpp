// AVX2 with FMA and F16C (Haswell and Zen on): float32 products on the AVX2 layout.
#include "gemm.h"
#include "vec256.h"

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

struct Avx2 : Vec256 {
  using Operand = __m256;
  using Element = float;
  using Expander = Expander256;
  static constexpr int kDepth = 1;
  static constexpr int kMaxStep = 64;
  static constexpr int kTileRows = 3;

  static Operand broadcast(const Element* x) { return _mm256_broadcast_ss(x); }
  static Vec dot(Vec sum, Operand x, Operand w) { return _mm256_fmadd_ps(x, w, sum); }
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
};

using Here = Gemm<Avx2>;

}  // namespace

const int4cpu::Kernel int4cpu::kAvx2 = {
    .name = "avx2",
    .block_rows = Here::kBlock,
    .max_step = Avx2::kMaxStep,
    .element_bytes = sizeof(Avx2::Element),
    .record_bytes = sizeof(float),
    .row_multiple = 1,
    .task_rows = int4cpu::kChunkedTaskRows,
    .tile_rows = Avx2::kTileRows,
    .chunk_columns = int4cpu::kChunkColumns,
    .least_rows = 1,
    .pack_rows = &Here::pack_rows<Here::ByRows>,
    .multiply = &Here::multiply,
    .store = &Here::store,
    .spin = &Here::spin,
};
