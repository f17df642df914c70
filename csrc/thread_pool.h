// Parallel loops on the host program's OpenMP threads, or on a small pool of our own, which outlives
// calls and is remade in a forked child.
#pragma once
#include <cstdint>
#include <functional>

namespace maskgit {

// Runs body(begin, end) over [0, count) in pieces of `grain` on at most `threads` threads, the
// caller being one of them.  Pieces go to whoever is free; results may not depend on who ran them.
void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body);

// Gives the address of GOMP_parallel in the OpenMP runtime that the host program (torch) already
// runs, 0 for none.  Its idle threads spin for a while; a second pool beside them would have to
// share their cores, so work goes to them instead.
void use_openmp(uintptr_t gomp_parallel);

}  // namespace maskgit
