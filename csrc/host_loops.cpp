// The operations on CPU memory, one element after another: the kernels' arithmetic where there is no GPU, for tests.
#include <algorithm>
#include <cmath>

#include "launch.h"

namespace megallm {
namespace {

float weight_at(const void* weight, int dtype, int64_t i) {
  float value = 0;
  with_type(dtype, [&](auto type) { value = widen(static_cast<const decltype(type)*>(weight)[i]); });
  return value;
}

template <typename T>
void norm_forward(const NormForward& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row_offset(a.x_rows, row);
    const T* residual = static_cast<const T*>(a.residual);
    T* y = static_cast<T*>(a.y) + row * a.hidden;
    if (residual != nullptr) {
      residual += row_offset(a.residual_rows, row);
      T* sum = static_cast<T*>(a.new_residual) + row * a.hidden;
      for (int64_t i = 0; i < a.hidden; ++i) sum[i] = narrow<T>(widen(x[i]) + widen(residual[i]));
      x = sum;
    }
    float squares = 0;
    for (int64_t i = 0; i < a.hidden; ++i) squares += widen(x[i]) * widen(x[i]);
    const float rstd = a.rstd[row] = rms_norm_rstd(squares, a.inverse_hidden, a.eps);
    for (int64_t i = 0; i < a.hidden; ++i) {
      y[i] = narrow<T>(rms_norm_value(widen(x[i]), rstd, weight_at(a.weight, a.weight_dtype, i)));
    }
  }
}

template <typename T>
void norm_backward(const NormBackward& a) {
  if (a.partial != nullptr) std::fill(a.partial, a.partial + a.num_partials * a.hidden, 0.0f);
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row_offset(a.x_rows, row);
    const T* dy = static_cast<const T*>(a.dy) + row_offset(a.dy_rows, row);
    T* dx = static_cast<T*>(a.dx) + row * a.hidden;
    float* sums = a.partial == nullptr ? nullptr : a.partial + row % a.num_partials * a.hidden;
    float products = 0;
    for (int64_t i = 0; i < a.hidden; ++i) {
      const float product = widen(dy[i]) * widen(x[i]);
      products += product * weight_at(a.weight, a.weight_dtype, i);
      if (sums != nullptr) sums[i] += product * a.rstd[row];
    }
    const float pull = rms_norm_pull(products, a.rstd[row], a.inverse_hidden);
    for (int64_t i = 0; i < a.hidden; ++i) {
      const float weight = weight_at(a.weight, a.weight_dtype, i);
      float ds = rms_norm_gradient(widen(dy[i]), weight, widen(x[i]), a.rstd[row], pull);
      if (a.dnew_residual != nullptr) {
        ds += widen((static_cast<const T*>(a.dnew_residual) + row_offset(a.dnew_residual_rows, row))[i]);
      }
      dx[i] = narrow<T>(ds);
    }
  }
  if (a.partial == nullptr) return;
  with_type(a.weight_dtype, [&](auto type) {
    using W = decltype(type);
    for (int64_t i = 0; i < a.hidden; ++i) {
      float sum = 0;
      for (int64_t row = 0; row < a.num_partials; ++row) sum += a.partial[row * a.hidden + i];
      static_cast<W*>(a.dweight)[i] = narrow<W>(sum);
    }
  });
}

template <typename T>
void rope(const Rope& a) {
  for (int64_t token = 0; token < a.tokens; ++token) {
    const int64_t row = rope_row(token, a.positions, a.cu_seqlens, a.documents);
    const bool known = row >= 0 && row < a.rows;
    for (int64_t head = 0; head < a.heads; ++head) {
      const T* x = static_cast<const T*>(a.x) + token * a.token_stride + head * a.head_stride;
      T* out = static_cast<T*>(a.out) + token * a.out_token_stride + head * a.out_head_stride;
      for (int64_t i = 0; i < a.half; ++i) {
        const float cosine = known ? a.cosine[row * a.half + i] : NAN;
        const float sine = known ? a.sine[row * a.half + i] : NAN;
        const Pair turned = rope_pair(widen(x[i]), widen(x[i + a.half]), cosine, a.conjugate ? -sine : sine);
        out[i] = narrow<T>(turned.first);
        out[i + a.half] = narrow<T>(turned.second);
      }
    }
  }
}

template <typename G, typename C>
void adamw(const AdamW& a) {
  if (*a.is_bad != 0.0f) return;
  const float t = *a.step + 1.0f;
  for (int64_t i = 0; i < a.num_chunks; ++i) {
    const int64_t* row = a.table + static_cast<int64_t>(a.chunks[2 * i]) * kTableColumns;
    const int64_t start = a.chunks[2 * i + 1] * a.chunk;
    const AdamWRates rates =
        adamw_rates(t, *a.learning_rate, *a.grad_divisor, a.log_beta1, a.log_beta2, a.weight1, a.weight2, a.eps,
                    (row[7] & kDecayed) != 0 ? a.weight_decay : 0.0f);
    float* p = reinterpret_cast<float*>(row[0]);
    const G* g = reinterpret_cast<const G*>(row[1]);
    float* m = reinterpret_cast<float*>(row[2]);
    float* v = reinterpret_cast<float*>(row[3]);
    C* copy = a.copy_dtype == kNone ? nullptr : reinterpret_cast<C*>(row[4]);
    const int64_t end = std::min(start + a.chunk, row[6]);
    for (int64_t e = std::max(start, row[5]); e < end; ++e) {
      adamw_element(p[e], widen(g[e]), m[e], v[e], rates);
      if (copy != nullptr) copy[e] = narrow<C>(p[e]);
    }
  }
  *a.step = t;
}

}  // namespace

void run_on_host(const NormForward& a) {
  check(a);
  with_type(a.dtype, [&](auto type) { norm_forward<decltype(type)>(a); });
}

void run_on_host(const NormBackward& a) {
  check(a);
  with_type(a.dtype, [&](auto type) { norm_backward<decltype(type)>(a); });
}

void run_on_host(const Rope& a) {
  check(a);
  with_type(a.dtype, [&](auto type) { rope<decltype(type)>(a); });
}

void run_on_host(const AdamW& a) {
  check(a);
  with_type(a.grad_dtype, [&](auto grad) {
    with_type(a.copy_dtype, [&](auto copy) { adamw<decltype(grad), decltype(copy)>(a); });
  });
}

}  // namespace megallm
