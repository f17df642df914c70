#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "thread_pool.h"

namespace maskgit {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// What the counts of all rows are formed from.
struct Totals {
  int64_t first_start = 0, sum_start = 0, first_now = 0, mean_commit = 0;
};

int64_t of_table(const StepParams& p, int64_t start, const Totals& all) {
  const int64_t base = p.count_rows == kFirst ? all.first_start : p.count_rows == kSum ? all.sum_start : start;
  return p.table[p.base_is_positions ? p.table_size - 1 : std::min(base, p.table_size - 1)];
}

// kernels/decode_step/rule/counts.py, next_masked_counts: how many of `now` positions stay masked.
int64_t stay_masked(const StepParams& p, int64_t b, int64_t now, const Totals& all) {
  if (p.commit_all) return 0;
  if (p.count == kGivenCount) return std::min(now, std::max<int64_t>(now - p.num_commit[b], 0));
  if (p.count == kFraction && p.count_rows == kMean) return std::max<int64_t>(now - all.mean_commit, 0);
  if (p.count == kFraction) return now - int64_t(float(now) * p.commit_fraction);
  int64_t target = of_table(p, p.masked_at_start[b], all);
  if (p.count == kQuota) return std::max<int64_t>(now - target, 0);
  const int64_t limit = p.count_rows == kFirst ? all.first_now : now;
  for (int clamp : p.clamps) {
    if (clamp == kCommitOne) target = std::min(target, limit - 1);
    if (clamp == kKeepOne) target = std::max<int64_t>(target, 1);
  }
  return std::min(std::max<int64_t>(target, 0), now);
}

double round_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

double round_float16(double x) {
  if (!(std::abs(x) < 65520.0)) return std::isnan(x) ? x : std::copysign(kInf, x);
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  return std::nearbyint(x / unit) * unit;
}

// A computed bound as confidences are compared with it; given ones come rounded.
double as_confidence(const StepParams& p, double x) {
  switch (p.compare_rounding) {
    case kToFloat64: return x;
    case kToBfloat16: return round_bfloat16(float(x));
    case kToFloat16: return round_float16(x);
    default: return float(x);
  }
}

// How many of the falling confidences a rule commits that looks at their values.
int64_t num_confident(const StepParams& p, const std::vector<double>& falling) {
  const bool in_double = p.score_rounding == kToFloat64;
  auto rounded = [&](double x) { return in_double ? x : double(float(x)); };
  const int64_t n = static_cast<int64_t>(falling.size());
  int64_t i = 0;
  if (p.count == kThreshold) {
    double bound = p.threshold;
    if (p.has_slack) bound = std::min(bound, as_confidence(p, rounded(falling[0] - p.threshold_slack)));
    while (i < n && (p.threshold_strict ? falling[i] > bound : falling[i] >= bound)) ++i;
    return i;
  }
  if (p.count == kEntropyBound) {  // confidences are negative entropies
    double total = 0;
    for (; i < n; ++i) {
      total = rounded(total - falling[i]);
      if (!(rounded(total + falling[i]) <= p.threshold)) break;
    }
    return i;
  }
  i = 1;  // the first always passes
  while (i < n && falling[i] >= as_confidence(p, 1 - p.factor / double(i + 2))) ++i;
  return p.factor_tail && (n <= 2 || i == n - 1) ? n : i;  // as in Fast-dLLM, a failure at the last index still commits it
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
  explicit Selector(StepParams& p) : p_(p) {
    int64_t total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      int64_t now = 0;
      for (int64_t n = 0; n < p.length; ++n) now += competes(b * p.length + n);
      if (b == 0) all_.first_now = now, all_.first_start = p.masked_at_start[0];
      total += now, all_.sum_start += p.masked_at_start[b];
    }
    if (p.batch) all_.mean_commit = int64_t(float(total) / float(p.batch) * p.commit_fraction);
  }

