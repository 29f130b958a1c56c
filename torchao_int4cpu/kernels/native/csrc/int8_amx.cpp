// The arithmetic of int16.h by the byte tiles of AMX, for 5 to 16 rows: q as 256 * hi + lo, codes as bytes.
//
// A tile of x is 8 rows, hi and lo of each in turn, times 64 columns; a tile of the weight is 64 columns of
// 16 rows, four columns in 32 bits. Three groups are in work at a time, a little of each in turn, because
// the window of instructions that the CPU looks at is too short to overlap them by itself: one is
// expanded, one multiplied, and the sums of one meet their scales.
#include "tiles.h"
#include "vbmi.h"

namespace {

using Here = Int16<Vbmi>;

constexpr int kColumns = 64;             // of a tile
constexpr int kHalf = 8;                 // rows of x in a tile
constexpr int kRows = 2 * kHalf;
constexpr int kMostChunks = Here::kMaxStep / kColumns;
constexpr int64_t kChunkBytes = 2 * kColumns;  // of a row of x

// A group of 32 columns is half a tile; the rest of x is zero.
int chunks_of(const Problem& p) { return p.step < kColumns ? 1 : p.step / kColumns; }

// [step][chunk][row][hi, lo][column]
int8_t* packed_x(const Problem& p, int64_t step, int chunk, int64_t row) {
  return static_cast<int8_t*>(p.packed_x) +
         ((step * chunks_of(p) + chunk) * p.packed_rows + row) * kChunkBytes;
}

void place(const Problem& p, int64_t step, int64_t row, const int16_t* q) {
  const int columns = p.step < kColumns ? p.step : kColumns;
  for (int chunk = 0; chunk < chunks_of(p); ++chunk, q += columns) {
    int8_t* const hi = packed_x(p, step, chunk, row);
    int8_t* const lo = hi + kColumns;
    for (int i = 0; i < columns; ++i) {
      hi[i] = static_cast<int8_t>((q[i] + 128) >> 8);
      lo[i] = static_cast<int8_t>(q[i]);
    }
    memset(hi + columns, 0, kColumns - columns);
    memset(lo + columns, 0, kColumns - columns);
  }
}

// Four columns of a block as four vectors of 32 bits a row: low nibbles and whole bytes of the first 16
// bytes of a column, then of the others.
//
// The second `vpermb` puts the halves of each 32 bits the other way around, so that a blend and a funnel
// shift finish the transposition.
class Expander {
 public:
  explicit Expander(int column_bytes) : column_bytes_(column_bytes) {
    valid_ = column_bytes == 32 ? ~UINT64_C(0) : (UINT64_C(1) << (2 * column_bytes)) - 1;
    alignas(64) uint8_t order[2][64];
    for (int i = 0; i < 64; ++i) {
      const int half = i % 4 / 2, column = i % 2 * column_bytes;
      order[0][i] = static_cast<uint8_t>(i / 4 + half * 16 + column);
      order[1][i] = static_cast<uint8_t>(i / 4 + (1 - half) * 16 + column);
    }
    order_[0] = _mm512_load_si512(order[0]);
    order_[1] = _mm512_load_si512(order[1]);
  }

  int column_bytes() const { return column_bytes_; }

  void operator()(const uint8_t* bytes, __m512i (&w)[4]) const {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i first = _mm512_maskz_loadu_epi8(valid_, bytes);
    const __m512i second = _mm512_maskz_loadu_epi8(valid_, bytes + 2 * column_bytes_);
    const __m512i a = _mm512_permutexvar_epi8(order_[0], first);
    const __m512i b = _mm512_permutexvar_epi8(order_[1], second);
    w[1] = _mm512_mask_blend_epi16(0xAAAAAAAA, a, b);
    w[3] = _mm512_shrdi_epi32(a, b, 16);
    w[0] = _mm512_and_si512(w[1], low);
    w[2] = _mm512_and_si512(w[3], low);
  }

