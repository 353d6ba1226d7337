// The arithmetic of every kernel, one element at a time, and where elements lie: for the GPU and for the CPU.
#pragma once

#include <cmath>

#include "elements.h"

namespace megallm {

// Rows of a tensor [outer, inner_rows, hidden]: row r begins at r / inner_rows * outer + r % inner_rows * inner.
struct Rows {
  int64_t inner_rows;
  int64_t outer;
  int64_t inner;
};

BOTH int64_t row_offset(const Rows& rows, int64_t row) {
  if (rows.inner_rows == 1) return row * rows.outer;
  const int64_t outer = row / rows.inner_rows;
  return outer * rows.outer + (row - outer * rows.inner_rows) * rows.inner;
}

// RMSNorm: y = s r w, r = 1 / sqrt(mean(s^2) + eps)   (arXiv 1910.07467)
BOTH float rms_norm_rstd(float sum_of_squares, float inverse_hidden, float eps) {
#ifdef __CUDA_ARCH__
  return rsqrtf(sum_of_squares * inverse_hidden + eps);  // within 2 units of the last place
#else
  return 1.0f / sqrtf(sum_of_squares * inverse_hidden + eps);
#endif
}

BOTH float rms_norm_value(float s, float rstd, float weight) { return s * rstd * weight; }

// Its gradient: ds = r (dy w - u mean(dy w u)), u = s r, as r dy w - s pull with pull = r^2 mean(dy w u)
BOTH float rms_norm_pull(float sum_of_dy_w_s, float rstd, float inverse_hidden) {
  return sum_of_dy_w_s * inverse_hidden * rstd * rstd * rstd;
}

BOTH float rms_norm_gradient(float dy, float weight, float s, float rstd, float pull) {
  return dy * weight * rstd - s * pull;
}

// RoPE: (x1, x2) turned by the angle of (cosine, sine)   (arXiv 2104.09864)
struct Pair {
  float first;
  float second;
};

BOTH Pair rope_pair(float x1, float x2, float cosine, float sine) {
  return {x1 * cosine - x2 * sine, x2 * cosine + x1 * sine};
}

// The row of the tables for a token: its position, its place in its document, or the token itself.
BOTH int64_t rope_row(int64_t token, const int64_t* positions, const int32_t* cu_seqlens, int64_t documents) {
  if (positions != nullptr) return positions[token];
  if (cu_seqlens == nullptr) return token;
  int64_t first = 0;
  int64_t last = documents - 1;  // the last document that starts at or before the token; tokens past the end count on
  while (first < last) {
    const int64_t middle = (first + last + 1) / 2;
    if (cu_seqlens[middle] <= token) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return token - cu_seqlens[first];
}

// AdamW with decoupled weight decay   (arXiv 1711.05101, algorithm 2)
struct AdamWRates {
  float scale;       // gradients times this
  float rate;        // lr / (1 - b1^t)
  float root_scale;  // 1 / sqrt(1 - b2^t)
  float keep;        // 1 - lr weight_decay
  float weight1;     // 1 - b1
  float weight2;     // 1 - b2
  float eps;
};

// t counts from 1. expm1 keeps the digits that 1 - b^t loses at small t.
BOTH AdamWRates adamw_rates(float t, float learning_rate, float grad_divisor, float log_beta1, float log_beta2,
                            float weight1, float weight2, float eps, float weight_decay) {
  AdamWRates rates;
  rates.scale = 1.0f / grad_divisor;
  rates.rate = learning_rate / -expm1f(log_beta1 * t);
  rates.root_scale = 1.0f / sqrtf(-expm1f(log_beta2 * t));
  rates.keep = 1.0f - learning_rate * weight_decay;
  rates.weight1 = weight1;
  rates.weight2 = weight2;
  rates.eps = eps;
  return rates;
}

BOTH void adamw_element(float& p, float gradient, float& m, float& v, const AdamWRates& rates) {
  const float g = gradient * rates.scale;
  m += rates.weight1 * (g - m);
  v += rates.weight2 * (g * g - v);
  p = p * rates.keep - rates.rate * (m / (sqrtf(v) * rates.root_scale + rates.eps));
}

}  // namespace megallm
