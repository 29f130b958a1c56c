// AVX-512 with bfloat16 dot products (Zen 4 and on, Sapphire Rapids and on).
#include "bf16.h"
#include "gemm.h"

namespace {

using Here = Gemm<Bf16>;

}  // namespace

const int4cpu::Kernel int4cpu::kAvx512Bf16 = {
    .name = "avx512_bf16",
    .block_rows = Here::kBlock,
    .max_step = Bf16::kMaxStep,
    .element_bytes = sizeof(Bf16::Element),
    .record_bytes = sizeof(float),
    .row_multiple = 1,
    .task_rows = int4cpu::kMaxTaskRows,
    .tile_rows = Bf16::kTileRows,
    .chunk_columns = 0,
    .pack_rows = &Here::pack_rows,
    .multiply = &Here::multiply,
    .store = &Here::store,
    .spin = &Here::spin,
};
