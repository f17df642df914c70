// One row of the decode step: draw, score and log Z from one read of its logits.
//
// For a row l (V,) the candidate is drawn by three Gumbel races (kernels/decode_step/reference.py):
// over leaves of 128 consecutive logits, over the 16 groups of the chosen leaf, over the group's 8
// tokens.  A leaf enters the race with log(sum exp(l/T)) + g = shift + log(sum / E), where E is an
// exponential variate, so it costs a division, two logarithms and half a Philox block.
//
// Passes.  The row is walked in chunks of 2048 logits, each small enough for L1: first its maximum,
// then the sums of exponentials relative to it, so memory is read once; a plain draw does without the
// maximum (walk_once).  Plain float32 logits are used where they lie, plain bfloat16 ones too, whose
// maximum is found on their bits (walk_bits); all else (float16, guidance, odd strides, filters) is
// first converted to a float32 buffer.  What is kept per row is a maximum and a sum per chunk and,
// when drawing, a sum per leaf: V/128 floats.  The chosen leaf (512 bytes) is read again, and the
// chunk that holds the argmax where it is not the last one.  Filters (filters-inl.h) read the row a
// few times more.
//
// NaN counts as -inf, yet stays in the chunk: every maximum takes its other operand beside a NaN,
// add_exp2 counts it 2^-126, and comparisons with NaN are false.  +inf becomes the largest float.
//
// What it costs.  Greedy float32, AVX-512: 1 vector operation for the maximum and 9 for the
// exponential and its sum per 16 logits; bfloat16 1 more to widen.  Two such operations start a cycle.
//
// Limits: V < 2^31; tokens less likely than e^-87 of their row do not enter sums (nor could they win:
// a variate is at most 45.05).  Accumulation: float32 in W lanes within a chunk, float64 across.
#include "params.h"
#include "simd-inl.h"
#include "row-inl.h"
#include "walk-inl.h"
#include "draw-inl.h"
#include "filters-inl.h"

extern "C" void* malloc(std::size_t);
extern "C" void free(void*);

