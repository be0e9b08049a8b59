// The signature of every op. Kernels are registered beside their launch code; fake and autograd kernels in Python.
// The `.out` overloads write into a contiguous tensor of the right shape and have no gradient.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(stitchvm, m) {
  m.def("adaln(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor");
  m.def("adaln.out(Tensor x, Tensor scale, Tensor shift, float eps, *, Tensor(a!) out) -> ()");
  m.def("adaln_input_grad(Tensor grad, Tensor x, Tensor scale, float eps) -> Tensor");
  m.def("adaln_input_grad.out(Tensor grad, Tensor x, Tensor scale, float eps, *, Tensor(a!) out) -> ()");
  m.def("resample_tokens(Tensor x, int h, int w, int out_h, int out_w) -> Tensor");
  m.def("resample_tokens.out(Tensor x, int h, int w, int out_h, int out_w, *, Tensor(a!) out) -> ()");
  m.def("resample_tokens_input_grad(Tensor grad, int h, int w, int out_h, int out_w) -> Tensor");
  m.def("resample_tokens_input_grad.out(Tensor grad, int h, int w, int out_h, int out_w, *, Tensor(a!) out) -> ()");
}