  void run(int64_t b) {
    const int64_t base = b * p_.length;
    ranked_.clear();
    for (int64_t n = 0; n < p_.length; ++n) score(base + n, n);
    const int64_t now = static_cast<int64_t>(ranked_.size());
    if (!now) return;
    if (p_.commit_all) {
      for (const Ranked& r : ranked_) commit(base + r.position);
    } else if (p_.count == kBernoulli) {
      for (const Ranked& r : ranked_)
        if (p_.choice_noise[base + r.position] < p_.commit_below) commit(base + r.position);
    } else if (p_.count == kRuns) {
      best_of_runs(base);
    } else {
      by_rank(b, base, now);
    }
  }

 private:
  bool is_known(int64_t i) const { return p_.tokens[i] != p_.mask_token_id; }
  bool competes(int64_t i) const {
    if (!p_.eligible[i] || (p_.revise == kNever && is_known(i))) return false;
    return !p_.skip_mask_token || p_.candidates[i] != p_.mask_token_id;
  }

  void score(int64_t i, int64_t n) {
    const bool takes_part = competes(i), known = is_known(i);
    const int64_t drawn = p_.candidates[i];
    const bool alive = takes_part && (known || drawn >= 0);
    p_.next_tokens[i] = takes_part ? p_.mask_token_id : p_.tokens[i];
    if (!alive || known) p_.candidates[i] = p_.tokens[i];
    double value = p_.confidence[i];
    if (p_.scores) value = p_.scores[i];
    if (p_.score == kRandom) value = p_.choice_noise[i];
    else if (p_.choice_temperature > 0) value += p_.choice_temperature * p_.choice_noise[i];
    if (p_.score_rounding != kToFloat64) value = float(value);
    if (known && p_.eligible[i]) touch_known(i, drawn, value);
    if (!alive || std::isnan(value)) value = -kInf;
    p_.confidence[i] = known && !takes_part ? kInf : value;
    if (takes_part) ranked_.push_back({value, n});
  }

  // Editing and ReMDM's re-masking, which are apart from the competition.
  void touch_known(int64_t i, int64_t drawn, double value) {
    if (p_.edits && drawn >= 0 && value > p_.edit_threshold) p_.next_tokens[i] = p_.candidates[i] = drawn;
    const double below = p_.remask_bounds ? p_.remask_bounds[i] : p_.remask_below;
    if (p_.remasks && p_.choice_noise[i] < below) p_.next_tokens[i] = p_.mask_token_id;
  }

  void commit(int64_t i) { p_.next_tokens[i] = p_.candidates[i]; }

  // Of each run of neighbouring positions the best above low_threshold, all above threshold, and the
  // best of the row.
  void best_of_runs(int64_t base) {
    const size_t n = ranked_.size();
    commit(base + std::min_element(ranked_.begin(), ranked_.end())->position);
    for (size_t first = 0; first < n;) {
      size_t stop = first + 1;
      double best = ranked_[first].confidence;
      for (; stop < n && ranked_[stop].position == ranked_[stop - 1].position + 1; ++stop)
        best = std::max(best, ranked_[stop].confidence);
      for (; first < stop; ++first) {
        const double c = ranked_[first].confidence;
        if (c > p_.threshold || (c == best && c > p_.low_threshold)) commit(base + ranked_[first].position);
      }
    }
  }

  void by_rank(int64_t b, int64_t base, int64_t now) {
    if (p_.count == kThreshold || p_.count == kFactor || p_.count == kEntropyBound) {
      std::sort(ranked_.begin(), ranked_.end());
      std::vector<double> falling(now);
      for (int64_t i = 0; i < now; ++i) falling[i] = ranked_[i].confidence;
      const int64_t least = p_.min_is_quota ? of_table(p_, p_.masked_at_start[b], all_) : 1;
      const int64_t take = std::min(now, std::max(num_confident(p_, falling), least));
      for (int64_t i = 0; i < take; ++i) commit(base + ranked_[i].position);
      return;
    }
    const int64_t stay = stay_masked(p_, b, now, all_);
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
  Totals all_;
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
