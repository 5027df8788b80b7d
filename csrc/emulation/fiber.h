// Fibers: the threads of an emulated block. One runs at a time, until it gives control back.
#pragma once

#include <cstddef>

namespace s2d::emulation {

// A stack and a saved context, kept for the next block once its entry has finished or was abandoned.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Prepares entry(argument) to start at the next resume; what ran here before is forgotten.
  void prepare(void (*entry)(void*), void* argument);
  // From the scheduler: runs the fiber until it calls leave.
  void resume();
  // From the fiber: back to the scheduler. The last time, `finished` says that it will not be resumed.
  void leave(bool finished);

 private:
  struct Context;
  Context* context_;
};

}  // namespace s2d::emulation
