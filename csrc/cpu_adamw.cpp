// Dividing the work among threads, and choosing the instruction set, at run time.
#include "cpu_adamw.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu_lanes.h"
#ifdef MEGALLM_X86
#include <cpuid.h>
#endif

namespace megallm::cpu {
namespace {

// The last, fewer than kNormLanes, elements of a block, and the sum of its lanes, by halves.
template <typename G>
double finish_squares(double* lanes, const G* rest, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const double x = plain::load(rest + i);
    lanes[i] += x * x;
  }
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace

namespace plain {
#include "cpu_loops.h"
}

#ifdef MEGALLM_X86
MEGALLM_TARGET_AVX2
namespace avx2 {
#include "cpu_loops.h"
}
MEGALLM_TARGET_END

MEGALLM_TARGET_AVX512
namespace avx512 {
#include "cpu_loops.h"
}
MEGALLM_TARGET_END
#endif

namespace {

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

// Calls action with a (null) pointer to the dtype's type.
template <typename Action>
void with_type(int dtype, Action&& action) {
  if (dtype == kFloat) return action(static_cast<float*>(nullptr));
  if (dtype == kHalf) return action(static_cast<Half*>(nullptr));
  if (dtype == kBfloat) return action(static_cast<Bfloat*>(nullptr));
  refuse("dtype code " + std::to_string(dtype) + " is none of 0 (fp32), 1 (fp16), 2 (bf16)");
}

using Update = void (*)(const AdamW&, const Tensor&, int64_t, int64_t);

template <typename G, typename C>
Update update_for(Isa isa) {
#ifdef MEGALLM_X86
  if (isa == Isa::kAvx512) return avx512::update<G, C>;
  if (isa == Isa::kAvx2) return avx2::update<G, C>;
#endif
  return plain::update<G, C>;
}

Update update_for(const AdamW& a, Isa isa) {
  Update chosen = nullptr;
  with_type(a.grad_dtype, [&](auto* grad) {
    using G = std::remove_pointer_t<decltype(grad)>;
    if (a.copy_dtype == kHalf) chosen = update_for<G, Half>(isa);
    if (a.copy_dtype == kBfloat) chosen = update_for<G, Bfloat>(isa);
    if (a.copy_dtype == kNone) chosen = update_for<G, void>(isa);
  });
  if (chosen == nullptr) refuse("copies must be fp16 or bf16, got dtype code " + std::to_string(a.copy_dtype));
  return chosen;
}

double block_sum(const Array& array, int64_t block, Isa isa) {
  const int64_t first = block * kNormBlock, size = std::min(kNormBlock, array.size - first);
  double sum = 0;
  with_type(array.dtype, [&](auto* type) {
    const auto* x = static_cast<decltype(type)>(const_cast<void*>(array.data)) + first;
#ifdef MEGALLM_X86
    if (isa == Isa::kAvx512) sum = avx512::sum_of_squares(x, size);
    if (isa == Isa::kAvx2) sum = avx2::sum_of_squares(x, size);
#endif
    if (isa == Isa::kPlain) sum = plain::sum_of_squares(x, size);
  });
  return sum;
}

void check_isa(Isa isa) {
  const std::vector<Isa> known = isas();
  if (std::find(known.begin(), known.end(), isa) == known.end()) {
    refuse("this machine, or this build, does not have the instruction set asked for");
  }
}

// run(part, num_parts) for every part, one a thread; fewer where the runtime gives fewer threads.
template <typename Run>
void in_parallel(int num_threads, int64_t work, Run&& run) {
  constexpr int64_t kWorthAThread = 32768;
  num_threads = static_cast<int>(std::min<int64_t>(num_threads, work / kWorthAThread));
#ifdef _OPENMP
  if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
    run(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  run(0, 1);
}

// Where each tensor begins when all lie one behind the other, in units of `unit` elements, the last rounded up.
template <typename T>
std::vector<int64_t> starts_of(const std::vector<T>& tensors, int64_t unit) {
  std::vector<int64_t> starts(1, 0);
  starts.reserve(tensors.size() + 1);
  for (const T& tensor : tensors) starts.push_back(starts.back() + (tensor.size + unit - 1) / unit);
  return starts;
}

// run(i, first, end) for every tensor i that has units among those of this part, with their numbers in the tensor.
template <typename Run>
void over_part(const std::vector<int64_t>& starts, int part, int num_parts, Run&& run) {
  const int64_t total = starts.back(), share = total / num_parts, more = total % num_parts;
  const int64_t first = part * share + std::min<int64_t>(part, more), end = first + share + (part < more);
  auto i = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
  for (; first < end && starts[i] < end; ++i) {
    run(i, std::max(first, starts[i]) - starts[i], std::min(end, starts[i + 1]) - starts[i]);
  }
}

}  // namespace

std::vector<Isa> isas() {
  std::vector<Isa> known;
#ifdef MEGALLM_X86
  unsigned int a = 0, b = 0, c = 0, d = 0;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  const bool has_avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    known.push_back(Isa::kAvx512);
  }
  if (has_avx2) known.push_back(Isa::kAvx2);
#endif
  known.push_back(Isa::kPlain);
  return known;
}

// A unit is a cache line of fp32 numbers, two of 2-byte ones: threads share no line where tensors begin on one.
void adamw(const AdamW& a, const std::vector<Tensor>& tensors, int num_threads, Isa isa) {
  constexpr int64_t kUnit = 32;
  check_isa(isa);
  const Update update = update_for(a, isa);
  const std::vector<int64_t> starts = starts_of(tensors, kUnit);
  in_parallel(num_threads, starts.back() * kUnit, [&](int part, int num_parts) {
    over_part(starts, part, num_parts, [&](int64_t i, int64_t first, int64_t end) {
      update(a, tensors[i], first * kUnit, std::min(end * kUnit, tensors[i].size));
    });
  });
}

double squared_norm(const std::vector<Array>& arrays, int num_threads, Isa isa) {
  check_isa(isa);
  for (const Array& array : arrays) with_type(array.dtype, [](auto*) {});
  const std::vector<int64_t> starts = starts_of(arrays, kNormBlock);
  std::vector<double> sums(starts.back());
  in_parallel(num_threads, starts.back() * kNormBlock, [&](int part, int num_parts) {
    over_part(starts, part, num_parts, [&](int64_t i, int64_t first, int64_t end) {
      for (int64_t block = first; block < end; ++block) sums[starts[i] + block] = block_sum(arrays[i], block, isa);
    });
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

bool advise_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data), end = (start + num_bytes) / kPage * kPage;
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  return first < end && madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace megallm::cpu
