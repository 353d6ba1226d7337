// The Python module megallm_kernels._cpu. Addresses are integers, dtypes are codes (0 fp32, 1 fp16, 2 bf16), sizes
// count elements. Nothing is checked here but what would be read beyond: megallm_kernels.cpu_adamw checks tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu_adamw.h"

namespace py = pybind11;

namespace megallm::cpu {
namespace {

using Addresses = std::vector<uint64_t>;

const char* name_of(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "plain";
}

// Empty: the widest.
Isa isa_named(const std::string& name) {
  std::string names;
  for (const Isa isa : isas()) {
    if (name.empty() || name == name_of(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + name_of(isa);
  }
  throw std::invalid_argument("this machine does not have the instruction set '" + name + "': it has " + names);
}

void check_lengths(size_t expected, std::initializer_list<size_t> found) {
  for (const size_t size : found) {
    if (size != expected) throw std::invalid_argument("the lists have different lengths");
  }
}

template <typename T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace
}  // namespace megallm::cpu

PYBIND11_MODULE(_cpu, module) {
  using namespace megallm::cpu;
  using py::arg;
  module.doc() = "Kernels for CPU memory over raw addresses; megallm_kernels.cpu_adamw gives them tensors.";
#ifdef _OPENMP
  module.attr("HAS_THREADS") = true;
#else
  module.attr("HAS_THREADS") = false;
#endif
  py::list names;
  for (const Isa isa : isas()) names.append(name_of(isa));
  module.attr("ISAS") = py::tuple(names);

  module.def(
      "adamw",
      [](const Addresses& params, const Addresses& grads, const Addresses& exp_avgs, const Addresses& exp_avg_sqs,
         const Addresses& copies, const std::vector<int64_t>& sizes, const std::vector<bool>& decayed,
         double grad_scale, double keep, double beta1, double beta2, double root_correction2, double minus_rate,
         double eps, int grad_dtype, int copy_dtype, int num_threads, const std::string& isa) {
        const bool has_copies = copy_dtype != kNone;
        check_lengths(sizes.size(), {params.size(), grads.size(), exp_avgs.size(), exp_avg_sqs.size(), decayed.size(),
                                     has_copies ? copies.size() : sizes.size()});
        std::vector<Tensor> tensors;
        tensors.reserve(sizes.size());
        for (size_t i = 0; i < sizes.size(); ++i) {
          tensors.push_back({at<float>(params[i]), at<void>(grads[i]), at<float>(exp_avgs[i]),
                             at<float>(exp_avg_sqs[i]), at<void>(has_copies ? copies[i] : 0), sizes[i], decayed[i]});
        }
        auto rounded = [](double x) { return static_cast<float>(x); };
        const AdamW arguments = {rounded(grad_scale), rounded(keep), rounded(1 - beta1), rounded(beta2),
                                 rounded(1 - beta2), rounded(root_correction2), rounded(minus_rate), rounded(eps),
                                 grad_dtype, copy_dtype};
        const Isa chosen = isa_named(isa);
        const py::gil_scoped_release released;
        adamw(arguments, tensors, num_threads, chosen);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("exp_avgs"), arg("exp_avg_sqs"), arg("copies"), arg("sizes"),
      arg("decayed"), arg("grad_scale"), arg("keep"), arg("beta1"), arg("beta2"), arg("root_correction2"),
      arg("minus_rate"), arg("eps"), arg("grad_dtype"), arg("copy_dtype"), arg("num_threads"), arg("isa"));

  module.def(
      "advise_huge_pages",
      [](uint64_t address, int64_t num_bytes) { return advise_huge_pages(at<void>(address), num_bytes); },
      py::kw_only(), arg("address"), arg("num_bytes"));

  module.def(
      "squared_norm",
      [](const Addresses& arrays, const std::vector<int64_t>& sizes, const std::vector<int>& dtypes, int num_threads,
         const std::string& isa) {
        check_lengths(sizes.size(), {arrays.size(), dtypes.size()});
        std::vector<Array> all;
        for (size_t i = 0; i < sizes.size(); ++i) all.push_back({at<void>(arrays[i]), sizes[i], dtypes[i]});
        const Isa chosen = isa_named(isa);
        const py::gil_scoped_release released;
        return squared_norm(all, num_threads, chosen);
      },
      py::kw_only(), arg("arrays"), arg("sizes"), arg("dtypes"), arg("num_threads"), arg("isa"));
}
