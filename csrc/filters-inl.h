// top-k, top-p, min-p and typical filters as thresholds, without sorting the row.
//
// Each filter keeps the tokens whose key is large enough: the logit itself, or -|H + log p| for
// typical sampling.  "Large enough" means that the weight strictly before the token, in falling key
// order, is within a limit: weight 1 and limit k - 1 for top-k, weight p and the filter's share for
// the others.  The bound is found digit by digit on the bits of the key (four histograms of 256
// bins), each a read of a row that is in the cache by then.  Ties at the bound are kept from the
// lowest index on, all of them for top-k and min-p.

namespace maskgit {
namespace MASKGIT_ISA {

struct Weighting {
  float top, scale;  // weight exp((x - top) * scale), or 1 where scale is negative
};

static inline uint32_t ordered_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static inline float from_ordered_bits(uint32_t bits) {
  bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
static inline double weight_of(const Weighting& w, float x) {
  return w.scale < 0 ? 1.0 : __builtin_exp((double(x) - w.top) * w.scale);
}

// Calls visit(index, logit) for every token that survives so far.
template <class Visit>
static inline void for_each_token(Row& r, const Conditions& keep, Visit visit) {
  for (int64_t begin = 0; begin < r.p->vocab; begin += kChunk) {
    const int n = span_at(r, begin, kChunk);
    load_chunk(r, begin, n, keep);
    for (int i = 0; i < n; ++i)
      if (r.x[i] > kNegInf) visit(begin + i, r.x[i]);
  }
  r.loaded = -1;
}

// Sets condition.bound and last_tie so that the weight before each kept token is at most `limit`, or
// (with_own) the weight up to and with it; the first is always kept.
static void find_bound(Row& r, const Conditions& keep, const Weighting& w, double limit, bool all_ties,
                       bool with_own, Condition& condition) {
  uint32_t prefix = 0, mask = 0;
  double before = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    double bins[256] = {};
    for_each_token(r, keep, [&](int64_t, float x) {
      uint32_t bits = ordered_bits(key_of(condition, x));
      if ((bits & mask) == prefix) bins[(bits >> shift) & 255u] += weight_of(w, x);
    });
    int lowest = -1, chosen = -1;
    double sum = before;
    for (int bin = 255; bin >= 0; --bin) {
      if (bins[bin] == 0) continue;
      if (sum > limit) break;
      chosen = bin, before = sum;
      sum += bins[bin];
      lowest = bin;
    }
    if (lowest < 0) chosen = 0;
    prefix |= uint32_t(chosen) << shift;
    mask |= 255u << shift;
  }
  condition.bound = from_ordered_bits(prefix);
  condition.last_tie = INT64_MAX;
  if (all_ties) return;
  double sum = before;
  int64_t last = -1, previous = -1;
  for_each_token(r, keep, [&](int64_t index, float x) {
    if (key_of(condition, x) != condition.bound || sum > limit) return;
    previous = last, last = index;
    sum += weight_of(w, x);
  });
  const bool is_first = before == 0 && previous < 0;
  condition.last_tie = with_own && sum > limit && !is_first ? previous : last;
}

static void find_conditions(Row& r, Conditions& keep) {
  const StepParams& p = *r.p;
  const double temperature = p.filter_temperature;
  bool divided = true;
  for (int i = 0; i < p.num_filters; ++i) divided = divided && p.filters[i] != kTemperature;
  for (int i = 0; i < p.num_filters; ++i) {
    if (p.filters[i] == kTemperature) {
      divided = true;
      continue;
    }
    const double scale = divided ? 1.0 / temperature : 1.0, value = p.filter_values[i];
    if (value == 1.0 && (p.filters[i] == kTopP || p.filters[i] == kTypicalP)) continue;  // keeps all
    double z = 0, xz = 0;
    float top = kNegInf;
    for_each_token(r, keep, [&](int64_t, float x) { top = x > top ? x : top; });
    if (top == kNegInf) return;
    Weighting w{top, float(scale)};
    Condition condition{false, 0.f, 0.f, 0.f, INT64_MAX};
    if (p.filters[i] == kTopK) {
      find_bound(r, keep, Weighting{top, -1.f}, value - 1, true, false, condition);
    } else if (p.filters[i] == kMinP) {
      condition.bound = float(top + __builtin_log(value) / scale);
    } else {
      for_each_token(r, keep, [&](int64_t, float x) {
        double e = weight_of(w, x);
        z += e, xz += e > 0 ? e * (double(x) - top) * scale : 0.0;
      });
      if (p.filters[i] == kTypicalP) {  // -|−log p − H| with log p = (x - top) scale - log z
        condition.typical = true;
        condition.scale = float(scale);
        condition.center = float(top * scale + xz / z);
      }
      find_bound(r, keep, w, value * z, false, p.top_p_below && p.filters[i] == kTopP, condition);
    }
    keep.at[keep.n++] = condition;
  }
}

}  // namespace MASKGIT_ISA
}  // namespace maskgit
