// The races that draw a token, and the variates they use (kernels/common/philox/stream.py).
//
// Within one reference maximum a race needs no logarithm: log(sum) + g = log(sum / E), so the largest
// sum / E wins.  Leaves of different chunks are compared as shift + log(sum / E).

namespace maskgit {
namespace MASKGIT_ISA {

constexpr uint32_t kStreamLeaf = 0, kStreamInner = 1, kStreamChoice = 2;
constexpr int kInnerBlocks = (kGroups + kPerGroup) / 2;
constexpr int kBatch = 8;  // rows whose variates are drawn together: their latencies overlap
constexpr int kMaxWaits = 2 * (kLeaves / 2 + kInnerBlocks + W) + 16;

static inline vu iota(uint32_t from) {
  static const uint32_t count[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return *reinterpret_cast<const vu*>(count) + from;
}

// Two exponential variates of each of W counters, interleaved: out[2 W].
static inline void store_variates(const StepParams& p, const Source& at, vu block, vu stream, float* out) {
  const vu zero = {};
  Words w = philox(block, zero + at.position, zero + p.step, stream, *at.keys);
  vf first = exponential(w.x, w.y), second = exponential(w.z, w.w);
  interleave(first, second);
  store(out, first), store(out + W, second);
}

// Counters for the leaves that are drawn ahead: those of a row of one chunk, in few vectors.
static inline int leaf_blocks_ahead(const StepParams& p) {
  return p.vocab <= kChunk / 2 ? kLeaves / 4 : p.vocab <= kChunk ? kLeaves / 2 : 0;
}

// out: the leaves' variates where they are drawn ahead, then the inner race's 24.
static inline void draw_waits(const StepParams& p, const Source& at, float* out) {
  const int ahead = leaf_blocks_ahead(p);
  for (int i = 0; i < ahead + kInnerBlocks; i += W) {
    vu block = iota(uint32_t(i));
    vi inner = (vi)block >= splat_i(ahead);
    block = (vu)(inner ? (vi)block - splat_i(ahead) : (vi)block);
    store_variates(p, at, block, (vu)(inner & splat_i(int(kStreamInner))), out + 2 * i);
  }
}

// Index of the largest of 16 keys, the lowest among equals.
static inline int first_largest(const float* keys) {
  vf top = splat(kNegInf);
  for (int i = 0; i < kGroups; i += W) top = vmax(load(keys + i), top);
  const int at = int(first_at_least(keys, 0, kGroups, hmax(top)));
  return at < kGroups ? at : 0;
}

// The winning leaf, given leaf sums relative to their chunk's maximum.
static int64_t race_leaves(const Row& r, float top, float scale) {
  const StepParams& p = *r.p;
  alignas(64) float keys[kLeaves];
  if (p.vocab <= kChunk) {
    const int n = 2 * leaf_blocks_ahead(p);
    for (int i = 0; i < kLeaves; i += W)
      store(keys + i, i < n ? load(r.leaf_sum + i) / load(r.waits + i) : splat(0.f));
    for (int i = n; i < kLeaves; ++i) keys[i] = 0.f;
    return first_largest(keys);
  }
  constexpr int tile = 2 * W > kLeaves ? 2 * W : kLeaves;  // leaves at a time, whole chunks
  alignas(64) float waits[tile];
  const int64_t chunks = num_chunks(p.vocab);
  float best = kNegInf;
  int64_t leaf = 0;
  for (int64_t base = 0; base < chunks * kLeaves; base += tile) {
    for (int i = 0; i < tile; i += 2 * W)
      store_variates(p, r.source, iota(uint32_t((base + i) / 2)), vu{}, waits + i);
    for (int64_t c = base / kLeaves; c < chunks && c * kLeaves < base + tile; ++c) {
      if (r.chunk_max[c] == kNegInf) continue;
      const vf shift = splat((r.chunk_max[c] - top) * scale);
      for (int i = 0; i < kLeaves; i += W) {
        vf sum = load(r.leaf_sum + c * kLeaves + i), wait = load(waits + c * kLeaves - base + i);
        store(keys + i, sum > vf{} ? shift + vlog(sum / wait) : splat(kNegInf));
      }
      const int i = first_largest(keys);
      if (keys[i] > best) best = keys[i], leaf = c * kLeaves + i;
    }
  }
  return leaf;
}

// The token inside a leaf: a race of 16 groups, then one of 8 tokens.
static int64_t race_tokens(Row& r, const Conditions& keep, int64_t leaf, float row_top, float scale,
                           float* logit) {
  const int64_t begin = leaf * kLeaf;
  const float *inner = r.waits + 2 * leaf_blocks_ahead(*r.p), *x, *sums;
  alignas(64) float keys[kGroups], own_sums[kGroups];
  const bool one_chunk = r.p->vocab <= kChunk, in_place = one_chunk && r.loaded == 0 && r.x != r.buffer;
  const bool as_bits = one_chunk && r.as_bits;
  float top = row_top, leaf_top = row_top;
  if (!in_place && !as_bits) {
    leaf_top = load_chunk(r, begin, span_at(r, begin, kLeaf), keep);
    r.loaded = -1;
  }
  x = in_place ? r.x + begin : r.x;
  sums = r.group_sum + leaf * kGroups;
  if (!one_chunk) {  // the leaf's groups, relative to its own maximum
    top = leaf_top;
    sums = own_sums;
    const Exponent s(scale * kLog2e);
    for (int g = 0; g < kGroups; g += W) {
      vf sum = {};
      for (int j = 0; j < kPerGroup; ++j) sum = add_exp2(sum, load(x + j * kGroups + g) - splat(top), s);
      store(own_sums + g, sum);
    }
  }
  for (int g = 0; g < kGroups; g += W) store(keys + g, load(sums + g) / load(inner + g));
  const int group = first_largest(keys);
  alignas(64) float value[kGroups];
  for (int j = 0; j < kGroups; j += W) store(value + j, splat(kNegInf));
  if (as_bits)
    load_every_16th(reinterpret_cast<const uint16_t*>(r.logits) + begin + group, begin + group == 0, value);
  else
    load_every_16th(x + group, value);
  for (int j = 0; j < kGroups; j += W) {
    vf z = (vmax(load(value + j), splat(kNegInf)) - splat(top)) * splat(scale);  // NaN is -inf too
    store(keys + j, z - vlog(load(inner + kGroups + j)));
  }
  const int token = first_largest(keys);
  *logit = value[token];
  return begin + token * kGroups + group;
}

}  // namespace MASKGIT_ISA
}  // namespace maskgit
