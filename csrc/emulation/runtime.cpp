#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace s2d::emulation {
namespace {

constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kSharedAlignment = 1024;
// Of a block, static and dynamic together: sm_90's unless a test says another; static 48 KiB on every architecture.
std::size_t shared_limit = 227 * 1024;
int multiprocessors = 8;
std::atomic<int> cooperative_blocks = 0;
constexpr std::size_t kThreadsOfMultiprocessor = 2048;
constexpr std::size_t kStaticSharedLimit = 48 * 1024;
constexpr std::size_t kResidentThreadLimit = 16384;
constexpr int kYieldLimit = 10000;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating format
// NaN in fp32, bf16 and fp16 too, and not the poison: a read past the end shows, a write is found afterwards.
constexpr unsigned char kGuard[2] = {0xfd, 0x7f};

struct Error : std::exception {};

// Memory between two guard zones, with both found damaged after the block, or by AddressSanitizer at the access.
class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t bytes) : bytes_(bytes), whole_(2 * kGuardBytes + bytes) {
    const std::size_t rounded = (whole_ + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    base_ = static_cast<unsigned char*>(std::aligned_alloc(kSharedAlignment, rounded));
    if (base_ == nullptr) throw std::bad_alloc();
    poison();
  }
  ~GuardedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(base_, whole_);
#endif
    std::free(base_);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* data() const { return base_ + kGuardBytes; }
  std::size_t size() const { return bytes_; }

  void poison() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(base_, whole_);
#endif
    for (std::size_t i = 0; i < whole_; ++i) base_[i] = kGuard[i % 2];
    std::fill_n(data(), bytes_, kPoison);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(base_, kGuardBytes);
    __asan_poison_memory_region(data() + bytes_, kGuardBytes);
#endif
  }

  // Offset of a damaged guard byte from the start of the memory, or 0 when none is (0 is inside or, if empty, unused).
  std::ptrdiff_t damage() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (std::size_t i = 0; i < whole_; ++i) {
      if (i == kGuardBytes) i += bytes_;
      if (i < whole_ && base_[i] != kGuard[i % 2]) {
        const auto offset = static_cast<std::ptrdiff_t>(i) - static_cast<std::ptrdiff_t>(kGuardBytes);
        return offset != 0 ? offset : 1;
      }
    }
#endif
    return 0;
  }

  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_, whole_;
  unsigned char* base_;
};

struct Block;

struct Copy {
  void* shared;
  const void* global;
  std::size_t bytes, source_bytes;
  unsigned group;
};

enum class State { kRunnable, kBlockBarrier, kGridBarrier, kWarp, kExited };

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  unsigned rank = 0;
  State state = State::kExited;
  bool yielded = false;
  Site site{};
  unsigned mask = 0;
  void* operand = nullptr;
  Complete complete = nullptr;
  std::vector<Copy> copies;
  unsigned copy_group = 0;
};

struct Variable {
  const void* key;
  std::unique_ptr<GuardedMemory> memory;
};

struct Block {
  uint3 index{};
  std::vector<Thread*> threads;
  std::unique_ptr<GuardedMemory> dynamic;
  std::vector<Variable> variables;
  std::size_t static_bytes = 0;
  unsigned arrived = 0, voted = 0;
  int vote_result = 0;
};

// One launch at a time: ctypes drops the GIL, and the state of a launch is global as CUDA's built-in variables are.
std::mutex launch_mutex;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Block> blocks;  // that run together
Thread* current = nullptr;
void (*current_kernel)(const void*) = nullptr;
const void* current_arguments = nullptr;
std::size_t grid_arrived = 0, resident_threads = 0;

std::mutex setting_mutex;  // protects what the exported functions below set and read
int order = 0;
std::uint64_t order_seed = 0;
std::string last_error;

std::string message;  // of the running launch
bool failed = false;
std::uint64_t random_state = 0;

