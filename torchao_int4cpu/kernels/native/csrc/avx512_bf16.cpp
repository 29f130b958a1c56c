// AVX-512 with bfloat16 dot products (Zen 4 and on, Sapphire Rapids and on).
#include "bf16.h"
#include "gemm.h"

namespace {

using Here = Gemm<Bf16>;

}  // namespace

const int4cpu::Kernel int4cpu::kAvx512Bf16 = {
    "avx512_bf16",   Here::kBlock, Bf16::kMaxStep, sizeof(Bf16::Element), 1, 528,
    Bf16::kTileRows, &Here::pack_rows, &Here::multiply, &Here::store,
    &Here::spin};
