// Many rows by the bfloat16 tiles of AMX: what binds there is the traffic between the caches, above all stores
// that miss the first one, and not the tile unit. So a chunk of 1024 columns of a block is expanded once into
// the second-level cache, for all rows of a task, while the tiles are busy with the chunk before; 64 x 64 totals
// stay in the first level over a chunk; and x lies in the order of its tiles, 512 KiB of a task and a chunk.
//
// Between the instructions of the tiles, each of which takes 16 cycles, stand the ones that let the sums of the
// 32 x 32 before meet their scales, and the expansion: the window of instructions that the CPU looks at is just
// long enough. Zeros meet the sums of x in the tiles, too, where totals begin.
//
// Blocking and order were measured on a Xeon (2 MiB second-level cache), 4096 x 4096, 2 threads, M = 64 / 256 /
// 1024, ms: this one 1.39-1.59, 4.56-4.90, 18.3-19.2; amx.cpp with 256 rows a task 1.51-1.58, 6.1-7.2, 27.4-28.2;
// F.linear in bfloat16 2.3-2.5, 5.9, 18.7-20.9.
#include "bf16.h"
#include "gemm.h"
#include "tiles.h"

namespace {

using Here = Gemm<Bf16>;

constexpr int kColumns = 32;           // of a tile of x
constexpr int kRows = 2 * kTile;       // of x, and of W, in four tiles of sums
constexpr int kTaskRows = 256;
constexpr int kTaskBlocks = 8;
constexpr int kChunk = int4cpu::kChunkColumns;
constexpr int kMostSteps = kChunk / 32;
constexpr int kParts = 3;              // of a sum of x: 24 bits in numbers of 8

constexpr int64_t kTileElements = kTile * kColumns;   // 1 KiB
constexpr int64_t kXStep = 2 * kTileElements;         // 32 rows of x times 32 columns
constexpr int64_t kPanelStep = 4 * kTileElements;     // 64 rows of W times 32 columns
constexpr int64_t kSumStride = kRows * sizeof(float);
constexpr int64_t kBlockSums = kRows * kRows;

// --- the packed activation ------------------------------------------------------------------------

int64_t record_steps(const Problem& p) { return (p.steps + kColumns - 1) / kColumns; }

// 32 rows of a step: [32 columns][16 rows][row][column].
struct ByTiles {
  static uint16_t* tiles(const Problem& p, int64_t step, int64_t row) {
    return static_cast<uint16_t*>(p.packed_x) + (step * p.packed_rows + row / kRows * kRows) * p.step;
  }
  static uint16_t* element(const Problem& p, int64_t step, int64_t row, int32_t k) {
    return tiles(p, step, row) + k / kColumns * kXStep + row % kRows * kColumns + k % kColumns;
  }
  // The same of the sums of x, with steps in place of columns: [32 rows][part][32 steps]...
  static uint16_t* sum_tiles(const Problem& p, int64_t row) {
    return static_cast<uint16_t*>(p.records) + row / kRows * (kParts * record_steps(p) * kXStep);
  }
  // Parts are cut, not rounded, so that what is left is exact.
  static void put_sum(const Problem& p, int64_t step, int64_t row, float sum) {
    uint16_t* to = sum_tiles(p, row) + step / kColumns * kXStep + row % kRows * kColumns + step % kColumns;
    for (int part = 0; part < kParts; ++part, to += record_steps(p) * kXStep) {
      uint32_t bits;
      memcpy(&bits, &sum, sizeof bits);
      *to = static_cast<uint16_t>(bits >> 16);
      sum -= from_bits(bits & 0xFFFF0000);
    }
  }
};

void pack_rows(const Problem& p, int64_t row, int64_t row_end) {
  for (int64_t r = row; r < row_end; ++r) {  // steps that there are not
    for (int64_t s = p.steps; s < record_steps(p) * kColumns; ++s) ByTiles::put_sum(p, s, r, 0.0F);
  }
  Here::pack_rows<ByTiles>(p, row, row_end);
}

// --- a task ---------------------------------------------------------------------------------------

// Of a thread. A panel is a chunk of a block, [32 columns][16 rows of W][pair of columns][row]; totals are
// [block][32 rows][32 rows of W] of 32 x 32.
struct Scratch {
  alignas(64) uint16_t panel[2][kChunk * Here::kBlock];
  alignas(64) float totals[kTaskBlocks][kTaskRows / kRows][2][kBlockSums];
  alignas(64) float scale[2][kMostSteps][Here::kBlock];
  alignas(64) float sums[2][kBlockSums];
};

// Sums whose scales wait, and where they go.
struct Pending {
  const float* sums;
  const float* scale;
  float* totals;
};

inline __attribute__((always_inline)) void apply(const Pending& pending, int begin, int count) {
  const __m512 left = _mm512_load_ps(pending.scale), right = _mm512_load_ps(pending.scale + kTile);
#pragma GCC unroll 32
  for (int r = begin; r < begin + count; ++r) {
    const float* from = pending.sums + r * kRows;
    float* to = pending.totals + r * kRows;
    _mm512_store_ps(to, _mm512_fmadd_ps(left, _mm512_load_ps(from), _mm512_load_ps(to)));
    _mm512_store_ps(to + kTile, _mm512_fmadd_ps(right, _mm512_load_ps(from + kTile), _mm512_load_ps(to + kTile)));
  }
}

// The expansion of a chunk of a block, some pairs of columns at a time.
class Expansion {
 public:
  Expansion(const Problem& p, const Block& block, int64_t step, int64_t step_end, uint16_t* panel)
      : expand_(block.whole, block.column_bytes),
        bytes_(block.bytes + step * p.step * block.column_bytes),
        pair_bytes_(2 * block.column_bytes),
        pairs_((step_end - step) * p.step / 2),
        panel_(panel) {}

