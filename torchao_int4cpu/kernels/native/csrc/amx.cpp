// AMX: 16 rows of x times 16 rows of W times 32 columns in one instruction, in bfloat16.
//
// What binds is the traffic between the caches, above all stores that miss the first one, and not the tile unit.
// So x lies in the order of its tiles, and between the instructions of the tiles, each of which takes 16 cycles,
// stand the ones that let the sums of the 32 x 32 before meet their scales, and those that expand what comes
// next: the window of instructions that the CPU looks at is just long enough. Zeros meet the sums of x in the
// tiles, too, where totals begin.
//
// Two kernels differ in what they expand at a time. `amx` takes a step, which the first-level cache holds twice,
// for the rows of a band. `amx_many` takes a chunk of 1024 columns into the second-level cache, for 256 rows and
// up to 8 blocks, whose 512 KiB of x stay there; totals of 64 x 64 stay in the first level over a chunk.
//
// Blocking and order were measured in sketches on a Xeon (2 MiB second-level cache), 4096 x 4096, 2 threads,
// M = 64 / 256 / 1024, ms: the first one 1.21-1.40, 4.65-5.25, 19.6-21.2; the second 1.39-1.59, 4.56-4.90,
// 18.3-19.2; F.linear in bfloat16 2.3-2.5, 5.9, 18.7-20.9.
#include "bf16.h"
#include "gemm.h"
#include "tiles.h"

namespace {

using Here = Gemm<Bf16>;

constexpr int kColumns = 32;           // of a tile of x
constexpr int kRows = 2 * kTile;       // of x, and of W, in four tiles of sums
constexpr int kBand = 128;             // rows of a task of `amx`, whose totals take 32 KiB
constexpr int kManyTaskRows = 256;     // the same of `amx_many`
constexpr int kManyTaskBlocks = 8;
constexpr int kChunk = int4cpu::kChunkColumns;
constexpr int kMostSteps = kChunk / 32;
constexpr int kParts = 3;              // of a sum of x: 24 bits in numbers of 8

constexpr int64_t kTileElements = kTile * kColumns;   // 1 KiB
constexpr int64_t kXStep = 2 * kTileElements;         // 32 rows of x times 32 columns
constexpr int64_t kPanelStep = 4 * kTileElements;     // 64 rows of W times 32 columns
constexpr int64_t kSumStride = kRows * sizeof(float);
constexpr int64_t kTotalStride = Here::kBlock * sizeof(float);

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

// --- multiplication -------------------------------------------------------------------------------

// Steps of a block. Expanded: [32 columns][16 rows of W][pair of columns][row].
struct Part {
  Block block;
  int64_t step, step_end;
};

// 32 x 32 sums whose scales wait for the instructions of the next tiles, and where they go.
class Waiting {
 public:
  Waiting() { clear(); }

  inline __attribute__((always_inline)) void apply(int begin, int count) const {
    const __m512 left = _mm512_load_ps(scale_), right = _mm512_load_ps(scale_ + kTile);
#pragma GCC unroll 32
    for (int r = begin; r < begin + count; ++r) {
      const float* from = sums_[turn_ ^ 1] + r * kRows;
      float* to = totals_ + r * Here::kBlock;
      _mm512_store_ps(to, _mm512_fmadd_ps(left, _mm512_load_ps(from), _mm512_load_ps(to)));
      _mm512_store_ps(to + kTile, _mm512_fmadd_ps(right, _mm512_load_ps(from + kTile), _mm512_load_ps(to + kTile)));
    }
  }
  float* sums() { return sums_[turn_]; }  // for those that come next
  void put(const float* scale, float* totals) {
    scale_ = scale;
    totals_ = totals;
    turn_ ^= 1;
  }
  void finish() {
    apply(0, kRows);
    clear();
  }

 private:
  void clear() {
    scale_ = no_scale_;
    totals_ = nowhere_;
  }

  alignas(64) float sums_[2][kRows * kRows] = {};
  alignas(64) float nowhere_[kRows * Here::kBlock] = {};
  alignas(64) float no_scale_[kRows] = {};
  const float* scale_;
  float* totals_;
  int turn_ = 0;
};

// The expansion of a part, some pairs of columns at a time.
class Expansion {
 public:
  Expansion(const Problem& p, const Part& part, uint16_t* panel)
      : expand_(part.block.whole, part.block.column_bytes),
        bytes_(part.block.bytes + part.step * p.step * part.block.column_bytes),
        pair_bytes_(2 * part.block.column_bytes),
        pairs_((part.step_end - part.step) * p.step / 2),
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
  void rest() { some(pairs_); }
  int64_t pairs() const { return pairs_; }

