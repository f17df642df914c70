// One walk over a row: its maximum, sums of exponentials (whole, or by leaf for a draw), what else the
// score needs.  decode_step-inl.h says which passes this makes.

namespace maskgit {
namespace MASKGIT_ISA {

// Sum of exp((x - top) * scale) over the buffer, and of t exp(t) where asked.
static double sum_exp(const Row& r, int n, float top, float scale, double* tz) {
  int i = 0;
  if (!tz) {
    const Exponent s(scale * kLog2e, top);
    vf z0 = {}, z1 = {}, z2 = {}, z3 = {};
    for (; i + 4 * W <= n; i += 4 * W) {
      prefetch_ahead(r, i, 4 * W);
      z0 = add_exp2(z0, load(r.x + i), s);
      z1 = add_exp2(z1, load(r.x + i + W), s);
      z2 = add_exp2(z2, load(r.x + i + 2 * W), s);
      z3 = add_exp2(z3, load(r.x + i + 3 * W), s);
    }
    for (; i < n; i += W) z0 = add_exp2(z0, load(r.x + i), s);
    return hsum((z0 + z1) + (z2 + z3)) / s.unit(top);
  }
  const Exponent one(kLog2e);
  vf z = {}, sum_tz = {};
  for (; i < n; i += W) {
    vf t = vmax((load(r.x + i) - splat(top)) * splat(scale), splat(-87.f));
    vf e = add_exp2(vf{}, t, one);
    z += e;
    sum_tz = fma(t, e, sum_tz);
  }
  *tz = hsum(sum_tz) / one.unit(0);
  return hsum(z) / one.unit(0);
}

// The same in float64.
static double sum_exp_double(const Row& r, int n, float top, double scale, double* tz) {
  vd z = {}, sum_tz = {};
  for (int i = 0; i < n; i += W) {
    vd x = __builtin_convertvector(load(r.x + i), vd), low = -700.0 + vd{};
    vd t = (x - double(top)) * scale;
    t = t > low ? t : low;
    vd e = exp_double(t);
    z += e;
    sum_tz += t * e;
  }
  double total = 0, total_tz = 0;
  for (int j = 0; j < W; ++j) total += z[j], total_tz += sum_tz[j];
  if (tz) *tz = total_tz;
  return total;
}

// Two vectors of a row: 2 W logits from one place on, in order or (kSplit) the even before the odd.
struct Pair { vf a, b; };

// The sums of a leaf's 16 groups from those of its pairs.
template <bool kSplit>
static inline void store_groups(const Pair* sum, float* out) {
  for (int j = 0; j * 2 * W < kGroups; ++j) {
    Pair z = sum[j];
    if (kSplit) interleave(z.a, z.b);
    if (W == kGroups) return store(out, z.a + z.b);
    store(out + 2 * W * j, z.a), store(out + 2 * W * j + W, z.b);
  }
}

// Leaf sums of chunk c, relative to `top`; returns their sum.  `at(i)` loads a Pair of the chunk.
template <bool kSplit, class At>
static inline double sum_leaves(Row& r, int64_t c, int n, float top, float scale, At at) {
  constexpr int pairs = kGroups / (2 * W) > 1 ? kGroups / (2 * W) : 1;  // until the groups repeat
  const Exponent s(scale * kLog2e, top);
  const bool keeps_groups = r.p->vocab <= kChunk;
  float* out = r.leaf_sum + c * kLeaves;
  const int leaves = round_up(n, kLeaf) / kLeaf;
  vf total = {}, sums[8];
  for (int first = 0; first < kLeaves; first += 8) {
    for (int k = 0; k < 8; ++k) {
      const int leaf = first + k;
      Pair sum[pairs] = {};
      if (leaf < leaves) {
        prefetch_ahead(r, leaf * kLeaf, kLeaf);
        for (int j = 0; j < kLeaf / (2 * W); ++j) {
          const Pair x = at(leaf * kLeaf + 2 * W * j);
          Pair& z = sum[j % pairs];
          z = {add_exp2<true>(z.a, x.a, s), add_exp2<true>(z.b, x.b, s)};
        }
        if (keeps_groups) store_groups<kSplit>(sum, r.group_sum + leaf * kGroups);
        for (int j = 1; j < pairs; ++j) sum[0].a += sum[j].a, sum[0].b += sum[j].b;
      }
      sums[k] = sum[0].a + sum[0].b;
    }
    hsum8(sums, out + first);
    if (first + 8 >= leaves) {
      for (int k = first + 8; k < kLeaves; ++k) out[k] = 0.f;
      break;
    }
  }
  const double unit = s.unit(top);
  const vf share = splat(float(1 / unit));
  for (int leaf = 0; leaf < kLeaves; leaf += W) {
    const vf sum = load(out + leaf);
    store(out + leaf, sum * share);
    total += sum;
  }
  return hsum(total) / unit;
}

struct Wanted {
  bool leaves, z, z_double, tz, second, noise;
  float leaf_scale;
  double z_scale, noise_scale;
};
struct Stats {
  float top = kNegInf, second = kNegInf;
  int64_t top_chunk = 0;
  uint16_t top_bits = 0;  // of a row that was walked by its bits
  double z = 0, tz = 0;  // relative to top
  double noisy = kNegInf;
  int64_t noisy_at = -1;  // where no noise is finite or +inf
};

// Takes `top` off the loaded chunk, into the buffer; returns what its maximum then is.
static float lowered(Row& r, int n, float top) {
  for (int i = 0; i < round_up(n, kLeaf); i += W) store(r.buffer + i, load(r.x + i) - splat(top));
  r.x = r.buffer, r.loaded = -1;
  return 0.f;
}

static inline void top_two(const Row& r, int n, float* first, float* second) {
  for (int i = 0; i < n; i += W) {
    vf x = vmax(load(r.x + i), splat(kNegInf)), hi = load(first), lo = load(second);
    store(second, vmax(lo, vmin(hi, x)));
    store(first, vmax(hi, x));
  }
}

// argmax of x + scale * noise in float64, for noise that the caller injects.
template <class Noise>
static void race_with_noise(const Row& r, int64_t begin, int n, double scale, Stats& out) {
  const Noise* g = static_cast<const Noise*>(r.noise) + begin * r.p->token_gumbel.v;
  for (int i = 0; i < n; ++i) {
    const double y = double(r.x[i]) + scale * double(g[i * r.p->token_gumbel.v]);
    if (r.x[i] > kNegInf && y > out.noisy) out.noisy = y, out.noisy_at = begin + i;
  }
}

// A draw needs some reference for its exponentials, not the maximum: the largest of the first leaf
// does, if the sum stays far from overflow.  So the pass for the maximum and, in 16 bits, the buffer
// fall away.  Returns false where the row must be walked with maxima.
template <int kType>
static bool walk_once(Row& r, float scale, Stats& out) {
  auto load_at = [&](int64_t i) { return load_elements<kType>(r.logits, i, 1, W); };
  auto pair_at = [&](int64_t i) {
    if (kType != kBfloat16) return Pair{load_at(i), load_at(i + W)};
    const vu bits = *reinterpret_cast<const vu*>(r.logits + 2 * i);
    return Pair{even_bfloat16(bits), odd_bfloat16(bits)};
  };
  vf most = splat(kNegInf);
  for (int i = 0; i < kLeaf; i += 2 * W) {
    const Pair x = pair_at(i);
    most = vmax(x.b, vmax(x.a, most));
  }
  const float top = hmax(most);
  if (!(top > kNegInf && top <= kFloatMax) || !Exponent::reaches(top, scale * kLog2e)) return false;
  const int64_t chunks = num_chunks(r.p->vocab);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t begin = c * kChunk;
    const int n = span_at(r, begin, kChunk);
    r.ahead = r.logits + (begin + n) * (kType == kFloat32 ? 4 : 2);
    r.chunk_max[c] = top;
    out.z += sum_leaves<kType == kBfloat16>(r, c, n, top, scale, [&](int i) { return pair_at(begin + i); });
  }
  if (!(out.z < 1e17)) return false;  // a race divides sums by variates down to e^-45
  out.top = top;
  r.as_bits = kType == kBfloat16;
  if (kType == kFloat32) r.x = reinterpret_cast<const float*>(r.logits), r.loaded = 0;
  return true;
}

static bool walk_once(Row& r, const Conditions& keep, const Wanted& want, Stats& out) {
  const StepParams& p = *r.p;
  const bool plain =
      keep.n == 0 && p.num_banned == 0 && !r.scoring && !r.uncond && p.logits.v == 1 && p.vocab % kLeaf == 0;
  const bool draw_only = want.leaves && !want.z && !want.second && p.score != kTop1Prob;
  if (!plain || !draw_only) return false;
  Stats found;
  const bool done = p.dtype == kFloat32    ? walk_once<kFloat32>(r, want.leaf_scale, found)
                    : p.dtype == kBfloat16 ? walk_once<kBfloat16>(r, want.leaf_scale, found)
                                           : walk_once<kFloat16>(r, want.leaf_scale, found);
  if (done) out = found;
  return done;
}

// Sum of exp((x - top) * scale) over n bfloat16, n a multiple of 2 W.
static double sum_exp_bits(const Row& r, const uint16_t* x, int n, float top, float scale) {
  const Exponent s(scale * kLog2e, top);
  vf z[4] = {};
  for (int i = 0; i < n; i += 2 * W) {
    const vu bits = *reinterpret_cast<const vu*>(x + i);
    const int k = i / W % 4;
    if (k == 0) prefetch_ahead(r, i, 4 * W);
    z[k] = add_exp2(z[k], even_bfloat16(bits), s);
    z[k + 1] = add_exp2(z[k + 1], odd_bfloat16(bits), s);
  }
  return hsum((z[0] + z[1]) + (z[2] + z[3])) / s.unit(top);
}

// Greedy rows of plain bfloat16 need no buffer and no widening for the maximum.  Returns false where
// a NaN, an infinity or a zero on top wants more care.
static bool walk_bits(Row& r, const Conditions& keep, const Wanted& want, Stats& out) {
  const StepParams& p = *r.p;
  const bool plain =
      keep.n == 0 && p.num_banned == 0 && !r.scoring && !r.uncond && p.logits.v == 1 && p.vocab % (4 * W) == 0;
  const bool more = want.leaves || want.noise || want.second || want.z_double || want.tz || p.greedy_on_probs;
  if (p.dtype != kBfloat16 || !plain || more) return false;
  const uint16_t* logits = reinterpret_cast<const uint16_t*>(r.logits);
  const int64_t chunks = num_chunks(p.vocab);
  Stats found;
  for (int64_t c = 0; c < chunks; ++c) {
    const int n = span_at(r, c * kChunk, kChunk);
    const uint16_t bits = largest_bits(logits + c * kChunk, n);
    if (bits == 0 || (bits >= 0x7f7f && bits <= 0x8000) || bits >= 0xff7f) return false;
    const vu wide = vu{} + (uint32_t(bits) << 16);
    const float top = ((vf)wide)[0];
    if (want.z && !Exponent::reaches(top, float(want.z_scale) * kLog2e)) return false;
    r.chunk_max[c] = top;
    r.ahead = r.logits + (c * kChunk + n) * 2;
    r.chunk_z[c] = want.z ? sum_exp_bits(r, logits + c * kChunk, n, top, float(want.z_scale)) : 0;
    if (top > found.top) found.top = top, found.top_chunk = c, found.top_bits = bits;
  }
  for (int64_t c = 0; c < chunks; ++c) {
    const double shift = (double(r.chunk_max[c]) - found.top) * want.z_scale;
    found.z += (shift == 0 ? 1.0 : __builtin_exp(shift)) * r.chunk_z[c];
  }
  out = found;
  return true;
}

// One walk over the row.
static Stats walk(Row& r, const Conditions& keep, const Wanted& want) {
  const int64_t chunks = num_chunks(r.p->vocab);
  Stats out;
  if (walk_once(r, keep, want, out) || walk_bits(r, keep, want, out)) return out;
  alignas(64) float first[W], second[W];
  for (int i = 0; i < W; ++i) first[i] = second[i] = kNegInf;
  for (int64_t c = 0; c < chunks; ++c) {
    const int n = span_at(r, c * kChunk, kChunk);
    const float top = load_chunk(r, c * kChunk, n, keep);
    r.chunk_max[c] = top;
    r.chunk_z[c] = r.chunk_tz[c] = 0;
    if (top > out.top) out.top = top, out.top_chunk = c;
    if (want.noise && r.p->noise_is_double) race_with_noise<double>(r, c * kChunk, n, want.noise_scale, out);
    else if (want.noise) race_with_noise<float>(r, c * kChunk, n, want.noise_scale, out);
    if (top == kNegInf) {
      for (int i = 0; want.leaves && i < kLeaves; ++i) r.leaf_sum[c * kLeaves + i] = 0.f;
      continue;
    }
    const int padded = round_up(n, W);
    double* tz = want.tz ? r.chunk_tz + c : nullptr;
    if (want.second) top_two(r, padded, first, second);
    if (want.z_double) r.chunk_z[c] = sum_exp_double(r, padded, top, want.z_scale, tz);
    const float scale = want.leaves && want.leaf_scale > want.z_scale ? want.leaf_scale : float(want.z_scale);
    const float from = Exponent::reaches(top, scale * kLog2e) ? top : lowered(r, n, top);
    if (want.leaves) {
      const double z = sum_leaves<false>(r, c, n, from, want.leaf_scale, [&](int i) {
        return Pair{load(r.x + i), load(r.x + i + W)};
      });
      if (!want.z_double) r.chunk_z[c] = z;
    }
    if (want.z && !want.z_double) r.chunk_z[c] = sum_exp(r, padded, from, float(want.z_scale), tz);
  }
  const double scale = want.z || want.z_double ? want.z_scale : double(want.leaf_scale);
  for (int64_t c = 0; c < chunks; ++c) {
    if (r.chunk_max[c] == kNegInf) continue;
    double shift = (double(r.chunk_max[c]) - out.top) * scale;
    double weight = shift == 0 ? 1.0 : __builtin_exp(shift);
    out.z += weight * r.chunk_z[c];
    if (weight > 0) out.tz += weight * (r.chunk_tz[c] + shift * r.chunk_z[c]);
  }
  if (want.second) {  // the largest of all seconds and of all firsts but one
    bool skipped = false;
    for (int i = 0; i < W; ++i) {
      const bool skip = !skipped && first[i] == out.top;
      skipped = skipped || skip;
      const float lane = skip ? second[i] : first[i];
      out.second = lane > out.second ? lane : out.second;
    }
  }
  return out;
}

}  // namespace MASKGIT_ISA
}  // namespace maskgit