std::string formatted(const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string result = formatted(format, arguments);
  va_end(arguments);
  return result;
}

[[noreturn]] void refuse(const std::string& reason) {
  message = reason;
  throw Error();
}

std::uint64_t random_bits() {  // splitmix64
  std::uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void arrange(std::vector<std::size_t>& sequence, int how) {
  const std::size_t count = sequence.size();
  for (std::size_t i = 0; i < count; ++i) sequence[i] = how == 1 ? count - 1 - i : i;
  if (how == 2) {
    for (std::size_t i = count; i > 1; --i) std::swap(sequence[i - 1], sequence[random_bits() % i]);
  }
}

std::string place(const Site& site) { return text("%s (%s:%d)", site.name, site.file, site.line); }

std::string place(const Thread& thread) {
  return text("block (%u,%u,%u) thread (%u,%u,%u)", thread.block->index.x, thread.block->index.y, thread.block->index.z,
              thread.index.x, thread.index.y, thread.index.z);
}

bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Nothing can run any more: tells who waits where.
std::string describe_deadlock() {
  for (const Block& block : blocks) {
    std::vector<std::pair<Site, unsigned>> waiting;
    unsigned exited = 0;
    for (const Thread* thread : block.threads) {
      if (thread->state == State::kExited) {
        ++exited;
        continue;
      }
      auto found = std::find_if(waiting.begin(), waiting.end(), [&](auto& w) { return same(w.first, thread->site); });
      if (found == waiting.end()) {
        waiting.push_back({thread->site, 1});
      } else {
        ++found->second;
      }
    }
    if (waiting.empty()) continue;
    std::string report = text("divergent threads in block (%u,%u,%u):", block.index.x, block.index.y, block.index.z);
    for (const auto& [site, count] : waiting) report += text(" %u wait at %s,", count, place(site).c_str());
    return report + text(" %u have exited", exited);
  }
  return "no thread can run";
}

void wait(State state, const Site& site) {
  current->state = state;
  current->site = site;
  Thread* self = current;
  self->fiber.leave(false);
}

void release(Block& block, State from) {
  for (Thread* thread : block.threads) {
    if (thread->state == from) thread->state = State::kRunnable;
  }
}

void perform_copies(Thread& thread, unsigned groups) {
  auto due = [&](const Copy& copy) { return copy.group < groups; };
  for (const Copy& copy : thread.copies) {
    if (!due(copy)) continue;
    std::memcpy(copy.shared, copy.global, copy.source_bytes);
    std::memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), due), thread.copies.end());
}

// Completes the warp operation of `mask` when each of its threads that has not exited waits for it.
void try_complete(Thread* const* warp, unsigned warp_threads, unsigned mask, Complete complete) {
  void* operands[32] = {};
  unsigned present = 0;
  for (unsigned i = 0; i < warp_threads; ++i) {
    Thread& thread = *warp[i];
    if ((mask >> i & 1u) == 0 || thread.state == State::kExited) continue;
    if (thread.state != State::kWarp) return;
    if (thread.mask != mask || thread.complete != complete) {
      fail("threads of one warp wait for different operations: %s with mask %08x, but mask %08x at %s",
           place(thread).c_str(), thread.mask, mask, place(thread.site).c_str());
    }
    operands[i] = thread.operand;
    present |= 1u << i;
  }
  complete(operands, present);
  for (unsigned i = 0; i < warp_threads; ++i) {
    if (present >> i & 1u) warp[i]->state = State::kRunnable;
  }
}

Thread* const* warp_of(const Thread& thread, unsigned& warp_threads) {
  const unsigned first = thread.rank / 32 * 32;
  warp_threads = std::min<unsigned>(32, static_cast<unsigned>(thread.block->threads.size()) - first);
  return thread.block->threads.data() + first;
}

