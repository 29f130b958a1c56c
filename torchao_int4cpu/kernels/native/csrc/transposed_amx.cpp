// Products from the other side by the bfloat16 tiles of AMX: 16 rows of x times 32 rows of W times 16 columns.
#include "bf16.h"
#include "tiles.h"
#include "transposed.h"

namespace {

struct AmxTransposed : Bf16Transposed {
  static constexpr int kTileRows = kTile;
  static constexpr int kTaskRows = 128;
  static constexpr int kChunk = 1024;  // 256 KiB of 128 rows of x, for a second-level cache
};

using Here = Transposed<AmxTransposed>;
static_assert(totals_fit<AmxTransposed>());

constexpr int kElements = Here::kElements;  // of a row of a tile of x
constexpr int kTogether = 2 * kTile;        // rows of x, and columns of W, in work together
constexpr int kMostVectors = Here::kChunk / kElements;

// Of both tiles of columns, [vector][column tile][pair of rows of W][column].
using Panel = __m512i[kMostVectors][2][kTile];

// 16 columns of a block to the two tiles of its low and its high nibbles: a row of a tile is a pair of rows of
// W of 16 columns. Bytes are transposed before they become numbers, in words that hold such a pair.
class TileExpander {
 public:
  explicit TileExpander(int64_t column_bytes) : column_bytes_(column_bytes), table_(code_table()) {
    valid_ = column_bytes == 32 ? ~0U : (1U << column_bytes) - 1;
    alignas(64) uint16_t index[2][2][32];
    alignas(64) uint8_t order[2][64];
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 32; ++i) {
        const int word = half * 8 + i / 4;
        index[0][half][i] = static_cast<uint16_t>(i % 4 / 2 * 32 + i % 2 * 16 + word);
      }
      for (int i = 0; i < 64; ++i) {
        order[half][i] = static_cast<uint8_t>(half * 32 + i / 4 * 2 + i % 4 / 2);
      }
      first_[half] = _mm512_load_si512(index[0][half]);
      order_[half] = _mm512_load_si512(order[half]);
    }
    for (int columns = 4, step = 0; step < 2; columns *= 2, ++step) {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 32; ++i) {
          const int word = half * 16 / columns + i / (2 * columns);
          const int column = i % (2 * columns);
          index[1][half][i] =
              static_cast<uint16_t>(column / columns * 32 + word * columns + column % columns);
        }
        join_[step][half] = _mm512_load_si512(index[1][half]);
      }
    }
  }

  // `low` and `high` are where rows of both tiles go.
  void operator()(const uint8_t* bytes, __m512i* low, __m512i* high) const {
    __m512i a[8], b[8];
    for (int i = 0; i < 8; ++i, bytes += 2 * column_bytes_) {
      const __m256i even = _mm256_maskz_loadu_epi8(valid_, bytes);
      const __m256i odd = _mm256_maskz_loadu_epi8(valid_, bytes + column_bytes_);
      a[i] = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
    }
    // 2 columns of 16 words each, to 4 columns of 8 words, 8 of 4, 16 of 2.
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_permutex2var_epi16(a[2 * i], first_[0], a[2 * i + 1]);
      b[4 + i] = _mm512_permutex2var_epi16(a[2 * i], first_[1], a[2 * i + 1]);
    }
    for (int half = 0; half < 2; ++half) {  // b[4 half + i]: words 8 half on, columns 4 i on
      for (int i = 0; i < 2; ++i) {
        const __m512i left = b[4 * half + 2 * i], right = b[4 * half + 2 * i + 1];
        a[4 * half + i] = _mm512_permutex2var_epi16(left, join_[0][0], right);
        a[4 * half + 2 + i] = _mm512_permutex2var_epi16(left, join_[0][1], right);
      }
    }
    for (int quarter = 0; quarter < 4; ++quarter) {  // a[2 quarter + i]: words 4 quarter on, columns 8 i on
      const __m512i left = a[2 * quarter], right = a[2 * quarter + 1];
      b[2 * quarter] = _mm512_permutex2var_epi16(left, join_[1][0], right);
      b[2 * quarter + 1] = _mm512_permutex2var_epi16(left, join_[1][1], right);
    }
    for (int word = 0; word < kTile; ++word) {
      const __m512i codes = _mm512_permutexvar_epi8(order_[word % 2], b[word / 2]);
      low[word] = _mm512_permutexvar_epi16(codes, table_);
      high[word] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table_);
    }
  }

 private:
  int64_t column_bytes_;
  __m512i table_, first_[2], join_[2][2], order_[2];
  __mmask32 valid_;
};

