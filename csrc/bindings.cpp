// The Python module megallm_kernels._compiled. Addresses and streams are integers, dtypes are codes (0 fp32, 1 fp16,
// 2 bf16), sizes and strides count elements; `device` is the GPU's number, or -1 for CPU memory.
#include <pybind11/pybind11.h>

#include "launch.h"
#include "launch_shape.h"

#ifndef MEGALLM_CODE  // what the kernels were compiled to, such as sm_80:sm_90a:compute_90; setup.py says it
#error "compile with -DMEGALLM_CODE=..., as setup.py does"
#endif
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

namespace py = pybind11;

namespace megallm {
namespace {

using Address = uint64_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Rows rows_of(const py::tuple& rows) {
  if (rows.size() != 3) refuse("rows are (inner rows, outer stride, inner stride), got ", rows.size(), " numbers");
  return {rows[0].cast<int64_t>(), rows[1].cast<int64_t>(), rows[2].cast<int64_t>()};
}

template <typename Arguments>
void run(const Arguments& arguments, int device, Address stream) {
  if (device < 0) {
    run_on_host(arguments);
  } else {
    launch(arguments, device, at<CUstream_st>(stream));
  }
}

NormForward norm_forward(Address x, Address residual, Address weight, Address y, Address new_residual, Address rstd,
                         int64_t rows, int64_t hidden, const py::tuple& x_rows, const py::tuple& residual_rows,
                         float eps, int dtype, int weight_dtype) {
  return {at<void>(x), at<void>(residual), at<void>(weight), at<void>(y), at<void>(new_residual), at<float>(rstd), rows,
          hidden, rows_of(x_rows), rows_of(residual_rows), eps, 1.0f / static_cast<float>(hidden), dtype, weight_dtype};
}

NormBackward norm_backward(Address dy, Address x, Address weight, Address rstd, Address dnew_residual, Address dx,
                           Address partial, Address dweight, int64_t rows, int64_t hidden, const py::tuple& x_rows,
                           const py::tuple& dy_rows, const py::tuple& dnew_residual_rows, int64_t num_partials,
                           int dtype, int weight_dtype) {
  return {at<void>(dy), at<void>(x), at<void>(weight), at<float>(rstd), at<void>(dnew_residual), at<void>(dx),
          at<float>(partial), at<void>(dweight), rows, hidden, rows_of(x_rows), rows_of(dy_rows),
          rows_of(dnew_residual_rows), num_partials, 1.0f / static_cast<float>(hidden), dtype, weight_dtype};
}

Rope rope(Address x, Address out, Address cosine, Address sine, Address positions, Address cu_seqlens, int64_t tokens,
          int64_t heads, int64_t half, int64_t rows, int64_t documents, const py::tuple& strides,
          const py::tuple& out_strides, int dtype, bool conjugate) {
  return {at<void>(x), at<void>(out), at<float>(cosine), at<float>(sine), at<int64_t>(positions),
          at<int32_t>(cu_seqlens), tokens, heads, half, rows, documents, strides[0].cast<int64_t>(),
          strides[1].cast<int64_t>(), out_strides[0].cast<int64_t>(), out_strides[1].cast<int64_t>(), dtype,
          conjugate};
}

AdamW adamw(Address table, Address chunks, Address ticket, Address step, Address learning_rate, Address grad_divisor,
            Address is_bad, int64_t num_chunks, int64_t chunk, float log_beta1, float log_beta2, float weight1,
            float weight2, float eps, float weight_decay, int grad_dtype, int copy_dtype) {
  return {at<int64_t>(table), at<int32_t>(chunks), at<int32_t>(ticket), at<float>(step), at<float>(learning_rate),
          at<float>(grad_divisor), at<float>(is_bad), num_chunks, chunk, log_beta1, log_beta2, weight1, weight2, eps,
          weight_decay, grad_dtype, copy_dtype};
}

py::dict shape_of(const NormShape& shape) {
  return py::dict(py::arg("vector") = shape.vector, py::arg("per_thread") = shape.per_thread,
                  py::arg("threads_per_row") = shape.threads_per_row, py::arg("rows_per_block") = shape.rows_per_block);
}

}  // namespace
}  // namespace megallm