void thread_main(void* argument) {
  Thread& self = *static_cast<Thread*>(argument);
  current_kernel(current_arguments);
  self.state = State::kExited;
  unsigned warp_threads;
  Thread* const* warp = warp_of(self, warp_threads);
  for (unsigned i = 0; i < warp_threads; ++i) {
    if (warp[i]->state == State::kWarp) try_complete(warp, warp_threads, warp[i]->mask, warp[i]->complete);
  }
  self.fiber.leave(true);
}

void prepare_block(Block& block, uint3 index, std::size_t first_thread, const LaunchSize& size) {
  const unsigned count = size.block.x * size.block.y * size.block.z;
  block.index = index;
  block.arrived = block.voted = 0;
  block.threads.resize(count);
  if (block.dynamic) {
    block.dynamic->poison();
  } else {
    block.dynamic = std::make_unique<GuardedMemory>(size.shared_bytes);
  }
  block.variables.clear();
  block.static_bytes = 0;
  for (unsigned rank = 0; rank < count; ++rank) {
    Thread& thread = *threads[first_thread + rank];
    thread.block = &block;
    thread.rank = rank;
    thread.index = {rank % size.block.x, rank / size.block.x % size.block.y, rank / (size.block.x * size.block.y)};
    thread.state = State::kRunnable;
    thread.yielded = false;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.fiber.prepare(thread_main, &thread);
    block.threads[rank] = &thread;
  }
}

// Runs the prepared blocks to their end. In the forward and the reverse order a block runs as far as it can before the
// next one does, so that what others have not written yet is not there; in the random one all threads take turns.
void run_blocks(int how) {
  const std::size_t together = blocks.size(), block_threads = resident_threads / together;
  std::vector<std::size_t> sequence(resident_threads);
  grid_arrived = 0;
  int yields = 0;
  arrange(sequence, how);
  bool alive, ran, advanced;
  const auto run_range = [&](std::size_t first, std::size_t count) {
    bool any = false;
    for (std::size_t i = first; i < first + count; ++i) {
      Thread& thread = *threads[sequence[i]];
      alive |= thread.state != State::kExited;
      if (thread.state != State::kRunnable) continue;
      current = &thread;
      threadIdx = thread.index;
      blockIdx = thread.block->index;
      thread.yielded = false;
      thread.fiber.resume();
      if (failed) throw Error();
      ran = true;
      any |= !thread.yielded;
    }
    advanced |= any;
    return any;
  };
  while (true) {
    alive = ran = advanced = false;
    if (how == 2) {
      arrange(sequence, how);
      run_range(0, resident_threads);
    } else {
      for (std::size_t block = 0; block < together; ++block) {
        while (run_range(block * block_threads, block_threads)) {
        }
      }
    }
    if (!alive) return;
    if (!ran) refuse(describe_deadlock());
    yields = advanced ? 0 : yields + 1;
    if (yields > kYieldLimit) refuse("threads wait in a loop for something that no running block does");
  }
}

void check_guards(const Block& block) {
  auto check = [&](const GuardedMemory& memory, const char* kind) {
    if (const std::ptrdiff_t offset = memory.damage()) {
      refuse(text("out-of-bounds write to %s shared memory in block (%u,%u,%u): byte %td of %zu", kind, block.index.x,
                  block.index.y, block.index.z, offset, memory.bytes()));
    }
  };
  check(*block.dynamic, "dynamic");
  for (const Variable& variable : block.variables) check(*variable.memory, "static");
}