  inline __attribute__((always_inline)) void some(int64_t count) {
    for (const int64_t end = done_ + count < pairs_ ? done_ + count : pairs_; done_ < end; ++done_) {
      _mm_prefetch(reinterpret_cast<const char*>(bytes_) + kPrefetch, _MM_HINT_T0);
      __m512i w[4];
      expand_(bytes_, w);
      bytes_ += pair_bytes_;
      uint16_t* to = panel_ + done_ / kTile * kPanelStep + done_ % kTile * kColumns;
      for (int v = 0; v < 4; ++v) _mm512_store_si512(to + v * kTileElements, w[v]);
    }
  }
  int64_t pairs() const { return pairs_; }

 private:
  Bf16Expander expand_;
  const uint8_t* bytes_;
  int64_t pair_bytes_, pairs_;
  int64_t done_ = 0;
  uint16_t* panel_;
};

// 32 rows of x times 32 of W over a step: tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 of W.
template <int Tiles>
void multiply_32(const uint16_t* x, const uint16_t* panel, float* sums, const Pending& before,
                 Expansion& next, int64_t pairs) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
#pragma GCC unroll 4
  for (int i = 0; i < Tiles; ++i, x += kXStep, panel += kPanelStep) {
    TILE_LOAD(4, x, 64);
    TILE_LOAD(6, panel, 64);
    TILE_LOAD(7, panel + kTileElements, 64);
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    TILE_LOAD(5, x + kTileElements, 64);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
    apply(before, i * (kRows / Tiles), kRows / Tiles);
    next.some(pairs);
  }
  TILE_STORE(0, sums, kSumStride);
  TILE_STORE(1, sums + kTile, kSumStride);
  TILE_STORE(2, sums + kTile * kRows, kSumStride);
  TILE_STORE(3, sums + kTile * kRows + kTile, kSumStride);
}