void expand_columns(const Problem& p, const Task& t, int64_t column, Panel& panel) {
  int64_t vector = 0;
  for (int64_t s = t.step; s < t.step_end; ++s, vector += 2) {
    const Block block = Here::Base::block_at(p, s);
    const TileExpander expand(block.column_bytes);
    const uint8_t* bytes = block.bytes + column * block.column_bytes;
    Here::prefetch<kTogether>(bytes);
    for (int tile = 0; tile < 2; ++tile, bytes += kTile * block.column_bytes) {
      expand(bytes, panel[vector][tile], panel[vector + 1][tile]);
    }
  }
}

// Up to 32 rows of x times 32 columns: tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 columns.
void multiply_32(const uint16_t* x, const uint16_t* x_below, const Panel& panel, int64_t vectors, float* sums) {
  constexpr int64_t kStride = kTogether * sizeof(float);
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t i = 0; i < vectors; ++i, x += kTile * kElements, x_below += kTile * kElements) {
    TILE_LOAD(4, x, 64);
    TILE_LOAD(6, panel[i][0], 64);
    TILE_LOAD(7, panel[i][1], 64);
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    TILE_LOAD(5, x_below, 64);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
  }
  TILE_STORE(0, sums, kStride);
  TILE_STORE(1, sums + kTile, kStride);
  TILE_STORE(2, sums + kTile * kTogether, kStride);
  TILE_STORE(3, sums + kTile * kTogether + kTile, kStride);
}

// Tiles of rows of x. An odd number is made even by rows of zeros.
void multiply(const Problem& p, const Task& t, float* totals) {
  const int64_t rows = t.row_end - t.row, tiles = (rows + kTile - 1) / kTile;
  const int32_t columns = p.block_columns;
  alignas(64) Here::Scaled scaled = {};
  alignas(64) Panel panel;
  alignas(64) float sums[kTogether][kTogether];
  Here::scale_rows(p, t, kTile, scaled, totals);
  const TileConfig config;
  TILE_BEGIN(config);  // each thread has its own, and others may have changed it
  for (int32_t c = 0; c < columns; c += kTogether) {
    expand_columns(p, t, t.block * columns + c, panel);
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      multiply_32(scaled.a[tile], scaled.a[tile + 1], panel, (t.step_end - t.step) * Here::kVectors, sums[0]);
      for (int64_t i = tile; i < tile + 2 && i < tiles; ++i) {
        const int64_t first = rows * i / tiles, end = rows * (i + 1) / tiles;
        for (int64_t r = first; r < end; ++r) {
          const float* from = sums[(i - tile) * kTile + r - first];
          float* to = totals + r * columns + c;
          for (int j = 0; j < kTogether; ++j) to[j] += from[j];
        }
      }
    }
  }
  TILE_END();
}

int64_t spin(int64_t rounds) {
  SPIN_TILES(rounds, TILE_DOT);
  return INT64_C(2) * 4 * kTile * kTile * kElements;
}

}  // namespace

const int4cpu::Kernel int4cpu::kTransposedAmx = {
    .name = "transposed_amx",
    .transposed = true,
    .block_rows = Here::kBlock,
    .max_step = int4cpu::kMaxBlockColumns,
    .element_bytes = 0,
    .record_bytes = sizeof(float),
    .row_multiple = 1,
    .task_rows = AmxTransposed::kTaskRows,
    .tile_rows = kTogether,
    .chunk_columns = Here::kChunk,
    .least_rows = kTile + 1,
    .pack_rows = &Here::find_factors,
    .multiply = &multiply,
    .store = &Here::store,
    .spin = &spin,
};
