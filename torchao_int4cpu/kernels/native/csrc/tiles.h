// The tiles of AMX: 8 registers of 16 rows of 64 bytes.
#pragma once

#include <string.h>

#include <cstdint>

namespace {

constexpr int kTile = 16;  // rows of a tile

// Layout of Intel's palette 1: bytes of a row and rows, for 8 tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

#ifndef INT4CPU_EMULATE_AMX

// Not the compiler's own macros: those tell it of 8 of the 64 bytes of the configuration, and do not
// tell it that a load of a tile reads memory, so it may move or drop what was written before.
#define TILE_BEGIN(config) __asm__ volatile("ldtilecfg %0" ::"m"(config))
#define TILE_END() __asm__ volatile("tilerelease" ::: "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_LOAD(tile, from, stride)                           \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), \
                   "r"(static_cast<int64_t>(stride))            \
                   : "memory")
#define TILE_STORE(tile, to, stride)                             \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), \
                   "r"(static_cast<int64_t>(stride))             \
                   : "memory")
// Pairs of bfloat16; four signed bytes of x and unsigned ones of w.
#define TILE_DOT(sum, x, w) \
  __asm__ volatile("tdpbf16ps %%tmm" #w ", %%tmm" #x ", %%tmm" #sum ::)
#define TILE_DOT_BYTES(sum, x, w) \
  __asm__ volatile("tdpbsud %%tmm" #w ", %%tmm" #x ", %%tmm" #sum ::)

#else

// The same instructions in plain C++, after Intel's manual, to test their kernels on a CPU without them.
union EmulatedTile {
  uint8_t bytes[kTile][64];
  uint16_t halves[kTile][32];
  int32_t integers[kTile][kTile];
  float floats[kTile][kTile];
};
thread_local EmulatedTile emulated[8];

inline float to_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void emulate_load(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < kTile; ++r) {
    memcpy(emulated[tile].bytes[r], static_cast<const char*>(from) + r * stride, 64);
  }
}

inline void emulate_store(int tile, void* to, int64_t stride) {
  for (int r = 0; r < kTile; ++r) {
    memcpy(static_cast<char*>(to) + r * stride, emulated[tile].bytes[r], 64);
  }
}

inline void emulate_dot(EmulatedTile& sum, const EmulatedTile& x, const EmulatedTile& w) {
  for (int k = 0; k < 32; ++k) {
    float column[kTile];
    for (int c = 0; c < kTile; ++c) column[c] = to_float(w.halves[k / 2][2 * c + k % 2]);
    for (int r = 0; r < kTile; ++r) {
      const float by = to_float(x.halves[r][k]);
      for (int c = 0; c < kTile; ++c) sum.floats[r][c] += by * column[c];
    }
  }
}

inline void emulate_dot_bytes(EmulatedTile& sum, const EmulatedTile& x, const EmulatedTile& w) {
  for (int k = 0; k < 64; ++k) {
    int32_t column[kTile];
    for (int c = 0; c < kTile; ++c) column[c] = w.bytes[k / 4][4 * c + k % 4];
    for (int r = 0; r < kTile; ++r) {
      const int32_t by = static_cast<int8_t>(x.bytes[r][k]);
      for (int c = 0; c < kTile; ++c) sum.integers[r][c] += by * column[c];
    }
  }
}

#define TILE_BEGIN(config) static_cast<void>(config)
#define TILE_END() static_cast<void>(0)
#define TILE_ZERO(tile) memset(&emulated[tile], 0, sizeof emulated[tile])
#define TILE_LOAD(tile, from, stride) emulate_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) emulate_store(tile, to, stride)
#define TILE_DOT(sum, x, w) emulate_dot(emulated[sum], emulated[x], emulated[w])
#define TILE_DOT_BYTES(sum, x, w) emulate_dot_bytes(emulated[sum], emulated[x], emulated[w])

#endif

// Multiplies tiles that lie in the first-level cache, four in each round, as a kernel at its best does. Not
// zeros, with which tiles are measurably faster.
#define SPIN_TILES(rounds, DOT)                   \
  do {                                            \
    const TileConfig config;                      \
    TILE_BEGIN(config);                           \
    TILE_ZERO(0);                                 \
    TILE_ZERO(1);                                 \
    TILE_ZERO(2);                                 \
    TILE_ZERO(3);                                 \
    alignas(64) uint8_t values[kTile * 64];       \
    memset(values, 0x3C, sizeof values);          \
    for (int64_t round = 0; round < (rounds); ++round) { \
      TILE_LOAD(4, values, 64);                   \
      TILE_LOAD(6, values, 64);                   \
      TILE_LOAD(7, values, 64);                   \
      DOT(0, 4, 6);                               \
      DOT(1, 4, 7);                               \
      TILE_LOAD(5, values, 64);                   \
      DOT(2, 5, 6);                               \
      DOT(3, 5, 7);                               \
    }                                             \
    TILE_END();                                   \
  } while (false)

}  // namespace
