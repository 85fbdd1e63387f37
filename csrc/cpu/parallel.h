// Shares numbered pieces of work among threads. Plain std::thread: a second OpenMP runtime beside torch's
// would fight with it over the cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace vfmvae {

// Calls body(item, worker) once for every item in [0, items), with worker in [0, threads). `body` must not
// throw.
template <typename Body>
void parallel_for(int64_t items, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t item = next++; item < items; item = next++) body(item, worker);
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int worker = 1; worker < threads && worker < items; ++worker) others.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // The system gives no more threads; those that run share the items among them.
  }
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace vfmvae
