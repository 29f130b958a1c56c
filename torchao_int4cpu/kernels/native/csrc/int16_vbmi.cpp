// 16-bit products with AVX-512 VNNI and VBMI (Ice Lake and Zen 4 on).
#include "vbmi.h"

const int4cpu::Kernel int4cpu::kInt16Vbmi = int16_kernel<Vbmi>("int16_vbmi");
