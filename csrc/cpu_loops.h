// The loops over one stretch of elements. No include guard: cpu_adamw.cpp includes this once for each instruction set,
// inside its namespace, after the `Floats` of that set (cpu_lanes.h). What is left at the end of a stretch, fewer than
// kWidth elements, is done by the plain form, whose operations are the same.

// As torch.lerp: from the nearer end.
struct Lerp {
  explicit Lerp(float weight) : near_m(std::fabs(weight) < 0.5f), weight(fill(near_m ? weight : weight - 1.0f)) {}
  Floats operator()(Floats m, Floats g) const { return (near_m ? m : g) + weight * (g - m); }
  bool near_m;
  Floats weight;
};

// Elements [first, end) of one tensor. All loads come before all stores: arrays that lie a multiple of 4096 bytes apart
// look alike to a load that follows a store. Copies go past the cache, in whole lines, which are not read first then. On
// Zen 4 prefetching and unrolling gained nothing, nor does the division by `correction` cost anything: memory is what
// is waited for.
template <typename G, typename C>
void update(const AdamW& a, const Tensor& tensor, int64_t first, int64_t end) {
  float* __restrict p = tensor.param;
  const G* __restrict grad = static_cast<const G*>(tensor.grad);
  float* __restrict exp_avg = tensor.exp_avg;
  float* __restrict exp_avg_sq = tensor.exp_avg_sq;
  C* __restrict copy = static_cast<C*>(tensor.copy);
  const Lerp lerp(a.weight1);
  const Floats scale = fill(a.grad_scale), keep = fill(tensor.decayed ? a.keep : 1.0f), beta2 = fill(a.beta2);
  const Floats weight2 = fill(a.weight2), correction = fill(a.root_correction2), eps = fill(a.eps);
  const Floats minus_rate = fill(a.minus_rate);
  const auto step = [&](int64_t i) {
    const Floats g = load(grad + i) * scale;
    const Floats old_p = load(p + i);
    const Floats m = lerp(load(exp_avg + i), g);
    const Floats v = load(exp_avg_sq + i) * beta2 + weight2 * g * g;
    const Floats new_p = old_p * keep + minus_rate * m / (root(v) / correction + eps);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    store(p + i, new_p);
    return new_p;
  };
  int64_t i = first;
  if constexpr (!std::is_void_v<C>) {
    if (reinterpret_cast<uintptr_t>(copy + i) % kStreamBytes == 0) {
      for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
        const Floats low = step(i);
        stream(copy + i, low, step(i + kWidth));
      }
      end_streams();
    }
  }
  for (; i + kWidth <= end; i += kWidth) {
    const Floats new_p = step(i);
    if constexpr (!std::is_void_v<C>) store(copy + i, new_p);
  }
  if constexpr (kWidth > 1) {
    if (i < end) plain::update<G, C>(a, tensor, i, end);
  }
}

// Of elements [0, size) of a block, of 16 bits each: their squares are exact in fp32, and 16 of them are added there.
template <typename G>
double sum_of_short_squares(const G* x, int64_t size) {
  constexpr int kVectors = kNormLanes / kWidth;
  constexpr int64_t kGroup = 16 * kNormLanes;
  double lanes[kNormLanes] = {};
  int64_t i = 0;
  while (i + kNormLanes <= size) {
    const int64_t stop = std::min(i + kGroup, size - size % kNormLanes);
    Floats sums[kVectors];
    for (int j = 0; j < kVectors; ++j) sums[j] = fill(0.0f);
    for (; i < stop; i += kNormLanes) {
      for (int j = 0; j < kVectors; ++j) {
        const Floats each = load(x + i + j * kWidth);
        sums[j] = sums[j] + each * each;
      }
    }
    float group[kNormLanes];
    for (int j = 0; j < kVectors; ++j) store(group + j * kWidth, sums[j]);
    for (int lane = 0; lane < kNormLanes; ++lane) lanes[lane] += group[lane];
  }
  return finish_squares(lanes, x + i, size - i);
}

// Of elements [0, size) of a block.
template <typename G>
double sum_of_squares(const G* x, int64_t size) {
  if constexpr (sizeof(G) == 2) {
    const double sum = sum_of_short_squares(x, size);
    if (sum > 0x1p-60 && sum < 0x1p+120) return sum;  // else squares may have left the range of fp32
  }
  constexpr int kVectors = kNormLanes / kWidth;
  Squares squares[kVectors];
  int64_t i = 0;
  for (; i + kNormLanes <= size; i += kNormLanes) {
    for (int j = 0; j < kVectors; ++j) squares[j].add(load(x + i + j * kWidth));
  }
  double lanes[kNormLanes];
  for (int j = 0; j < kVectors; ++j) squares[j].store(lanes + j * kWidth);
  return finish_squares(lanes, x + i, size - i);
}
