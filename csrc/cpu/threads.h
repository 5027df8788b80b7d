// Work items shared out among threads: those of the process's OpenMP library, which torch's operations run on, else new
// ones that live as long as the call.
#ifndef S2D_CPU_THREADS_H_
#define S2D_CPU_THREADS_H_

#include <stdint.h>

#include <atomic>
#include <thread>

namespace s2d_cpu {

constexpr int kMaxThreads = 256;

// The entry of GCC's OpenMP library, where the process has it and was not forked, else null: the threads of a parent do
// not exist in its child. Threads that have just worked for torch wait for more with their processors in hand, which new
// threads would have to share with them.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel openmp();

// work(item, thread) for every item in 0..count-1, each taken by whichever thread is free, in ascending order.
template <typename Work>
void share_out(int32_t count, int32_t threads, const Work& work) {
  struct Shared {
    const Work& work;
    int32_t count, most;
    std::atomic<int32_t> item{0}, thread{0};
    void labour(int32_t own) {
      for (int32_t next = item++; next < count; next = item++) work(next, own);
    }
  } shared{work, count, threads < count ? threads : count};
  if (shared.most <= 1) return shared.labour(0);
  if (const Parallel parallel = openmp()) {
    // It may give fewer threads, which do the same work.
    const auto enter = [](void* data) {
      Shared& all = *static_cast<Shared*>(data);
      const int32_t own = all.thread++;
      if (own < all.most) all.labour(own);
    };
    return parallel(enter, &shared, static_cast<unsigned>(shared.most), 0);
  }
  std::thread others[kMaxThreads];
  int32_t started = 0;
  try {
    for (; started + 1 < shared.most; ++started)
      others[started] = std::thread([&shared, started] { shared.labour(started + 1); });
  } catch (...) {
    // The system gives no more threads, or no memory for them: fewer do the same work.
  }
  shared.labour(0);
  for (int32_t i = 0; i < started; ++i) others[i].join();
}

}  // namespace s2d_cpu

#endif  // S2D_CPU_THREADS_H_
