#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "select.h"
#include "thread_pool.h"

namespace maskgit {

extern const ScoreRows score_rows_scalar;
#ifdef MASKGIT_WITH_X86
extern const ScoreRows score_rows_avx2, score_rows_avx512;
#endif
#ifdef MASKGIT_WITH_NEON
extern const ScoreRows score_rows_neon;
#endif

namespace {

bool always() { return true; }
#ifdef MASKGIT_WITH_X86
// The compiler's run-time check asks the operating system (xgetbv) as well as cpuid.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const std::vector<Implementation>& ranked() {
  static const std::vector<Implementation> all = {
#ifdef MASKGIT_WITH_X86
      {"avx512", has_avx512, score_rows_avx512},
      {"avx2", has_avx2, score_rows_avx2},
#endif
#ifdef MASKGIT_WITH_NEON
      {"neon", always, score_rows_neon},
#endif
      {"scalar", always, score_rows_scalar},
  };
  return all;
}

std::atomic<const Implementation*> chosen{nullptr};

const Implementation& find(const std::string& name) {
  for (const auto& implementation : ranked())
    if (implementation.is_supported() && (name.empty() || name == implementation.name)) return implementation;
  std::string legal;
  for (const auto& supported : supported_implementations()) legal += (legal.empty() ? "" : ", ") + supported;
  throw std::invalid_argument("MASKGIT_CPU_ISA: expected one of " + legal + " on this CPU, got '" + name + "'");
}

const Implementation& active() {
  if (!chosen) {
    const char* name = std::getenv("MASKGIT_CPU_ISA");
    chosen = &find(name ? name : "");
  }
  return *chosen.load();
}

constexpr int64_t kLogitsPerThread = 1 << 15;  // below this, waking another thread costs more

}  // namespace

std::vector<std::string> supported_implementations() {
  std::vector<std::string> names;
  for (const auto& implementation : ranked())
    if (implementation.is_supported()) names.push_back(implementation.name);
  return names;
}

std::string active_implementation() { return active().name; }

void set_implementation(const std::string& name) {
  if (name.empty()) {
    chosen = nullptr;
    active();
  } else {
    chosen = &find(name);
  }
}

void sample_tokens(StepParams& p) {
  const int64_t total = p.batch * p.length;
  std::vector<int64_t> rows;
  rows.reserve(total);
  for (int64_t i = 0; i < total; ++i) {
    if (p.eligible[i]) {
      rows.push_back(i);
      continue;
    }
    if (!p.logits.data) continue;
    p.candidates[i] = -1;
    p.confidence[i] = -std::numeric_limits<double>::infinity();
    if (p.log_z) p.log_z[i] = p.confidence[i];
  }
  const ScoreRows score = active().score_rows;
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t useful = count * p.vocab / kLogitsPerThread;
  const int threads = static_cast<int>(std::min<int64_t>(p.num_threads, std::max<int64_t>(useful, 1)));
  const int64_t grain = std::max<int64_t>(1, std::min<int64_t>(64, count / (16 * threads)));
  parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) { score(p, rows.data(), begin, end); });
}

void decode_step(StepParams& p) {
  sample_tokens(p);
  select_and_remask(p);
}

}  // namespace maskgit
