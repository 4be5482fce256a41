// Replaces torch's thread pool under ThreadSanitizer, which does not detect how OpenMP's threads wait for each other
// and would report every loop.
#include <cstdint>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) int32_t parallel_for(int64_t begin, int64_t end, int64_t,
                                                                       void (*function)(int64_t, int64_t, void*),
                                                                       void* context) {
  constexpr int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    const int64_t from = begin + (end - begin) * i / kThreads, to = begin + (end - begin) * (i + 1) / kThreads;
    if (from < to) threads.emplace_back([=] { function(from, to, context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
