#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "integer_kernels.h"
#include "kernels.h"
#include "s2d_cpu.h"
#include "threads.h"

namespace s2d_cpu {

namespace {

// 0: baseline, 1: avx2, 2: avx512, 3: avx512_vnni, 4: avx512_vnni_pairs.
int level() {
#ifdef S2D_CPU_X86
  const char* const names[] = {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_vnni_pairs"};
  const char* wanted = getenv("S2D_CPU_CAPABILITY");
  __builtin_cpu_init();
  // Pairs replace a product by two additions, which AMD's cores do on units of their own, Intel's on the multipliers'.
  int most = __builtin_cpu_is("amd") ? 4 : 3;
  for (int i = 0; i < 5; ++i)
    if (wanted && !strcmp(wanted, names[i])) most = i;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
  const int best = avx512 ? (__builtin_cpu_supports("avx512vnni") ? 4 : 2) : avx2 ? 1 : 0;
  return best < most ? best : most;
#else
  return 0;
#endif
}

const Kernels& choose() {
#ifdef S2D_CPU_X86
  if (level() >= 2) return kernels_avx512;
  if (level() == 1) return kernels_avx2;
#endif
  return kernels_baseline;
}

const IntegerKernels& choose_integer() {
#ifdef S2D_CPU_X86
  if (level() == 4) return integer_avx512_vnni_pairs;
  if (level() == 3) return integer_avx512_vnni;
  if (level() == 2) return integer_avx512;
  if (level() == 1) return integer_avx2;
#endif
  return integer_baseline;
}

std::atomic<bool> forked{false};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

Parallel openmp() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const IntegerKernels& integer_kernels() {
  static const IntegerKernels& chosen = choose_integer();
  return chosen;
}

}  // namespace s2d_cpu

int s2d_cpu_abi_version(void) { return S2D_CPU_ABI_VERSION; }

const char* s2d_cpu_capability(void) { return s2d_cpu::integer_kernels().name; }
