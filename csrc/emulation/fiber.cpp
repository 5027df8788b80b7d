// A switch of context costs a few nanoseconds in assembly (x86-64, aarch64); elsewhere ucontext, whose signal-mask
// system calls make it about a hundred times slower.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define S2D_ASAN 1
#else
#define S2D_ASAN 0
#endif

#if !defined(S2D_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define S2D_UCONTEXT
#endif

#ifdef S2D_UCONTEXT
#include <ucontext.h>
#else
// Saves the callee-saved registers on the current stack, its pointer in *from, and continues with the stack `to`.
extern "C" void s2d_switch_stack(void** from, void* to);
#endif

#if defined(S2D_UCONTEXT)
#elif defined(__x86_64__)
asm(R"(
.text
.hidden s2d_switch_stack
.globl s2d_switch_stack
.type s2d_switch_stack, @function
s2d_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size s2d_switch_stack, .-s2d_switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden s2d_switch_stack
.globl s2d_switch_stack
.type s2d_switch_stack, %function
s2d_switch_stack:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size s2d_switch_stack, .-s2d_switch_stack
)");
#endif

namespace s2d::emulation {
namespace {

constexpr std::size_t kStackBytes = S2D_ASAN ? 512 * 1024 : 128 * 1024;
// Locals of a kernel lie in the first few KiB: poisoned per block, so that one read before it is written shows.
constexpr std::size_t kPoisonedBytes = 4096;

}  // namespace

struct Fiber::Context {
  char* mapping = nullptr;  // a page without access, then the stack: an overflow faults instead of corrupting
  std::size_t page = 0;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
#ifdef S2D_UCONTEXT
  ucontext_t own, scheduler;
#else
  void* own = nullptr;
  void* scheduler = nullptr;
#endif
#if S2D_ASAN
  void* own_fake_stack = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  std::size_t scheduler_bytes = 0;
#endif

  char* stack() const { return mapping + page; }
};

namespace {

// The context that `resume` starts: a fresh stack has no other way to learn it.
void* starting = nullptr;

}  // namespace

Fiber::Fiber() : context_(new Context) {
  context_->page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* mapping = mmap(nullptr, context_->page + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    delete context_;
    throw std::bad_alloc();
  }
  context_->mapping = static_cast<char*>(mapping);
  mprotect(mapping, context_->page, PROT_NONE);
}

Fiber::~Fiber() {
#if S2D_ASAN
  __asan_unpoison_memory_region(context_->stack(), kStackBytes);
#endif
  munmap(context_->mapping, context_->page + kStackBytes);
  delete context_;
}

void Fiber::prepare(void (*entry)(void*), void* argument) {
  Context& context = *context_;
  context.entry = entry;
  context.argument = argument;
  char* top = context.stack() + kStackBytes;
#if S2D_ASAN
  __asan_unpoison_memory_region(context.stack(), kStackBytes);
  context.own_fake_stack = nullptr;
#endif
  std::memset(top - kPoisonedBytes, 0xff, kPoisonedBytes);

  void (*start)() = [] {
    auto& context = *static_cast<Context*>(starting);
#if S2D_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &context.scheduler_bottom, &context.scheduler_bytes);
#endif
    context.entry(context.argument);
    __builtin_trap();  // an entry ends with leave(true)
  };
#if defined(S2D_UCONTEXT)
  getcontext(&context.own);
  context.own.uc_stack.ss_sp = context.stack();
  context.own.uc_stack.ss_size = kStackBytes;
  context.own.uc_link = nullptr;
  makecontext(&context.own, start, 0);
#elif defined(__x86_64__)
  // Six registers, the address that ret takes, and a null return address: 16-byte aligned as after a call.
  auto* words = reinterpret_cast<std::uintptr_t*>(top) - 8;
  std::memset(words, 0, 8 * sizeof *words);
  words[6] = reinterpret_cast<std::uintptr_t>(start);
  context.own = words;
#else
  auto* words = reinterpret_cast<std::uintptr_t*>(top) - 20;
  std::memset(words, 0, 20 * sizeof *words);
  words[1] = reinterpret_cast<std::uintptr_t>(start);
  context.own = words;
#endif
}

void Fiber::resume() {
  Context& context = *context_;
  starting = &context;
#if S2D_ASAN
  __sanitizer_start_switch_fiber(&context.scheduler_fake_stack, context.stack(), kStackBytes);
#endif
#ifdef S2D_UCONTEXT
  swapcontext(&context.scheduler, &context.own);
#else
  s2d_switch_stack(&context.scheduler, context.own);
#endif
#if S2D_ASAN
  __sanitizer_finish_switch_fiber(context.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave([[maybe_unused]] bool finished) {
  Context& context = *context_;
#if S2D_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &context.own_fake_stack, context.scheduler_bottom,
                                 context.scheduler_bytes);
#endif
#ifdef S2D_UCONTEXT
  swapcontext(&context.own, &context.scheduler);
#else
  s2d_switch_stack(&context.own, context.scheduler);
#endif
#if S2D_ASAN
  __sanitizer_finish_switch_fiber(context.own_fake_stack, &context.scheduler_bottom, &context.scheduler_bytes);
#endif
}

}  // namespace s2d::emulation
