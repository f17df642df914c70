"""Named workloads, timing and the benchmarks themselves: `maskgit bench`."""
