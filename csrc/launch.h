// The operations: `launch` on a GPU's stream, `run_on_host` on CPU memory. Both check their arguments first.
#pragma once

#include <cuda_runtime_api.h>

#include "arguments.h"

namespace megallm {

void launch(const NormForward& a, int device, cudaStream_t stream);
void launch(const NormBackward& a, int device, cudaStream_t stream);
void launch(const Rope& a, int device, cudaStream_t stream);
void launch(const AdamW& a, int device, cudaStream_t stream);

// How many rows of sums launch(NormBackward) is to be given on this GPU: of as many blocks as it runs at a time. For
// the CPU (device -1) by an estimate.
int64_t norm_partials(int64_t rows, int64_t hidden, int dtype, int weight_dtype, int num_multiprocessors, int device);

// Throws std::runtime_error where the GPU cannot run what was built: no code for it, or its driver is too old.
void check_runs(int device);

void run_on_host(const NormForward& a);
void run_on_host(const NormBackward& a);
void run_on_host(const Rope& a);
void run_on_host(const AdamW& a);

// Throws std::runtime_error in words where CUDA reports an error; `parts` say what was launched, with its sizes.
template <typename... Parts>
void check_cuda(cudaError_t status, const Parts&... parts) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  std::ostringstream text;
  (text << ... << parts);
  text << ": CUDA error " << static_cast<int>(status) << ", " << cudaGetErrorString(status);
  throw std::runtime_error(text.str());
}

// Calls function(T{}) with the type of the code.
template <typename Function>
void with_type(int dtype, const Function& function) {
  if (dtype == kFloat32) {
    function(float{});
  } else if (dtype == kFloat16) {
    function(__half{});
  } else {
    function(__nv_bfloat16{});
  }
}

}  // namespace megallm
