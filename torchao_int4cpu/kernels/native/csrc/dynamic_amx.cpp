// The arithmetic of int8.h by the byte tiles of AMX: 16 rows of x times 64 columns times 16 rows of W.
#include "int8.h"
#include "tiles.h"
#include "vbmi.h"

namespace {

constexpr int kColumns = 64;      // of a tile
constexpr int kRows = 2 * kTile;  // rows of x that share one read of the panel

struct Tiles : Vbmi {
  static constexpr int kRows = ::kRows;

  // Four columns of a block, one byte a column in the 32 bits of a row, rows in the order of memory.
  template <bool Whole>
  class QuadExpander {
   public:
    explicit QuadExpander(int column_bytes) : column_bytes_(column_bytes) {
      valid_ = Whole ? ~UINT64_C(0) : (UINT64_C(1) << (2 * column_bytes)) - 1;
      alignas(64) uint8_t order[2][64];
      for (int i = 0; i < 64; ++i) {
        const int column = i % 2 * column_bytes + i % 4 / 2 * 64;
        for (int half = 0; half < 2; ++half) order[half][i] = static_cast<uint8_t>(column + half * 16 + i / 4);
      }
      order_[0] = _mm512_load_si512(order[0]);
      order_[1] = _mm512_load_si512(order[1]);
    }

    void operator()(const uint8_t* bytes, __m512i (&w)[4]) const {
      const __m512i low = _mm512_set1_epi8(15);
      const __m512i first = _mm512_maskz_loadu_epi8(valid_, bytes);
      const __m512i second = _mm512_maskz_loadu_epi8(valid_, bytes + 2 * column_bytes_);
      for (int half = 0; half < 2; ++half) {
        const __m512i quad = _mm512_permutex2var_epi8(first, order_[half], second);
        w[half] = _mm512_and_si512(quad, low);
        w[2 + half] = _mm512_and_si512(_mm512_srli_epi16(quad, 4), low);
      }
    }

   private:
    __m512i order_[2];
    uint64_t valid_;
    int column_bytes_;
  };

};

using Here = Int8<Tiles>;

// A group of 32 columns is half a tile; the rest of x is zero.
int chunks_of(const Problem& p) { return p.step < kColumns ? 1 : p.step / kColumns; }

// [step][chunk][row][column]
int8_t* packed_x(const Problem& p, int64_t step, int chunk, int64_t row) {
  return static_cast<int8_t*>(p.packed_x) +
         ((step * chunks_of(p) + chunk) * p.packed_rows + row) * kColumns;
}

void place(const Problem& p, int64_t step, int64_t row, const int8_t* q) {
  const int columns = p.step < kColumns ? p.step : kColumns;
  for (int chunk = 0; chunk < chunks_of(p); ++chunk, q += columns) {
    int8_t* const to = packed_x(p, step, chunk, row);
    memcpy(to, q, columns);
    memset(to + columns, 0, kColumns - columns);
  }
}

constexpr int64_t kPanelStride = 4 * 64;          // bytes from one quad of columns to the next
constexpr int64_t kSumStride = Here::kBlock * 4;  // bytes from one row of sums to the next

// 32 rows of x times 32 rows of W: tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 of W.
void multiply_32(const Problem& p, int64_t s, int64_t row, const __m512i* panel, int32_t* sums) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int chunk = 0; chunk < chunks_of(p); ++chunk, panel += kTile * 4) {
    TILE_LOAD(4, packed_x(p, s, chunk, row), kColumns);
    TILE_LOAD(6, panel, kPanelStride);
    TILE_LOAD(7, panel + 1, kPanelStride);
    TILE_DOT_BYTES(0, 4, 6);
    TILE_DOT_BYTES(1, 4, 7);
    TILE_LOAD(5, packed_x(p, s, chunk, row + kTile), kColumns);
    TILE_DOT_BYTES(2, 5, 6);
    TILE_DOT_BYTES(3, 5, 7);
  }
  TILE_STORE(0, sums, kSumStride);
  TILE_STORE(1, sums + kTile, kSumStride);
  TILE_STORE(2, sums + kTile * Here::kBlock, kSumStride);
  TILE_STORE(3, sums + kTile * Here::kBlock + kTile, kSumStride);
}

void multiply(const Problem& p, const Task& t, float* totals) {
  const Block block = Here::block_at(p, t.block);
  memset(totals, 0, sizeof(float) * (t.row_end - t.row) * Here::kBlock);
  alignas(64) __m512i panel[Here::kMaxStep] = {};  // zeros where a group is half a tile
  alignas(64) int32_t sums[kRows][4][kTile];
  const TileConfig config;
  TILE_BEGIN(config);  // each thread has its own, and others may have changed it
  for (int64_t s = t.step; s < t.step_end; ++s) {
    Here::prefetch_qparams(p, block, s);
    if (block.whole) {
      Here::expand_group<true>(p, block, s, panel);
    } else {
      Here::expand_group<false>(p, block, s, panel);
    }
    const Here::QParams qp = Here::qparams(p, block, s);
    for (int64_t row = t.row; row < t.row_end; row += kRows) {
      multiply_32(p, s, row, panel, sums[0][0]);
      multiply_32(p, s, row, panel + 2, sums[0][2]);
      const int64_t end = t.row_end - row < kRows ? t.row_end - row : kRows;
      for (int64_t r = 0; r < end; ++r) {
        const Group& group = Here::groups(p, s)[row + r];
        const __m512i start = _mm512_set1_epi32(group.start);
        __m512i whole[4];
        for (int v = 0; v < 4; ++v) whole[v] = _mm512_add_epi32(_mm512_load_si512(sums[r][v]), start);
        Here::apply(panel, qp, group, whole, totals + (row - t.row + r) * Here::kBlock);
      }
    }
  }
  TILE_END();
}

int64_t spin(int64_t rounds) {
  SPIN_TILES(rounds, TILE_DOT_BYTES);
  return INT64_C(2) * 4 * kTile * kTile * kColumns;
}

}  // namespace

const int4cpu::Kernel int4cpu::kDynamicAmx = {
    .name = "dynamic_amx",
    .block_rows = Here::kBlock,
    .max_step = Here::kMaxStep,
    .element_bytes = 2,  // one, but for groups of 32 columns
    .record_bytes = sizeof(Group),
    .row_multiple = kRows,
    .task_rows = 192,
    .tile_rows = kRows,
    .chunk_columns = int4cpu::kChunkColumns,
    .least_rows = kInt8LeastRows,
    .pack_rows = &Here::pack_rows<&place>,
    .multiply = &multiply,
    .store = &Here::store,
    .spin = &spin,
};
