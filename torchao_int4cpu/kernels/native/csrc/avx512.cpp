// AVX-512 without bfloat16 instructions (Skylake-SP to Ice Lake): float32 products.
#include "gemm.h"
#include "vec512.h"

namespace {

// One column of a block at a time; `vpermps` looks a float up by the low 4 bits of an index.
class Expander512 {
 public:
  Expander512(bool whole, int column_bytes) {
    (void)whole;
    alignas(64) float table[16];
    for (int code = 0; code < 16; ++code) table[code] = static_cast<float>(code - 8);
    table_ = _mm512_load_ps(table);
    for (int half = 0; half < 2; ++half) {
      const int bytes = column_bytes - 16 * half;
      valid_[half] = static_cast<__mmask16>(bytes >= 16 ? 0xFFFF : bytes > 0 ? (1 << bytes) - 1 : 0);
    }
  }

  void operator()(const uint8_t* bytes, __m512 (&w)[4]) const {
    for (int half = 0; half < 2; ++half) {
      const __m128i raw = _mm_maskz_loadu_epi8(valid_[half], bytes + 16 * half);
      const __m512i codes = _mm512_cvtepu8_epi32(raw);
      w[half] = _mm512_permutexvar_ps(codes, table_);
      w[2 + half] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table_);
    }
  }

 private:
  __m512 table_;
  __mmask16 valid_[2];
};

struct Avx512 : InOrder512 {
  using Operand = __m512;
  using Element = float;
  using Expander = Expander512;
  static constexpr int kDepth = 1;
  static constexpr int kMaxStep = 64;
  static constexpr int kTileRows = 6;

  static Operand broadcast(const Element* x) { return _mm512_set1_ps(*x); }
  static Vec dot(Vec sum, Operand x, Operand w) { return _mm512_fmadd_ps(x, w, sum); }
  static Vec pack(Vec value, Element* to) {
    store(to, value);
    return value;
  }
};

using Here = Gemm<Avx512>;

}  // namespace

const int4cpu::Kernel int4cpu::kAvx512 = {
    .name = "avx512",
    .block_rows = Here::kBlock,
    .max_step = Avx512::kMaxStep,
    .element_bytes = sizeof(Avx512::Element),
    .record_bytes = sizeof(float),
    .row_multiple = 1,
    .task_rows = int4cpu::kChunkedTaskRows,
    .tile_rows = Avx512::kTileRows,
    .chunk_columns = int4cpu::kChunkColumns,
    .least_rows = 1,
    .pack_rows = &Here::pack_rows<Here::ByRows>,
    .multiply = &Here::multiply,
    .store = &Here::store,
    .spin = &Here::spin,
};