// For every operation NAME: NAME(...arguments..., device, stream), and NAME_shape(...arguments...) where it has one.
PYBIND11_MODULE(_compiled, module) {
  using namespace megallm;
  using py::arg;
  module.doc() = "Compiled kernels over raw addresses; megallm_kernels.compiled gives them tensors.";
  module.attr("CODE") = TEXT(MEGALLM_CODE);
  module.def("check_runs", &check_runs, "Raises RuntimeError where this GPU cannot run the kernels.", arg("device"));

#define NORM_FORWARD                                                                                                  \
  arg("x"), arg("residual"), arg("weight"), arg("y"), arg("new_residual"), arg("rstd"), arg("rows"), arg("hidden"),   \
      arg("x_rows"), arg("residual_rows"), arg("eps"), arg("dtype"), arg("weight_dtype")
  module.def(
      "rms_norm_forward",
      [](Address x, Address residual, Address weight, Address y, Address new_residual, Address rstd, int64_t rows,
         int64_t hidden, const py::tuple& x_rows, const py::tuple& residual_rows, float eps, int dtype,
         int weight_dtype, int device, Address stream) {
        run(norm_forward(x, residual, weight, y, new_residual, rstd, rows, hidden, x_rows, residual_rows, eps, dtype,
                         weight_dtype),
            device, stream);
      },
      py::kw_only(), NORM_FORWARD, arg("device"), arg("stream"));
  module.def(
      "rms_norm_forward_shape",
      [](Address x, Address residual, Address weight, Address y, Address new_residual, Address rstd, int64_t rows,
         int64_t hidden, const py::tuple& x_rows, const py::tuple& residual_rows, float eps, int dtype,
         int weight_dtype) {
        const NormForward a = norm_forward(x, residual, weight, y, new_residual, rstd, rows, hidden, x_rows,
                                           residual_rows, eps, dtype, weight_dtype);
        check(a);
        return shape_of(norm_shape(a));
      },
      py::kw_only(), NORM_FORWARD);
#undef NORM_FORWARD
  module.def(
      "rms_norm_backward",
      [](Address dy, Address x, Address weight, Address rstd, Address dnew_residual, Address dx, Address partial,
         Address dweight, int64_t rows, int64_t hidden, const py::tuple& x_rows, const py::tuple& dy_rows,
         const py::tuple& dnew_residual_rows, int64_t num_partials, int dtype, int weight_dtype, int device,
         Address stream) {
        run(norm_backward(dy, x, weight, rstd, dnew_residual, dx, partial, dweight, rows, hidden, x_rows, dy_rows,
                          dnew_residual_rows, num_partials, dtype, weight_dtype),
            device, stream);
      },
      py::kw_only(), arg("dy"), arg("x"), arg("weight"), arg("rstd"), arg("dnew_residual"), arg("dx"), arg("partial"),
      arg("dweight"), arg("rows"), arg("hidden"), arg("x_rows"), arg("dy_rows"), arg("dnew_residual_rows"),
      arg("num_partials"), arg("dtype"), arg("weight_dtype"), arg("device"), arg("stream"));
  module.def("rms_norm_partials",
             py::overload_cast<int64_t, int64_t, int, int, int, int>(&norm_partials),
             "Rows of sums that rms_norm_backward is to be given.", py::kw_only(), arg("rows"), arg("hidden"),
             arg("dtype"), arg("weight_dtype"), arg("num_multiprocessors"), arg("device"));

#define ROPE                                                                                                        \
  arg("x"), arg("out"), arg("cos"), arg("sin"), arg("positions"), arg("cu_seqlens"), arg("tokens"), arg("heads"),  \
      arg("half"), arg("rows"), arg("documents"), arg("strides"), arg("out_strides"), arg("dtype"), arg("conjugate")
  module.def(
      "rope",
      [](Address x, Address out, Address cosine, Address sine, Address positions, Address cu_seqlens, int64_t tokens,
         int64_t heads, int64_t half, int64_t rows, int64_t documents, const py::tuple& strides,
         const py::tuple& out_strides, int dtype, bool conjugate, int device, Address stream) {
        run(rope(x, out, cosine, sine, positions, cu_seqlens, tokens, heads, half, rows, documents, strides,
                 out_strides, dtype, conjugate),
            device, stream);
      },
      py::kw_only(), ROPE, arg("device"), arg("stream"));
  module.def(
      "rope_shape",
      [](Address x, Address out, Address cosine, Address sine, Address positions, Address cu_seqlens, int64_t tokens,
         int64_t heads, int64_t half, int64_t rows, int64_t documents, const py::tuple& strides,
         const py::tuple& out_strides, int dtype, bool conjugate) {
        const Rope a = rope(x, out, cosine, sine, positions, cu_seqlens, tokens, heads, half, rows, documents, strides,
                            out_strides, dtype, conjugate);
        check(a);
        const RopeShape shape = rope_shape(a);
        return py::dict(arg("vector") = shape.vector, arg("pairs") = shape.pairs, arg("heads") = shape.heads,
                        arg("tokens") = shape.tokens, arg("grid") = shape.grid);
      },
      py::kw_only(), ROPE);
#undef ROPE

  module.def(
      "adamw",
      [](Address table, Address chunks, Address ticket, Address step, Address learning_rate, Address grad_divisor,
         Address is_bad, int64_t num_chunks, int64_t chunk, float log_beta1, float log_beta2, float weight1,
         float weight2, float eps, float weight_decay, int grad_dtype, int copy_dtype, int device, Address stream) {
        run(adamw(table, chunks, ticket, step, learning_rate, grad_divisor, is_bad, num_chunks, chunk, log_beta1,
                  log_beta2, weight1, weight2, eps, weight_decay, grad_dtype, copy_dtype),
            device, stream);
      },
      py::kw_only(), arg("table"), arg("chunks"), arg("ticket"), arg("step"), arg("learning_rate"), arg("grad_divisor"),
      arg("is_bad"), arg("num_chunks"), arg("chunk"), arg("log_beta1"), arg("log_beta2"), arg("weight1"),
      arg("weight2"), arg("eps"), arg("weight_decay"), arg("grad_dtype"), arg("copy_dtype"), arg("device"),
      arg("stream"));
}