void check_size(const LaunchSize& size, std::size_t block_threads, std::size_t grid_blocks) {
  if (size.block.x > 1024 || size.block.y > 1024 || size.block.z > 64 || block_threads == 0 || block_threads > 1024) {
    refuse(text("a block of (%u,%u,%u) threads", size.block.x, size.block.y, size.block.z));
  }
  if (size.grid.x > 0x7fffffffu || size.grid.y > 65535 || size.grid.z > 65535 || grid_blocks == 0) {
    refuse(text("a grid of (%u,%u,%u) blocks", size.grid.x, size.grid.y, size.grid.z));
  }
  if (size.shared_bytes > shared_limit) refuse(text("%zu bytes of dynamic shared memory", size.shared_bytes));
  if (!size.cooperative) return;
  const std::size_t reserved = 1024;  // of shared memory, by the system for each block
  const std::size_t resident =
      static_cast<std::size_t>(multiprocessors) *
      std::min(kThreadsOfMultiprocessor / block_threads, (shared_limit + reserved) / (size.shared_bytes + reserved));
  if (grid_blocks > resident) {
    refuse(text("a cooperative grid of %zu blocks, of which %zu are resident together", grid_blocks, resident));
  }
  if (block_threads * grid_blocks > kResidentThreadLimit) {
    refuse(text("a cooperative grid of %zu threads: the emulation holds %zu", block_threads * grid_blocks,
                kResidentThreadLimit));
  }
}

void run_grid(const LaunchSize& size, int how) {
  const std::size_t block_threads = std::size_t{size.block.x} * size.block.y * size.block.z;
  const std::size_t grid_blocks = std::size_t{size.grid.x} * size.grid.y * size.grid.z;
  check_size(size, block_threads, grid_blocks);
  const std::size_t together = size.cooperative ? grid_blocks : 1;
  if (size.cooperative) cooperative_blocks = std::max(cooperative_blocks.load(), static_cast<int>(grid_blocks));
  resident_threads = together * block_threads;
  while (threads.size() < resident_threads) threads.push_back(std::make_unique<Thread>());
  blocks.clear();
  blocks.resize(together);
  blockDim = size.block;
  gridDim = size.grid;

  std::vector<std::size_t> sequence(grid_blocks);
  arrange(sequence, how);
  for (std::size_t first = 0; first < grid_blocks; first += together) {
    for (std::size_t b = 0; b < together; ++b) {
      const std::size_t flat = sequence[first + b];
      const uint3 index{static_cast<unsigned>(flat % size.grid.x),
                        static_cast<unsigned>(flat / size.grid.x % size.grid.y),
                        static_cast<unsigned>(flat / (std::size_t{size.grid.x} * size.grid.y))};
      prepare_block(blocks[b], index, b * block_threads, size);
    }
    run_blocks(how);
    for (const Block& block : blocks) check_guards(block);
  }
}

}  // namespace

bool run(const LaunchSize& size, void (*kernel)(const void*), const void* arguments) {
  std::lock_guard<std::mutex> launch(launch_mutex);
  int how;
  {
    std::lock_guard<std::mutex> setting(setting_mutex);
    how = order;
    random_state = order_seed;
  }
  current_kernel = kernel;
  current_arguments = arguments;
  failed = false;
  bool done = true;
  try {
    run_grid(size, how);
  } catch (const Error&) {
    done = false;
  } catch (const std::exception& error) {
    message = error.what();
    done = false;
  }
  blocks.clear();
  current = nullptr;
  if (!done) {
    std::lock_guard<std::mutex> setting(setting_mutex);
    last_error = message;
  }
  return done;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  message = place(*current) + ": " + formatted(format, arguments);
  va_end(arguments);
  failed = true;
  current->fiber.leave(true);
  std::abort();  // the scheduler never resumes a thread that failed
}

int block_barrier(const Site& site, Vote vote, bool predicate) {
  Block& block = *current->block;
  for (const Thread* thread : block.threads) {
    if (block.arrived == 0) break;
    if (thread->state == State::kBlockBarrier) {
      if (same(thread->site, site)) break;
      fail("divergent threads: waits at %s while %s waits at %s", place(site).c_str(), place(*thread).c_str(),
           place(thread->site).c_str());
    }
  }
  ++block.arrived;
  block.voted += predicate;
  if (block.arrived < block.threads.size()) {
    wait(State::kBlockBarrier, site);
    return block.vote_result;
  }
  // No thread can reach the next barrier's end before each has read this one's result.
  const unsigned count = block.voted;
  block.vote_result = static_cast<int>(vote == Vote::kCount ? count
                                       : vote == Vote::kAny ? count > 0
                                                            : count == block.arrived);
  block.arrived = block.voted = 0;
  release(block, State::kBlockBarrier);
  return block.vote_result;
}