 private:
  Bf16Expander expand_;
  const uint8_t* bytes_;
  int64_t pair_bytes_, pairs_;
  int64_t done_ = 0;
  uint16_t* panel_;
};

// 32 rows of x times 32 of W over a step: tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 of W. Of x the last
// 16 may be left out.
template <int Tiles, bool All>
void multiply_32(const uint16_t* x, const uint16_t* panel, Waiting& waiting, Expansion& next, int64_t pairs) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  if constexpr (All) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Tiles; ++i, x += kXStep, panel += kPanelStep) {
    TILE_LOAD(4, x, 64);
    TILE_LOAD(6, panel, 64);
    TILE_LOAD(7, panel + kTileElements, 64);
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    if constexpr (All) {
      TILE_LOAD(5, x + kTileElements, 64);
      TILE_DOT(2, 5, 6);
      TILE_DOT(3, 5, 7);
    }
    waiting.apply(i * (kRows / Tiles), kRows / Tiles);
    next.some(pairs);
  }
  float* const sums = waiting.sums();
  TILE_STORE(0, sums, kSumStride);
  TILE_STORE(1, sums + kTile, kSumStride);
  if constexpr (All) {
    TILE_STORE(2, sums + kTile * kRows, kSumStride);
    TILE_STORE(3, sums + kTile * kRows + kTile, kSumStride);
  }
}

// Rows of a task times an expanded part, 64 at a time, while the whole of the next one is expanded. `scale` is that of its
// steps, `totals` of the rows; what was computed last waits.
template <int Tiles>
void multiply_part(const Problem& p, const Task& t, const Part& part, const uint16_t* panel,
                   const float (*scale)[Here::kBlock], float* totals, Waiting& waiting, Expansion next) {
  const int64_t steps = part.step_end - part.step;
  const int64_t calls = steps * ((t.row_end - t.row + kRows - 1) / kRows) * 2 * Tiles;
  const int64_t pairs = (next.pairs() + calls - 1) / calls;  // at each
  for (int64_t first = t.row; first < t.row_end; first += 2 * kRows) {
    const int64_t end = first + 2 * kRows < t.row_end ? first + 2 * kRows : t.row_end;
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t row = first; row < end; row += kRows) {
        const uint16_t* x = ByTiles::tiles(p, part.step + s, row);
        for (int half = 0; half < 2; ++half) {
          const uint16_t* w = panel + s * Tiles * kPanelStep + half * kXStep;
          if (end - row > kTile) {
            multiply_32<Tiles, true>(x, w, waiting, next, pairs);
          } else {
            multiply_32<Tiles, false>(x, w, waiting, next, pairs);
          }
          waiting.put(scale[s] + half * kRows, totals + (row - t.row) * Here::kBlock + half * kRows);
        }
      }
    }
  }
}

void load_scales(const Problem& p, const Part& part, float (*to)[Here::kBlock]) {
  for (int64_t s = part.step; s < part.step_end; ++s, ++to) {
    Here::prefetch_qparams(p, part.block, Here::group_of(p, s));
    const Here::QParams q = Here::qparams(p, part.block, Here::group_of(p, s));
    for (int v = 0; v < 4; ++v) _mm512_store_ps(*to + v * kTile, q.scale[v]);
  }
}

// Totals begin as the sums of x times the zeros of the task's steps. A float16 zero is two bfloat16 numbers.
void begin_totals(const Problem& p, const Task& t, const Block& block, float* totals) {
  const bool halves = p.qparams_dtype == int4cpu::kFloat16;
  alignas(64) uint16_t zeros[2][kPanelStep];
  memset(totals, 0, (t.row_end - t.row + kRows - 1) / kRows * kRows * kTotalStride);
  for (int64_t tile = t.step / kColumns; tile * kColumns < t.step_end; ++tile) {
    for (int pair = 0; pair < kTile; ++pair) {
      __m512i both[2][4];  // of two steps: the high and what is left of each zero
      for (int i = 0; i < 2; ++i) {
        const int64_t s = tile * kColumns + 2 * pair + i;
        Here::QParams q = {};
        if (s >= t.step && s < t.step_end) q = Here::qparams(p, block, Here::group_of(p, s));
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
        float* to = totals + (row - t.row) * Here::kBlock + half * kRows;
        TILE_LOAD(0, to, kTotalStride);
        TILE_LOAD(1, to + kTile, kTotalStride);
        TILE_LOAD(2, to + kTile * Here::kBlock, kTotalStride);
        TILE_LOAD(3, to + kTile * Here::kBlock + kTile, kTotalStride);
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
        TILE_STORE(0, to, kTotalStride);
        TILE_STORE(1, to + kTile, kTotalStride);
        TILE_STORE(2, to + kTile * Here::kBlock, kTotalStride);
        TILE_STORE(3, to + kTile * Here::kBlock + kTile, kTotalStride);
      }
    }
  }
}

// Calls body<Tiles>() for the tiles of a step, with tiles to use.
template <class Body>
void with_tiles(const Problem& p, const Body& body) {
  const TileConfig config;
  TILE_BEGIN(config);  // each thread has its own, and others may have changed it
  switch (p.step / kColumns) {
    case 1:
      body.template operator()<1>();
      break;
    case 2:
      body.template operator()<2>();
      break;
    default:
      body.template operator()<4>();
  }
  TILE_END();
}

