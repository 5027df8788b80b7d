// Blocks, barriers and warps on one CPU core: what the intrinsics of intrinsics.h are made of.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

#pragma GCC visibility push(default)
extern "C" {
// Order in which the threads of a block, and the blocks, run: 0 forward, 1 reverse, 2 random from `seed`. Returns an
// s2d_status.
int s2d_emulation_set_order(int order, std::uint64_t seed);
// Shared memory of a block, 0 to leave it as it is; returns what it was.
std::size_t s2d_emulation_set_shared_limit(std::size_t bytes);
// Multiprocessors, which bound the blocks of a cooperative launch; 0 to leave them as they are; returns what they were.
int s2d_emulation_set_multiprocessors(int count);
// The most blocks of a cooperative launch since the last call of this function.
int s2d_emulation_cooperative_blocks(void);
// Why the last launch failed, until the next call of this function; empty when none did.
const char* s2d_emulation_error(void);
}
#pragma GCC visibility pop

// Set by the scheduler before it resumes a thread.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace s2d::emulation {

struct LaunchSize {
  dim3 grid, block;
  std::size_t shared_bytes;
  bool cooperative;  // all blocks run together, so that they can wait for one another
};

// Runs kernel(arguments) once for each thread of the grid. False with a message in s2d_emulation_error when the launch
// is refused or a thread does something CUDA leaves undefined. One launch runs at a time in a process.
bool run(const LaunchSize& size, void (*kernel)(const void*), const void* arguments);

// Where a thread waits: threads of a block that wait at different lines diverged.
struct Site {
  const char* name;
  const char* file;
  int line;
};

enum class Vote { kAny, kAll, kCount };

// The calls below are for code inside a kernel.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
int block_barrier(const Site& site, Vote vote, bool predicate);
void grid_barrier(const Site& site);
void yield();
unsigned lane();

// The threads of `mask` meet; the last to arrive calls complete(operands of the 32 lanes, null for absent ones).
using Complete = void (*)(void* const* operands, unsigned mask);
void warp_collective(const Site& site, unsigned mask, void* operand, Complete complete);

void* dynamic_shared();
// The block's variable declared at `key`, poisoned when the block first asks for it.
void* static_shared(const void* key, std::size_t bytes);

// Copies happen as late as allowed, at the wait, and never without one, so that a missing wait leaves poison behind.
void copy_async(void* shared, const void* global, std::size_t bytes, std::size_t source_bytes);
void copy_async_commit();
void copy_async_wait(unsigned pending_groups);

inline void check_aligned(const void* pointer, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0)
    fail("%s of %zu bytes at %p is misaligned", what, bytes, pointer);
}

}  // namespace s2d::emulation