namespace maskgit {
namespace MASKGIT_ISA {

// Lowest index of the largest logit.
static int64_t argmax(Row& r, const Conditions& keep, const Stats& stats) {
  const int64_t begin = stats.top_chunk * kChunk;
  const int n = span_at(r, begin, kChunk);
  if (stats.top_bits)
    return begin + first_equal(reinterpret_cast<const uint16_t*>(r.logits) + begin, n, stats.top_bits);
  if (r.loaded != begin) load_chunk(r, begin, n, keep);
  return begin + first_at_least(r.x, 0, n, stats.top);
}

static double round_to(double x, int rounding) {
  if (rounding == kToFloat64) return x;
  float f = float(x);
  if (rounding == kToFloat32) return f;
  uint32_t bits;
  if (rounding == kToBfloat16) {
    __builtin_memcpy(&bits, &f, 4);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  // float16: round at its last mantissa bit (subnormals: at 2^-24), overflow to infinity
  double magnitude = x < 0 ? -double(f) : double(f);
  if (!(magnitude < 65520.0)) return magnitude != magnitude ? x : (x < 0 ? -1.0 : 1.0) * __builtin_inf();
  double unit = 0x1p-24;
  while (magnitude >= unit * 2048) unit *= 2;
  double rounded = __builtin_nearbyint(magnitude / unit) * unit;
  return x < 0 ? -rounded : rounded;
}

// Dream takes the argmax of rounded probabilities: the first token whose rounded probability ties.
static int64_t argmax_of_probs(Row& r, const Conditions& keep, const Stats& stats, double z) {
  const int rounding = r.p->score_rounding;
  const double best = round_to(1.0 / z, rounding);
  // Nothing below best - unit rounds to best; unit is the spacing of the score dtype there, at most.
  const double spacing = rounding == kToBfloat16 ? 0x1p-7 : rounding == kToFloat16 ? 0x1p-10 : 0x1p-22;
  const double unit = rounding == kToFloat16 && best * spacing < 0x1p-24 ? 0x1p-24 : best * spacing;
  const double share = 1.0 - unit * z;
  const float bound = share > 0 ? float(stats.top + __builtin_log(share) - 1e-5) : -kFloatMax;
  for (int64_t begin = 0; begin <= stats.top_chunk * kChunk; begin += kChunk) {
    const int n = span_at(r, begin, kChunk);
    load_chunk(r, begin, n, keep);
    for (int64_t i = 0; i < n; i = (i / W + 1) * W) {  // only whole vectors are padded
      i = first_at_least(r.x, i, n, bound);
      for (int64_t j = i; j < n && j < (i / W + 1) * W; ++j)
        if (r.x[j] >= bound && round_to(__builtin_exp(double(r.x[j]) - stats.top) / z, rounding) >= best)
          return begin + j;
    }
  }
  return argmax(r, keep, stats);
}

static bool any_finite(Row& r) {
  bool found = false;
  r.as_it_is = true;
  for (int64_t begin = 0; begin < r.p->vocab; begin += kChunk) {
    const int n = span_at(r, begin, kChunk);
    load_chunk(r, begin, n, Conditions{});
    for (int i = 0; i < n; ++i)
      found = found || (r.x[i] > kNegInf && r.x[i] <= kFloatMax);
  }
  r.as_it_is = false;
  r.loaded = -1;
  return found;
}

static double score_of(const StepParams& p, const Stats& s, float logit) {
  const double z = s.z;
  const double scale = 1.0 / p.score_temperature, shift = (double(logit) - s.top) * scale;
  switch (p.score) {
    case kProb: return (shift == 0 ? 1.0 : scalar_exp(shift)) / z;
    case kLogProb: return shift - __builtin_log(z);
    case kTop1Prob: return 1.0 / z;
    case kMargin: {
      double other = s.second == kNegInf ? 0.0 : __builtin_exp((double(s.second) - s.top) * scale) / z;
      return round_to(1.0 / z, p.score_rounding) - round_to(other, p.score_rounding);
    }
    case kNegEntropy: {
      const double value = s.tz / z - __builtin_log(z);
      return value > -1e-30 ? 0.0 : value;  // what counts as nothing in the sums
    }
    case kLogit: return logit;
    default: return 0.0;
  }
}

// What a call does to each of its rows.
struct Mode {
  bool drawing, racing, apart;
  float scale;         // of the draw
  double score_scale;  // of the score
  Wanted first, second;
};

static Mode mode_of(const StepParams& p) {
  Mode m{};
  m.drawing = p.sample_temperature > 0;
  m.racing = m.drawing && !p.token_gumbel.data;
  // scores other tokens than it draws from
  m.apart = (p.num_filters > 0 && !p.score_filtered) || p.num_score_banned > 0;
  m.scale = m.drawing ? float(1.0 / p.sample_temperature) : 1.f;
  m.score_scale = 1.0 / p.score_temperature;
  const bool in_double = p.score_rounding == kToFloat64;
  const bool needs_z = (p.score != kLogit && p.score != kRandom && p.score != kGiven) || p.log_z || p.greedy_on_probs;
  const bool shared = m.racing && !m.apart && !in_double && p.score != kNegEntropy &&
                      p.sample_temperature == p.score_temperature;  // z is the sum of the leaf sums
  Wanted draw{};
  draw.leaves = m.racing, draw.leaf_scale = m.scale;
  draw.noise = m.drawing && !m.racing, draw.noise_scale = p.sample_temperature;
  if (!m.apart) m.first = draw;
  m.first.z_scale = m.score_scale;
  m.first.z = needs_z && !shared;
  m.first.z_double = m.first.z && in_double;
  m.first.tz = m.first.z && p.score == kNegEntropy;
  m.first.second = p.score == kMargin;
  m.second = draw;
  m.second.z = p.greedy_on_probs, m.second.z_scale = 1.0;
  return m;
}

struct Scored {
  bool alive, is_own, is_scored;
  Conditions keep;
  Stats stats, drawn;  // of the distribution that is scored, and of the one that is drawn from
  int64_t leaf, token;
  float logit;
};

// Walks the row; without a race the candidate is known then.
static void begin_row(Row& r, const Mode& m, Scored& s) {
  const StepParams& p = *r.p;
  const Conditions everything{};
  s.keep.n = 0;
  if (p.num_filters > 0) find_conditions(r, s.keep);
  r.scoring = p.num_score_banned > 0;
  s.stats = walk(r, p.score_filtered ? s.keep : everything, m.first);
  r.scoring = false;
  s.drawn = s.stats;
  if (m.apart) {
    r.loaded = -1;
    s.drawn = walk(r, s.keep, m.second);
  }
  s.alive = s.drawn.top > kNegInf && (s.drawn.top < kFloatMax || any_finite(r));
  if (!s.alive) return;
  s.logit = s.drawn.top;
  if (m.racing) return;
  const bool noisy = m.drawing && s.drawn.noisy_at >= 0;
  s.token = noisy                ? s.drawn.noisy_at
            : p.greedy_on_probs ? argmax_of_probs(r, s.keep, s.drawn, s.drawn.z)
                                : argmax(r, s.keep, s.drawn);
  if (!noisy && !p.greedy_on_probs) return;
  load_chunk(r, s.token, 1, everything);
  s.logit = r.x[0];
}

static bool is_unscored(const StepParams& p, int64_t token) {
  for (int64_t i = 0; i < p.num_score_banned; ++i)
    if (p.score_banned[i] == token) return true;
  return false;
}

static void finish_row(const StepParams& p, const Mode& m, const Scored& s, int64_t at) {
  const bool none = s.is_scored && p.num_score_banned > 0 && (s.stats.top == kNegInf || is_unscored(p, s.token));
  p.candidates[at] = s.alive || s.is_own ? s.token + p.vocab_start : -1;
  p.confidence[at] = none && p.score == kProb ? 0.0 : none ? kNegInf : s.is_scored ? round_to(score_of(p, s.stats, s.logit), p.score_rounding) : kNegInf;
  if (p.log_z) p.log_z[at] = s.alive ? double(s.stats.top) * m.score_scale + __builtin_log(s.stats.z) : kNegInf;
}

static void choice_noise(const StepParams& p, const int64_t* rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += W) {
    vu k0 = {}, k1 = {}, position = {}, zero = {};
    for (int j = 0; j < W && i + j < end; ++j) {
      const int64_t b = rows[i + j] / p.length;
      k0[j] = p.seeds[2 * b], k1[j] = p.seeds[2 * b + 1], position[j] = p.positions[rows[i + j]];
    }
    Words w = philox(zero, position, zero + p.step, zero + kStreamChoice, LaneKeys{k0, k1});
    vf g = -vlog(exponential(w.x, w.y));
    for (int j = 0; j < W && i + j < end; ++j) p.choice_noise[rows[i + j]] = g[j];
  }
}

// The token that a revised position holds instead of a candidate, with its logit; false for others.
static bool keep_own_token(Row& r, Scored& s, int64_t at) {
  const StepParams& p = *r.p;
  if (p.revise != kHeld || p.tokens[at] == p.mask_token_id) return false;
  s.token = p.tokens[at] - p.vocab_start;
  s.is_scored = s.alive && s.token >= 0 && s.token < p.vocab;
  if (!s.is_scored) return true;
  load_chunk(r, s.token, 1, p.score_filtered ? s.keep : Conditions{});
  r.loaded = -1;
  s.logit = r.x[0] == r.x[0] ? r.x[0] : kNegInf;
  return true;
}

// Rows of one chunk go through each stage a batch at a time, so that their latencies overlap.
static void score_rows(const StepParams& p, const int64_t* rows, int64_t begin, int64_t end) {
  if (p.draw_choice_noise) choice_noise(p, rows, begin, end);
  if (!p.logits.data) return;
  const int64_t chunks = num_chunks(p.vocab), size = p.dtype == kFloat32 ? 4 : 2;
  const int batch = chunks == 1 ? kBatch : 1;
  const Mode mode = mode_of(p);
  const int64_t bytes = (chunks * (2 * 8 + 4 + kLeaves * 4) + 63) / 64 * 64;
  char* memory = static_cast<char*>(malloc(batch * bytes));
  if (!memory) __builtin_trap();
  alignas(64) float buffer[kChunk], group_sum[kBatch][kLeaves * kGroups], waits[kBatch][kMaxWaits];
  RowKeys keys[kBatch];
  int64_t keyed[kBatch];  // whose keys they are
  for (int64_t& b : keyed) b = -1;
  Row row[kBatch] = {};
  Scored scored[kBatch];
  for (auto& w : waits)
    for (float& x : w) x = 1.f;  // lanes past the variates are read, and must not be NaN
  const int lines = int(p.vocab * size / 64), leaves = int(round_up(int(p.vocab < kChunk ? p.vocab : kChunk), kLeaf) / kLeaf);
  Cursor cursor{&p, rows + begin, rows + end, 0, 0, nullptr, 0, 0, 0};
  cursor.per_stage = mode.racing ? lines * 3 / 16 : 0;
  cursor.per_leaf = (lines - 2 * cursor.per_stage + leaves - 1) / leaves;
  cursor.start_row();
  for (int i = 0; i < batch; ++i) {
    Row& r = row[i];
    r.p = &p;
    r.cursor = batch > 1 ? &cursor : nullptr;
    r.buffer = buffer;
    r.chunk_z = reinterpret_cast<double*>(memory + i * bytes);
    r.chunk_tz = r.chunk_z + chunks;
    r.chunk_max = reinterpret_cast<float*>(r.chunk_tz + chunks);
    r.leaf_sum = r.chunk_max + chunks;
    r.group_sum = group_sum[i];
    r.waits = waits[i];
  }
  auto at = [&](const Strided& s, int64_t b, int64_t n, int64_t bytes_each) {
    return s.data ? static_cast<const char*>(s.data) + (b * s.b + n * s.n) * bytes_each : nullptr;
  };
  int64_t b = rows[begin] / p.length, base = b * p.length;
  for (int64_t first = begin; first < end; first += batch) {
    const int count = int(end - first < batch ? end - first : batch);
    for (int i = 0; i < count; ++i) {
      Row& r = row[i];
      while (rows[first + i] >= base + p.length) ++b, base += p.length;
      const int64_t n = rows[first + i] - base;
      r.logits = at(p.logits, b, n, size);
      r.uncond = at(p.uncond, b, n, size);
      r.noise = at(p.token_gumbel, b, n, p.noise_is_double ? 8 : 4);
      r.loaded = -1, r.as_bits = false;
      if (!mode.racing) continue;
      r.source = {&keys[i], p.positions[rows[first + i]]};
      if (b != keyed[i]) keys[i].set(p.seeds[2 * b], p.seeds[2 * b + 1]), keyed[i] = b;
      if (batch > 1) cursor.fetch(cursor.per_stage);
      draw_waits(p, r.source, waits[i]);
    }
    for (int i = 0; i < count; ++i) {
      if (batch > 1) cursor.not_before(rows + first + i + 1);
      begin_row(row[i], mode, scored[i]);
    }
    if (mode.racing) {
      for (int i = 0; i < count; ++i)
        if (scored[i].alive) scored[i].leaf = race_leaves(row[i], scored[i].drawn.top, mode.scale);
      for (int i = 0; i < count; ++i)
        if (scored[i].alive) {
          Scored& s = scored[i];
          if (batch > 1) cursor.fetch(cursor.per_stage);
          s.token = race_tokens(row[i], s.keep, s.leaf, s.drawn.top, mode.scale, &s.logit);
        }
    }
    for (int i = 0; i < count; ++i) {
      scored[i].is_own = keep_own_token(row[i], scored[i], rows[first + i]);
      if (!scored[i].is_own) scored[i].is_scored = scored[i].alive;
    }
    for (int i = 0; i < count; ++i) finish_row(p, mode, scored[i], rows[first + i]);
  }
  free(memory);
}

}  // namespace MASKGIT_ISA
}  // namespace maskgit
