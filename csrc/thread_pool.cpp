#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include <unistd.h>

namespace maskgit {
namespace {

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t count, grain;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;

  void work() {
    for (;;) {
      int64_t begin = next.fetch_add(grain);
      if (begin >= count) return;
      try {
        (*body)(begin, std::min(begin + grain, count));
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  }
};

class Pool {
 public:
  explicit Pool(int workers) : owner_(getpid()), wished_(workers) {
    try {
      for (; size_ < workers; ++size_) std::thread([this, i = size_] { loop(i); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: work with those there are
    }
  }
  bool usable(int workers) const { return owner_ == getpid() && wished_ >= workers; }

  void run(Job& job, int workers) {
    workers = std::min(workers, size_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job, wanted_ = workers, running_ = workers, ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

 private:
  void loop(int index) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= wanted_ || !job_) continue;
        job = job_;
      }
      job->work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  pid_t owner_;
  int wished_, size_ = 0, wanted_ = 0, running_ = 0;
  uint64_t generation_ = 0;
  Job* job_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<pid_t> gomp_owner{0};  // its threads do not survive a fork

std::mutex pool_mutex;
Pool* pool = nullptr;  // never freed: its workers sleep until the process ends

}  // namespace

void use_openmp(uintptr_t address) {
  gomp_parallel = reinterpret_cast<GompParallel>(address);
  gomp_owner = getpid();
}

void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, (count + grain - 1) / grain));
  if (threads <= 1) return body(0, count);
  Job job;
  job.body = &body, job.count = count, job.grain = grain;
  if (gomp_parallel && gomp_owner == getpid()) {
    gomp_parallel.load()([](void* data) { static_cast<Job*>(data)->work(); }, &job, threads, 0);
    if (job.failure) std::rethrow_exception(job.failure);
    return;
  }
  std::unique_lock<std::mutex> lock(pool_mutex, std::try_to_lock);
  if (!lock.owns_lock()) {  // another thread uses the pool: work alone
    job.work();
  } else {
    if (!pool || !pool->usable(threads - 1)) pool = new Pool(threads - 1);
    pool->run(job, threads - 1);
  }
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace maskgit
