// CUDA on one CPU core: enough of the language for csrc to be executed by the tests of a machine without a GPU.
// Threads of a block are fibers that run in an order the test chooses; see runtime.h. Never part of a release.
//
// What it cannot see: a thread runs alone until its next barrier or shuffle, and blocks of a plain launch run one after
// another. So a plain read-modify-write where an atomic is needed, a race of two blocks, a missing __threadfence pass
// here; compute-sanitizer on a GPU (make gpu-sanitize) and reading are what finds those. A barrier that is missing
// between blocks of a cooperative launch shows in the forward and the reverse order.
#pragma once

#include <tuple>
#include <type_traits>

#include "../s2d.h"
#include "intrinsics.h"
#include "mma.h"
#include "runtime.h"

// The counterparts of common.cuh's macros for nvcc.
#define S2D_GRID_CONSTANT(type) const type&
#define S2D_SHARED(type, name, ...)            \
  typedef type name##_shared_type __VA_ARGS__; \
  static char name##_shared_key;               \
  auto& name =                                 \
      *static_cast<name##_shared_type*>(s2d::emulation::static_shared(&name##_shared_key, sizeof(name##_shared_type)))
#define S2D_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(s2d::emulation::dynamic_shared())
