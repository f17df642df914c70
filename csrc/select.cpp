#include "select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "thread_pool.h"

namespace maskgit {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// kernels/decode_step/counts.py, next_masked_counts: how many of `now` positions stay masked.
int64_t stay_masked(const StepParams& p, int64_t start, int64_t now, int64_t first_start, int64_t first_now,
                    int64_t mean_commit) {
  if (p.commit_all) return 0;
  if (p.count == kFraction) return std::max<int64_t>(now - mean_commit, 0);
  if (p.count == kQuota) return std::max<int64_t>(now - p.table[start], 0);
  const int64_t limit = p.count_rows_first ? first_now : now;
  const int64_t base = p.base_is_positions ? p.table_size - 1 : p.count_rows_first ? first_start : start;
  int64_t target = p.table[base];
  if (p.keep_one_masked) target = std::max<int64_t>(1, std::min(limit - 1, target));
  return std::min(target, now);
}

// How many of the falling confidences a threshold or factor rule commits; at least one.
int64_t num_confident(const StepParams& p, const std::vector<double>& falling) {
  const bool in_double = p.score_rounding == kToFloat64;
  auto rounded = [&](double x) { return in_double ? x : double(float(x)); };
  const int64_t n = static_cast<int64_t>(falling.size());
  int64_t i = 0;
  if (p.count == kThreshold) {
    while (i < n && falling[i] >= rounded(p.threshold)) ++i;
    return std::max<int64_t>(i, 1);
  }
  i = 1;  // the first always passes
  while (i < n && falling[i] >= rounded(1 - p.factor / double(i + 2))) ++i;
  return n <= 2 || i == n - 1 ? n : i;  // as in Fast-dLLM, a failure at the last index still commits it
}

struct Ranked {
  double confidence;
  int64_t position;
  bool operator<(const Ranked& other) const {  // surest first, lowest position first among equals
    return confidence != other.confidence ? confidence > other.confidence : position < other.position;
  }
};

class Selector {
 public:
  explicit Selector(StepParams& p) : p_(p), masked_now_(p.batch) {
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t n = 0; n < p.length; ++n) masked_now_[b] += p.eligible[b * p.length + n] != 0;
      total += double(masked_now_[b]);
    }
    if (p.batch) mean_commit_ = int64_t(float(total) / float(p.batch) * p.commit_fraction);
  }

  void run(int64_t b) {
    const int64_t base = b * p_.length;
    ranked_.clear();
    for (int64_t n = 0; n < p_.length; ++n) score(base + n, n);
    const int64_t now = static_cast<int64_t>(ranked_.size());
    if (!now) return;
    if (p_.count == kBernoulli && !p_.commit_all) {
      for (const Ranked& r : ranked_)
        if (p_.choice_noise[base + r.position] < p_.commit_below) commit(base + r.position);
    } else if (p_.commit_all) {
      for (const Ranked& r : ranked_) commit(base + r.position);
    } else {
      by_rank(b, base, now);
    }
  }

 private:
  void score(int64_t i, int64_t n) {
    const bool alive = p_.eligible[i] && p_.candidates[i] >= 0;
    p_.next_tokens[i] = p_.eligible[i] ? p_.mask_token_id : p_.tokens[i];
    if (!alive) p_.candidates[i] = p_.tokens[i];
    double value = p_.confidence[i];
    if (alive && p_.score == kGiven) value = p_.scores ? p_.scores[i] : value;
    if (alive && p_.score == kRandom) value = p_.choice_noise[i];
    else if (alive && p_.choice_temperature > 0) value += p_.choice_temperature * p_.choice_noise[i];
    if (p_.score_rounding != kToFloat64) value = float(value);
    if (!alive || std::isnan(value)) value = -kInf;
    p_.confidence[i] = p_.tokens[i] != p_.mask_token_id && !p_.eligible[i] ? kInf : value;
    if (p_.eligible[i]) ranked_.push_back({value, n});
  }

  void commit(int64_t i) { p_.next_tokens[i] = p_.candidates[i]; }

  void by_rank(int64_t b, int64_t base, int64_t now) {
    if (p_.count == kThreshold || p_.count == kFactor) {
      std::sort(ranked_.begin(), ranked_.end());
      std::vector<double> falling(now);
      for (int64_t i = 0; i < now; ++i) falling[i] = ranked_[i].confidence;
      const int64_t take = num_confident(p_, falling);
      for (int64_t i = 0; i < take; ++i) commit(base + ranked_[i].position);
      return;
    }
    const int64_t start = p_.masked_at_start[b];
    const int64_t stay = stay_masked(p_, start, now, p_.masked_at_start[0], masked_now_[0], mean_commit_);
    const int64_t take = now - stay;
    if (stay == 0 || p_.cut == kExact) {
      if (take > 0 && take < now) std::nth_element(ranked_.begin(), ranked_.begin() + take, ranked_.end());
      for (int64_t i = 0; i < take; ++i) commit(base + ranked_[i].position);
      return;
    }
    // The k-th smallest (strict) or the (k-1)-th smallest (inclusive), k = stay; known ones are +inf.
    double bound = kInf;
    const int64_t rank = p_.cut == kStrict ? take - 1 : take;  // in falling order
    if (rank >= 0) {
      std::nth_element(ranked_.begin(), ranked_.begin() + rank, ranked_.end());
      bound = ranked_[rank].confidence;
    }
    for (const Ranked& r : ranked_)
      if (p_.cut == kStrict ? r.confidence >= bound : r.confidence > bound) commit(base + r.position);
  }

  StepParams& p_;
  std::vector<int64_t> masked_now_;
  int64_t mean_commit_ = 0;
  std::vector<Ranked> ranked_;
};

}  // namespace

void select_and_remask(StepParams& p) {
  const Selector shared(p);
  const int threads = p.batch * p.length < 4096 ? 1 : p.num_threads;
  const int64_t grain = std::max<int64_t>(1, p.batch / (4 * threads));
  parallel_for(p.batch, grain, threads, [&](int64_t begin, int64_t end) {
    Selector mine(shared);
    for (int64_t b = begin; b < end; ++b) mine.run(b);
  });
}

}  // namespace maskgit