// --- a step at a time -----------------------------------------------------------------------------

template <int Tiles>
void multiply_with(const Problem& p, const Task& t, float* totals) {
  alignas(64) uint16_t panel[2][Tiles * kPanelStep];
  alignas(64) float scale[2][1][Here::kBlock];
  const Block block = Here::block_at(p, t.block);
  const auto part_at = [&](int64_t s) {
    return Part{block, s, s < t.step_end ? s + 1 : s};
  };
  begin_totals(p, t, block, totals);
  Expansion(p, part_at(t.step), panel[0]).rest();
  Waiting waiting;
  for (int64_t s = t.step, turn = 0; s < t.step_end; ++s, turn ^= 1) {
    load_scales(p, part_at(s), scale[turn]);
    multiply_part<Tiles>(p, t, part_at(s), panel[turn], scale[turn], totals, waiting,
                         Expansion(p, part_at(s + 1), panel[turn ^ 1]));
  }
  waiting.finish();
}

void multiply(const Problem& p, const Task& t, float* totals) {
  with_tiles(p, [&]<int Tiles>() { multiply_with<Tiles>(p, t, totals); });
}

// --- a chunk at a time, of several blocks ---------------------------------------------------------

struct Scratch {
  alignas(64) uint16_t panel[2][kChunk * Here::kBlock];
  alignas(64) float totals[kManyTaskBlocks][kManyTaskRows * Here::kBlock];
  alignas(64) float scale[2][kMostSteps][Here::kBlock];
};

template <int Tiles>
void run_with(const Problem& p, const Task& t, Scratch& scratch) {
  const int64_t blocks = t.block_end - t.block;
  const int64_t count = (p.steps + p.chunk_steps - 1) / p.chunk_steps * blocks;
  const auto part_at = [&](int64_t i) {  // of no steps beyond the last one
    const int64_t step = i / blocks * p.chunk_steps, end = step + p.chunk_steps;
    const Block block = Here::block_at(p, t.block + i % blocks);
    return i < count ? Part{block, step, end < p.steps ? end : p.steps} : Part{block, 0, 0};
  };
  Expansion(p, part_at(0), scratch.panel[0]).rest();
  Waiting waiting;
  for (int64_t i = 0; i < count; ++i) {
    const Part part = part_at(i);
    float* const totals = scratch.totals[i % blocks];
    auto* const scale = scratch.scale[i % 2];
    if (part.step == 0) begin_totals(p, t, part.block, totals);
    load_scales(p, part, scale);
    multiply_part<Tiles>(p, t, part, scratch.panel[i % 2], scale, totals, waiting,
                         Expansion(p, part_at(i + 1), scratch.panel[(i + 1) % 2]));
    if (part.step_end < p.steps) continue;
    waiting.finish();
    const int64_t index = t.block + i % blocks;
    Here::store(p, {t.row, t.row_end, index, 0, p.steps, index + 1}, totals);
  }
}

void run(const Problem& p, const Task& t, void* memory) {
  with_tiles(p, [&]<int Tiles>() { run_with<Tiles>(p, t, *static_cast<Scratch*>(memory)); });
}

int64_t spin(int64_t rounds) {
  SPIN_TILES(rounds, TILE_DOT);
  return INT64_C(2) * 4 * kTile * kTile * kColumns;
}

}  // namespace

// Up to 16 rows have the same bits on every CPU, which the kernels of integers see to.
constexpr int32_t kLeastRows = 17;

const int4cpu::Kernel int4cpu::kAmx = {
    .name = "amx",
    .block_rows = Here::kBlock,
    .max_step = Bf16::kMaxStep,
    .element_bytes = sizeof(Bf16::Element),
    .record_bytes = kParts * sizeof(Bf16::Element),
    .record_steps = kColumns,
    .row_multiple = kRows,
    .task_rows = kBand,
    .tile_rows = kRows,
    .chunk_columns = 0,
    .least_rows = kLeastRows,
    .pack_rows = &pack_rows,
    .multiply = &multiply,
    .store = &Here::store,
    .spin = &spin,
};

const int4cpu::Kernel int4cpu::kAmxMany = {
    .name = "amx_many",
    .block_rows = Here::kBlock,
    .max_step = Bf16::kMaxStep,
    .element_bytes = sizeof(Bf16::Element),
    .record_bytes = kParts * sizeof(Bf16::Element),
    .record_steps = kColumns,
    .row_multiple = kRows,
    .task_rows = kManyTaskRows,
    .tile_rows = kRows,
    .chunk_columns = kChunk,
    .least_rows = 1,
    .pack_rows = &pack_rows,
    .multiply = nullptr,
    .store = nullptr,
    .run = &run,
    .task_blocks = kManyTaskBlocks,
    .scratch_bytes = sizeof(Scratch),
    .spin = &spin,
};
