#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "s2d_cpu.h"

namespace s2d_cpu {

namespace {

const Kernels& choose() {
#ifdef S2D_CPU_X86
  const char* wanted = getenv("S2D_CPU_CAPABILITY");
  const auto allowed = [wanted](const char* name) { return wanted == nullptr || *wanted == 0 || strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return kernels_avx512;
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    return kernels_avx2;
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace s2d_cpu

int s2d_cpu_abi_version(void) { return S2D_CPU_ABI_VERSION; }

const char* s2d_cpu_capability(void) { return s2d_cpu::kernels().name; }
