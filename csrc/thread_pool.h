// A small pool of worker threads that outlives calls and is remade in a forked child.
#pragma once
#include <cstdint>
#include <functional>

namespace maskgit {

// Runs body(begin, end) over [0, count) in pieces of `grain` on at most `threads` threads, the
// caller being one of them.  Pieces go to whoever is free; results may not depend on who ran them.
void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body);

}  // namespace maskgit
