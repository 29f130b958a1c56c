// AVX-512 with bfloat16 dot products (Zen 4 and on, Sapphire Rapids and on).
#include "bf16.h"
#include "gemm.h"
#include "transposed.h"

namespace {

using Here = Gemm<Bf16>;

}  // namespace

// A 4096 x 4096 weight, 2 threads of a Zen 5, this kernel against int16_vbmi in groups of 128 / 32:
// M = 16: 0.95 / 1.02, M = 24: 0.95 / 1.03, M = 32: 0.99 / 1.08, M = 64: 1.08 / 1.13. In between the
// integers are preferred, which do not round x to bfloat16.
constexpr int32_t kLeastRows = 32;

const int4cpu::Kernel int4cpu::kAvx512Bf16 = {
    .name = "avx512_bf16",
    .block_rows = Here::kBlock,
    .max_step = Bf16::kMaxStep,
    .element_bytes = sizeof(Bf16::Element),
    .record_bytes = sizeof(float),
    .row_multiple = 1,
    .task_rows = 264,  // 66 KiB of totals; 528 rows took 1.00 to 1.02 of the time, 96 and 144 1.00 to 1.03
    .tile_rows = Bf16::kTileRows,
    .chunk_columns = 0,
    .least_rows = kLeastRows,
    .pack_rows = &Here::pack_rows<Here::ByRows>,
    .multiply = &Here::multiply,
    .store = &Here::store,
    .spin = &Here::spin,
};

const int4cpu::Kernel int4cpu::kTransposedAvx512Bf16 =
    transposed_kernel<Bf16Transposed>("transposed_avx512_bf16", &Here::spin);
