// AMX: 16 rows of x times 16 rows of W times 32 columns in one instruction.
//
// The expanded panel and the packed activation of the AVX-512 kernel have the order that the tiles
// want. Sums of a step leave the tiles through memory, and meet scale and zero there.
#include "bf16.h"
#include "gemm.h"
#include "tiles.h"

namespace {

using Here = Gemm<Bf16>;

constexpr int kTileColumns = 32;  // bfloat16 values in a row of a tile
constexpr int kRows = 2 * kTile;  // rows of x that share one read of the panel

constexpr int64_t kPanelStride = 4 * 64;            // bytes from one pair of columns to the next
constexpr int64_t kSumStride = Here::kBlock * 4;    // bytes from one row of sums to the next

// 17 to 32 rows of x times 32 rows of W: tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 of W.
void multiply_32(const uint16_t* x, const char* panel, int32_t step, float* sums) {
  const int64_t x_stride = step * 2;
  const uint16_t* x_below = x + kTile * step;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int32_t k = 0; k < step; k += kTileColumns, panel += kTile * kPanelStride) {
    TILE_LOAD(4, x + k, x_stride);
    TILE_LOAD(6, panel, kPanelStride);
    TILE_LOAD(7, panel + 64, kPanelStride);
    TILE_DOT(0, 4, 6);
    TILE_DOT(1, 4, 7);
    TILE_LOAD(5, x_below + k, x_stride);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
  }
  TILE_STORE(0, sums, kSumStride);
  TILE_STORE(1, sums + kTile, kSumStride);
  TILE_STORE(2, sums + kTile * Here::kBlock, kSumStride);
  TILE_STORE(3, sums + kTile * Here::kBlock + kTile, kSumStride);
}

// Up to 16 rows of x times 64 rows of W: tiles 0 to 3 are sums, 4 rows of x, 5 to 7 (and 5) of W.
void multiply_16(const uint16_t* x, const char* panel, int32_t step, float* sums) {
  const int64_t x_stride = step * 2;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int32_t k = 0; k < step; k += kTileColumns, panel += kTile * kPanelStride) {
    TILE_LOAD(4, x + k, x_stride);
    TILE_LOAD(5, panel, kPanelStride);
    TILE_LOAD(6, panel + 64, kPanelStride);
    TILE_LOAD(7, panel + 128, kPanelStride);
    TILE_DOT(0, 4, 5);
    TILE_LOAD(5, panel + 192, kPanelStride);
    TILE_DOT(1, 4, 6);
    TILE_DOT(2, 4, 7);
    TILE_DOT(3, 4, 5);
  }
  TILE_STORE(0, sums, kSumStride);
  TILE_STORE(1, sums + kTile, kSumStride);
  TILE_STORE(2, sums + 2 * kTile, kSumStride);
  TILE_STORE(3, sums + 3 * kTile, kSumStride);
}

void multiply(const Problem& p, const Task& t, float* totals) {
  const int64_t rows = t.row_end - t.row;
  const Block block = Here::block_at(p, t.block);
  memset(totals, 0, sizeof(float) * rows * Here::kBlock);
  alignas(64) __m512i panel[Bf16::kMaxStep / Bf16::kDepth * 4];
  alignas(64) float sums[kRows * Here::kBlock];
  const char* panel_bytes = reinterpret_cast<const char*>(panel);
  const TileConfig config;
  TILE_BEGIN(config);  // each thread has its own, and others may have changed it
  for (int64_t s = t.step; s < t.step_end; ++s) {
    Here::expand_step(p, block, s, panel);
    const Here::QParams q = Here::qparams(p, block, Here::group_of(p, s));
    for (int64_t row = t.row; row < t.row_end; row += kRows) {
      const int64_t count = t.row_end - row < kRows ? t.row_end - row : kRows;
      const uint16_t* x = Here::packed_row(p, s, row);
      if (count > kTile) {
        multiply_32(x, panel_bytes, p.step, sums);
        multiply_32(x, panel_bytes + 128, p.step, sums + kRows);
      } else {
        multiply_16(x, panel_bytes, p.step, sums);
      }
      for (int64_t r = 0; r < count; ++r) {
        __m512 acc[1][4];
        for (int v = 0; v < 4; ++v) acc[0][v] = Bf16::load(sums + r * Here::kBlock + v * kTile);
        Here::apply<1>(q, acc, Here::sums(p) + s * p.packed_rows + row + r,
                       totals + (row - t.row + r) * Here::kBlock);
      }
    }
  }
  TILE_END();
}

int64_t spin(int64_t rounds) {
  SPIN_TILES(rounds, TILE_DOT);
  return INT64_C(2) * 4 * kTile * kTile * kTileColumns;
}

}  // namespace

// Up to 16 rows have the same bits on every CPU, which the kernels of integers see to.
constexpr int32_t kLeastRows = 17;

const int4cpu::Kernel int4cpu::kAmx = {
    .name = "amx",
    .block_rows = Here::kBlock,
    .max_step = Bf16::kMaxStep,
    .element_bytes = sizeof(Bf16::Element),
    .record_bytes = sizeof(float),
    .row_multiple = kTile,
    .task_rows = 128,  // whose totals, 32 KiB, stay near: M = 256 on a Xeon 6.4 ms with 256 rows, 5.0 with 128
    .tile_rows = kRows,
    .chunk_columns = 0,
    .least_rows = kLeastRows,
    .pack_rows = &Here::pack_rows<Here::ByRows>,
    .multiply = &multiply,
    .store = &Here::store,
    .spin = &spin,
};