 private:
  __m512i order_[2];
  uint64_t valid_;
  int column_bytes_;
};

// Of one group: the expanded codes, [chunk][vector][4 columns], and sums, [vector][hi and lo of each row].
using Panel = __m512i[kMostChunks][4][kTile];
using Sums = int32_t[4][2 * kRows][kTile];

// A quarter of a chunk, 16 columns.
void expand_quarter(const Expander& expand, const uint8_t* bytes, Panel& panel, int chunk, int quarter) {
  bytes += (chunk * kColumns + quarter * 16) * expand.column_bytes();
  for (int i = 0; i < 4; ++i, bytes += 4 * expand.column_bytes()) {
    _mm_prefetch(reinterpret_cast<const char*>(bytes) + kPrefetch, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(bytes) + kPrefetch + 64, _MM_HINT_T1);
    __m512i w[4];
    expand(bytes, w);
    for (int v = 0; v < 4; ++v) panel[chunk][v][quarter * 4 + i] = w[v];
  }
}

#define ONE_VECTOR(v, w)                                            \
  if (chunk == 0) TILE_ZERO(v);                                     \
  TILE_LOAD(w, panel[chunk][v], 64);                                \
  TILE_DOT_BYTES(v, 4, w);                                          \
  if (last) TILE_STORE(v, sums[v][0], 64);

// A quarter of the work on a chunk for up to 8 rows: tiles 0 to 3 are sums, 4 is x, 5 to 7 the weight.
void multiply_8(const Problem& p, int64_t s, int64_t row, int chunk, int quarter, const Panel& panel,
                Sums& sums) {
  const bool last = chunk == chunks_of(p) - 1;
  switch (quarter) {
    case 0:
      TILE_LOAD(4, packed_x(p, s, chunk, row), kColumns);
      ONE_VECTOR(0, 5)
      break;
    case 1:
      ONE_VECTOR(1, 6)
      break;
    case 2:
      ONE_VECTOR(2, 7)
      break;
    default:
      ONE_VECTOR(3, 5)
  }
}

// The same for up to 16 rows, first for two vectors of all chunks, then for the others: tiles 0 to 3 are sums
// of two vectors times both tiles of x, which are 4 and 5; 6 and 7 are the weight.
void multiply_16(const Problem& p, int64_t s, int64_t row, int part, const Panel& panel, Sums& sums) {
  const int chunks = chunks_of(p), half = part / (2 * chunks), chunk = part / 2 % chunks;
  const bool last = chunk == chunks - 1;
  if (part % 2 == 0) {
    if (chunk == 0) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
    TILE_LOAD(4, packed_x(p, s, chunk, row), kColumns);
    TILE_LOAD(5, packed_x(p, s, chunk, row + kHalf), kColumns);
    TILE_LOAD(6, panel[chunk][2 * half], 64);
    TILE_DOT_BYTES(0, 4, 6);
    TILE_DOT_BYTES(1, 5, 6);
    if (last) {
      TILE_STORE(0, sums[2 * half][0], 64);
      TILE_STORE(1, sums[2 * half][kTile], 64);
    }
  } else {
    TILE_LOAD(7, panel[chunk][2 * half + 1], 64);
    TILE_DOT_BYTES(2, 4, 7);
    TILE_DOT_BYTES(3, 5, 7);
    if (last) {
      TILE_STORE(2, sums[2 * half + 1][0], 64);
      TILE_STORE(3, sums[2 * half + 1][kTile], 64);
    }
  }
}

void apply(const Problem& p, const Block& block, int64_t s, int64_t row, int64_t begin, int64_t end,
           const Sums& sums, float* totals) {
  if (begin == end) return;
  const Here::QParams qp = Here::qparams(p, block, Here::group_of(p, s));
  const uint8_t* bytes = block.bytes + s * p.step * block.column_bytes;
  for (int64_t r = begin; r < end; ++r) {
    const Group& group = Here::groups(p, s)[row + r];
    __m512i c[4];
    for (int v = 0; v < 4; ++v) {
      const __m512i hi = _mm512_load_si512(sums[v][2 * r]);
      const __m512i lo = _mm512_load_si512(sums[v][2 * r + 1]);
      const __m512i start = _mm512_set1_epi32(v % 2 == 0 ? group.start : group.start_of_bytes);
      c[v] = _mm512_add_epi32(_mm512_slli_epi32(hi, 8), _mm512_add_epi32(lo, start));
    }
    const __m512i whole[4] = {c[0], c[2], Vbmi::over_16(Vbmi::subtract(c[1], c[0])),
                              Vbmi::over_16(Vbmi::subtract(c[3], c[2]))};
    Here::apply<true>(block, bytes, qp, group, whole, totals + r * Here::kBlock);
  }
}

// Up to 16 rows.
void multiply_rows(const Problem& p, const Task& t, const Block& block, const Expander& expand,
                   int64_t row, int64_t rows, float* totals) {
  const bool one = rows <= kHalf;
  const int chunks = chunks_of(p), parts = 4 * chunks;
  const int quarters = p.step < kColumns ? p.step / 16 : 4;  // of a chunk that there are
  alignas(64) Panel panel[2];
  alignas(64) Sums sums[2];
  if (quarters < 4) memset(panel, 0, sizeof panel);
  for (int64_t s = t.step; s < t.step_end + 2; ++s) {
    const bool expands = s < t.step_end, multiplies = s > t.step && s <= t.step_end, applies = s > t.step + 1;
    if (expands) Here::prefetch_qparams(p, block, Here::group_of(p, s));
    for (int part = 0; part < parts; ++part) {
      if (expands && part % 4 < quarters) {
        const uint8_t* bytes = block.bytes + s * p.step * block.column_bytes;
        expand_quarter(expand, bytes, panel[s % 2], part / 4, part % 4);
      }
      if (multiplies && one) {
        multiply_8(p, s - 1, row, part / 4, part % 4, panel[(s - 1) % 2], sums[(s - 1) % 2]);
      } else if (multiplies) {
        multiply_16(p, s - 1, row, part, panel[(s - 1) % 2], sums[(s - 1) % 2]);
      }
      if (applies) {
        apply(p, block, s - 2, row, rows * part / parts, rows * (part + 1) / parts, sums[s % 2], totals);
      }
    }
  }
}

void multiply(const Problem& p, const Task& t, float* totals) {
  const Block block = Here::block_at(p, t.block);
  const Expander expand(block.column_bytes);
  memset(totals, 0, sizeof(float) * (t.row_end - t.row) * Here::kBlock);
  const TileConfig config;
  TILE_BEGIN(config);  // each thread has its own, and others may have changed it
  for (int64_t row = t.row; row < t.row_end; row += kRows) {
    const int64_t rows = t.row_end - row < kRows ? t.row_end - row : kRows;
    multiply_rows(p, t, block, expand, row, rows, totals + (row - t.row) * Here::kBlock);
  }
  TILE_END();
}

int64_t spin(int64_t rounds) {
  SPIN_TILES(rounds, TILE_DOT_BYTES);
  return INT64_C(2) * 4 * kTile * kTile * kColumns / 2;  // hi and lo are one number
}

}  // namespace

const int4cpu::Kernel int4cpu::kInt8Amx = {
    .name = "int8_amx",
    .block_rows = Here::kBlock,
    .max_step = Here::kMaxStep,
    .element_bytes = 4,  // two, but for groups of 32 columns
    .record_bytes = sizeof(Group),
    .row_multiple = kRows,
    .task_rows = int4cpu::kChunkedTaskRows,
    .tile_rows = kRows,
    .chunk_columns = int4cpu::kChunkColumns,
    .least_rows = 1,
    .pack_rows = &Here::pack_rows<&place>,
    .multiply = &multiply,
    .store = &Here::store,
    .spin = &spin,
};
