// Work items shared out among threads; they live as long as the call, so that a fork finds none.
#ifndef S2D_CPU_THREADS_H_
#define S2D_CPU_THREADS_H_

#include <stdint.h>

#include <atomic>
#include <thread>

namespace s2d_cpu {

constexpr int kMaxThreads = 256;

// work(item, thread) for every item in 0..count-1, each taken by whichever thread is free, in ascending order.
template <typename Work>
void share_out(int32_t count, int32_t threads, const Work& work) {
  std::atomic<int32_t> next{0};
  const auto labour = [&](int32_t thread) {
    for (int32_t item = next++; item < count; item = next++) work(item, thread);
  };
  std::thread others[kMaxThreads];
  int32_t started = 0;
  try {
    for (; started + 1 < threads && started + 1 < count; ++started) others[started] = std::thread(labour, started + 1);
  } catch (...) {
    // The system gives no more threads, or no memory for them: fewer do the same work.
  }
  labour(0);
  for (int32_t i = 0; i < started; ++i) others[i].join();
}

}  // namespace s2d_cpu

#endif  // S2D_CPU_THREADS_H_
