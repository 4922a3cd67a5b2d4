// Splits work over threads that live for one call. No pool: the caller's own pool (torch's) keeps its threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace nk::cpu {

// Hands out the numbers 0..count-1, each once, to whoever asks first.
class WorkQueue {
public:
    explicit WorkQueue(size_t count) : count_(count) {}
    bool next(size_t& item) {
        item = taken_.fetch_add(1, std::memory_order_relaxed);
        return item < count_;
    }

private:
    std::atomic<size_t> taken_{0};
    size_t count_;
};

// Starting and joining a thread takes 20 to 100 us, the time of some 4 million int8 multiply-adds: no more threads than
// there are such portions of work. Only the order of magnitude of `multiply_adds` matters.
inline size_t useful_threads(int64_t threads, size_t multiply_adds) {
    constexpr size_t kPortion = size_t{1} << 22;
    return std::min(static_cast<size_t>(threads), 1 + multiply_adds / kPortion);
}

// Calls worker(queue) on up to `threads` threads (the calling one included) until the queue is empty; a worker keeps
// its scratch memory across the items it takes. The first exception is rethrown in the calling thread.
template <class Worker>
void parallel_for(size_t threads, size_t count, const Worker& worker) {
    WorkQueue queue(count);
    std::exception_ptr failure;
    std::mutex failure_mutex;
    auto run = [&] {
        try {
            worker(queue);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failure_mutex);
            if (!failure) failure = std::current_exception();
        }
    };
    std::vector<std::thread> helpers;
    const size_t wanted = std::min(threads, count);
    helpers.reserve(wanted);
    try {
        while (helpers.size() + 1 < wanted) helpers.emplace_back(run);
    } catch (const std::system_error&) {
        // The system is out of threads: those that exist share the work.
    }
    run();
    for (std::thread& helper : helpers) helper.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace nk::cpu
