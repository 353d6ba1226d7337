// AdamW and squared norms over arrays in CPU memory: one pass over each, as fast as memory is.
//
// Every instruction set does the same operations on the same elements in the same order, none of them contracted to a
// fused multiply-add (build with -ffp-contract=off), so all give the same bits, on any number of threads.
#pragma once

#include <cstdint>
#include <vector>

namespace megallm::cpu {

enum Dtype : int { kFloat = 0, kHalf = 1, kBfloat = 2 };  // as in arguments.h
constexpr int kNone = -1;                                 // there is no such array

enum class Isa : int { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The instruction sets that this machine has and this build knows, the widest first.
std::vector<Isa> isas();

struct Bfloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// One parameter: `size` elements in every array. copy may be null.
struct Tensor {
  float* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;
  int64_t size;
  bool decayed;
};

// What all tensors share, every number rounded to fp32 once.
//   g = grad * grad_scale                          p = p * keep, where decayed
//   m = m + weight1 (g - m)                        v = beta2 v + weight2 g g
//   p = p + (minus_rate m) / (sqrt(v) / root_correction2 + eps)
struct AdamW {
  float grad_scale;
  float keep;              // 1 - learning rate * weight decay
  float weight1;           // 1 - beta1
  float beta2;
  float weight2;           // 1 - beta2
  float root_correction2;  // sqrt(1 - beta2^t)
  float minus_rate;        // -learning rate / (1 - beta1^t)
  float eps;
  int grad_dtype;
  int copy_dtype;          // kNone, kHalf or kBfloat
};

void adamw(const AdamW& arguments, const std::vector<Tensor>& tensors, int num_threads, Isa isa);

struct Array {
  const void* data;
  int64_t size;
  int dtype;
};

// The sum of squares, in blocks of kNormBlock elements with kNormLanes sums each, whoever adds them. Numbers are fp64,
// but for up to 16 squares of 2-byte elements that are added in fp32 first.
constexpr int64_t kNormBlock = 16384;
constexpr int kNormLanes = 32;
double squared_norm(const std::vector<Array>& arrays, int num_threads, Isa isa);

// Asks for pages of 2 MiB in fresh memory: reading it takes a third less time. Whether the system was asked.
bool advise_huge_pages(void* data, int64_t num_bytes);

}  // namespace megallm::cpu