void grid_barrier(const Site& site) {
  if (blocks.size() < std::size_t{gridDim.x} * gridDim.y * gridDim.z) {
    fail("%s in a launch of several blocks that is not cooperative", place(site).c_str());
  }
  if (++grid_arrived < resident_threads) {
    wait(State::kGridBarrier, site);
    return;
  }
  grid_arrived = 0;
  for (Block& block : blocks) release(block, State::kGridBarrier);
}

void yield() {
  Thread* self = current;
  self->yielded = true;
  self->fiber.leave(false);
}

unsigned lane() { return current->rank % 32; }

void warp_collective(const Site& site, unsigned mask, void* operand, Complete complete) {
  Thread& self = *current;
  if ((mask >> lane() & 1u) == 0) fail("%s with mask %08x, which has no bit of the caller", place(site).c_str(), mask);
  self.mask = mask;
  self.operand = operand;
  self.complete = complete;
  self.site = site;
  self.state = State::kWarp;
  unsigned warp_threads;
  Thread* const* warp = warp_of(self, warp_threads);
  try_complete(warp, warp_threads, mask, complete);
  if (self.state == State::kWarp) self.fiber.leave(false);
}

void* dynamic_shared() { return current->block->dynamic->data(); }

void* static_shared(const void* key, std::size_t bytes) {
  Block& block = *current->block;
  for (const Variable& variable : block.variables) {
    if (variable.key == key) return variable.memory->data();
  }
  block.static_bytes += bytes;
  if (block.static_bytes > kStaticSharedLimit) fail("%zu bytes of static shared memory", block.static_bytes);
  if (block.static_bytes + block.dynamic->size() > shared_limit) {
    fail("%zu bytes of static and %zu of dynamic shared memory", block.static_bytes, block.dynamic->size());
  }
  block.variables.push_back({key, std::make_unique<GuardedMemory>(bytes)});
  return block.variables.back().memory->data();
}

void copy_async(void* shared, const void* global, std::size_t bytes, std::size_t source_bytes) {
  check_aligned(shared, bytes, "cp.async to shared memory");
  check_aligned(global, bytes, "cp.async from global memory");
  current->copies.push_back({shared, global, bytes, source_bytes, current->copy_group});
}

void copy_async_commit() { ++current->copy_group; }

void copy_async_wait(unsigned pending_groups) {
  perform_copies(*current, current->copy_group - std::min(pending_groups, current->copy_group));
}

}  // namespace s2d::emulation

std::size_t s2d_emulation_set_shared_limit(std::size_t bytes) {
  const std::size_t before = s2d::emulation::shared_limit;
  if (bytes > 0) s2d::emulation::shared_limit = bytes;
  return before;
}

int s2d_emulation_set_multiprocessors(int count) {
  const int before = s2d::emulation::multiprocessors;
  if (count > 0) s2d::emulation::multiprocessors = count;
  return before;
}

int s2d_emulation_cooperative_blocks() { return s2d::emulation::cooperative_blocks.exchange(0); }

int s2d_emulation_set_order(int order, std::uint64_t seed) {
  if (order < 0 || order > 2) return 1;
  std::lock_guard<std::mutex> setting(s2d::emulation::setting_mutex);
  s2d::emulation::order = order;
  s2d::emulation::order_seed = seed;
  return 0;
}

const char* s2d_emulation_error(void) {
  static std::string returned;
  std::lock_guard<std::mutex> setting(s2d::emulation::setting_mutex);
  returned.swap(s2d::emulation::last_error);
  s2d::emulation::last_error.clear();
  return returned.c_str();
}