// Totals begin as the sums of x times the zeros of all steps. A float16 zero is two bfloat16 numbers.
void begin_totals(const Problem& p, const Task& t, const Block& block, float (*totals)[2][kBlockSums]) {
  const bool halves = p.qparams_dtype == int4cpu::kFloat16;
  alignas(64) uint16_t zeros[2][kPanelStep];
  for (int64_t row = t.row; row < t.row_end; row += kRows) {
    memset(totals[(row - t.row) / kRows], 0, sizeof totals[0]);
  }
  for (int64_t tile = 0; tile < record_steps(p); ++tile) {
    for (int pair = 0; pair < kTile; ++pair) {
      __m512i both[2][4];  // of two steps: the high and what is left of each zero
      for (int i = 0; i < 2; ++i) {
        const int64_t s = tile * kColumns + 2 * pair + i;
        Here::QParams q = {};
        if (s < p.steps) q = Here::qparams(p, block, Here::group_of(p, s));
        for (int v = 0; v < 4; ++v) {
          const __m512i bits = _mm512_castps_si512(q.zero[v]);
          const __m512i high = _mm512_and_si512(bits, _mm512_set1_epi32(INT32_C(-65536)));
          const __m512i low = _mm512_castps_si512(_mm512_sub_ps(q.zero[v], _mm512_castsi512_ps(high)));
          const __m512i words[2] = {high, low};
          for (int part = 0; part < 2; ++part) {
            both[part][v] = i == 0 ? _mm512_srli_epi32(words[part], 16)
                                   : _mm512_mask_blend_epi16(0xAAAAAAAA, both[part][v], words[part]);
          }
        }
      }
      for (int part = 0; part < 2; ++part) {
        for (int v = 0; v < 4; ++v) {
          _mm512_store_si512(zeros[part] + v * kTileElements + pair * kColumns, both[part][v]);
        }
      }
    }
    for (int64_t row = t.row; row < t.row_end; row += kRows) {
      const uint16_t* x = ByTiles::sum_tiles(p, row) + tile * kXStep;
      for (int half = 0; half < 2; ++half) {
        float* to = totals[(row - t.row) / kRows][half];
        TILE_LOAD(0, to, kSumStride);
        TILE_LOAD(1, to + kTile, kSumStride);
        TILE_LOAD(2, to + kTile * kRows, kSumStride);
        TILE_LOAD(3, to + kTile * kRows + kTile, kSumStride);
        for (int part = 0; part < kParts; ++part) {
          const uint16_t* of_part = x + part * record_steps(p) * kXStep;
          TILE_LOAD(4, of_part, 64);
          TILE_LOAD(5, of_part + kTileElements, 64);
          for (int which = 0; which < (halves ? 2 : 1); ++which) {
            TILE_LOAD(6, zeros[which] + half * kXStep, 64);
            TILE_LOAD(7, zeros[which] + half * kXStep + kTileElements, 64);
            TILE_DOT(0, 4, 6);
            TILE_DOT(1, 4, 7);
            TILE_DOT(2, 5, 6);
            TILE_DOT(3, 5, 7);
          }
        }
        TILE_STORE(0, to, kSumStride);
        TILE_STORE(1, to + kTile, kSumStride);
        TILE_STORE(2, to + kTile * kRows, kSumStride);
        TILE_STORE(3, to + kTile * kRows + kTile, kSumStride);
      }
    }
  }
}

void store(const Problem& p, const Task& t, int64_t block, const float (*totals)[2][kBlockSums]) {
  alignas(64) float in_rows[kRows][Here::kBlock];
  for (int64_t row = t.row; row < t.row_end; row += kRows) {
    const float* of_rows = totals[(row - t.row) / kRows][0];
    for (int r = 0; r < kRows; ++r) {
      memcpy(in_rows[r], of_rows + r * kRows, kSumStride);
      memcpy(in_rows[r] + kRows, of_rows + kBlockSums + r * kRows, kSumStride);
    }
    const int64_t end = row + kRows < t.row_end ? row + kRows : t.row_end;
    Here::store(p, {row, end, block, 0, 0, block + 1}, in_rows[0]);
  }
}

// A chunk of a block.
struct Part {
  int64_t block, step, step_end;
};

Part part_at(const Problem& p, const Task& t, int64_t i) {
  const int64_t blocks = t.block_end - t.block, step = i / blocks * p.chunk_steps;
  return {t.block + i % blocks, step, step + p.chunk_steps < p.steps ? step + p.chunk_steps : p.steps};
}

Expansion expansion_of(const Problem& p, const Part& part, int64_t i, Scratch& scratch) {
  return {p, Here::block_at(p, part.block), part.step, part.step_end, scratch.panel[i % 2]};
}

void load_scales(const Problem& p, const Part& part, float (*to)[Here::kBlock]) {
  const Block block = Here::block_at(p, part.block);
  for (int64_t s = part.step; s < part.step_end; ++s, ++to) {
    const Here::QParams q = Here::qparams(p, block, Here::group_of(p, s));
    for (int v = 0; v < 4; ++v) _mm512_store_ps(*to + v * kTile, q.scale[v]);
  }
}

template <int Tiles>
void run_with(const Problem& p, const Task& t, Scratch& scratch) {
  const int64_t chunks = (p.steps + p.chunk_steps - 1) / p.chunk_steps;
  const int64_t parts = chunks * (t.block_end - t.block);
  const int64_t tall = (t.row_end - t.row + kRows - 1) / kRows;  // in units of 32 rows
  alignas(64) static constexpr float kNoScale[kRows] = {};
  alignas(64) float nothing[kBlockSums] = {};
  expansion_of(p, part_at(p, t, 0), 0, scratch).some(kChunk);
  for (int64_t i = 0; i < parts; ++i) {
    const Part part = part_at(p, t, i);
    auto* const totals = scratch.totals[part.block - t.block];
    auto* const scale = scratch.scale[i % 2];
    load_scales(p, part, scale);
    if (part.step == 0) begin_totals(p, t, Here::block_at(p, part.block), totals);
    // Beyond the last one: that again, into the other panel, which nobody reads.
    Expansion next = expansion_of(p, part_at(p, t, i + 1 < parts ? i + 1 : i), i + 1, scratch);
    const int64_t calls = (part.step_end - part.step) * tall * 2 * Tiles;
    const int64_t pairs = i + 1 < parts ? (next.pairs() + calls - 1) / calls : 0;
    for (int64_t first = 0; first < tall; first += 2) {
      const int64_t end = first + 2 < tall ? first + 2 : tall;
      Pending before = {nothing, kNoScale, nothing};
      int turn = 0;
      for (int64_t s = part.step; s < part.step_end; ++s) {
        const uint16_t* panel = scratch.panel[i % 2] + (s - part.step) * Tiles * kPanelStep;
        for (int64_t r = first; r < end; ++r) {
          const uint16_t* x = ByTiles::tiles(p, s, t.row + r * kRows);
          for (int half = 0; half < 2; ++half, turn ^= 1) {
            multiply_32<Tiles>(x, panel + half * kXStep, scratch.sums[turn], before, next, pairs);
            before = {scratch.sums[turn], scale[s - part.step] + half * kRows, totals[r][half]};
          }
        }
      }
      apply(before, 0, kRows);
    }
    next.some(i + 1 < parts ? next.pairs() : 0);
    if (part.step_end == p.steps) store(p, t, part.block, totals);
  }
}

void run(const Problem& p, const Task& t, void* memory) {
  Scratch& scratch = *static_cast<Scratch*>(memory);
  const TileConfig config;
  TILE_BEGIN(config);  // each thread has its own, and others may have changed it
  switch (p.step / kColumns) {
    case 1:
      run_with<1>(p, t, scratch);
      break;
    case 2:
      run_with<2>(p, t, scratch);
      break;
    default:
      run_with<4>(p, t, scratch);
  }
  TILE_END();
}

int64_t spin(int64_t rounds) {
  SPIN_TILES(rounds, TILE_DOT);
  return INT64_C(2) * 4 * kTile * kTile * kColumns;
}

}  // namespace

const int4cpu::Kernel int4cpu::kAmxMany = {
    .name = "amx_many",
    .block_rows = Here::kBlock,
    .max_step = Bf16::kMaxStep,
    .element_bytes = sizeof(Bf16::Element),
    .record_bytes = kParts * sizeof(Bf16::Element),
    .record_steps = kColumns,
    .row_multiple = kRows,
    .task_rows = kTaskRows,
    .tile_rows = kRows,
    .chunk_columns = kChunk,
    .least_rows = 1,
    .pack_rows = &pack_rows,
    .multiply = nullptr,
    .store = nullptr,
    .run = &run,
    .task_blocks = kTaskBlocks,
    .scratch_bytes = sizeof(Scratch),
    .spin = &spin,
};
