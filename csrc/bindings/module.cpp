// module.cpp - the table of contents of the extension: one line per kernel, then what describes the build.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/bindings.h"
#include "bindings/border.h"
#include "bindings/build.h"

namespace py = pybind11;

namespace {

// Kernels take METH_FASTCALL: no argument tuple, no overload resolution, 0.1 microseconds less per call.
#define FASTCALL(name) \
  #name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pyflowmap::name)), METH_FASTCALL

PyMethodDef kernels[] = {
    {FASTCALL(combine),
     "combine(inputs, coefficients, outputs, leading, trusted, noise=None, mask=None, clamp=None, gram=None, "
     "cross=None, "
     "sums=None, like=None, dtype=None, store=None) -> bool: contract in csrc/combine/combine.h"},
    {FASTCALL(update),
     "update(combinations, out) -> bool: combinations of the algebra into tensors, on the direct road only"},
    {FASTCALL(sum_of), "sum_of(*terms) -> tuple | None: factor * a + ... of (factor, a, ...), lazy combinations"},
    {FASTCALL(activation), "activation(tensors, kind) -> bool: (a, b, da, db, y, dy)"},
    {FASTCALL(activation_backward),
     "activation_backward(tensors, kind) -> bool: (a, b, da, db, gy, gdy, ga, gb, gda, gdb)"},
    {FASTCALL(activate), "activate(x, dx, kind) -> y | (y, dy) | None: the direct road"},
    {FASTCALL(attention),
     "attention(tensors, scale, causal) -> bool: (q, k, v, dq, dk, dv, mask, lengths, o, do, lse, mu)"},
    {FASTCALL(attention_backward),
     "attention_backward(tensors, scale, causal) -> bool: (q, k, v, dq, dk, dv, mask, lengths, o, do, lse, mu, go, "
     "gdo, gq, gk, gv, gdq, gdk, gdv)"},
    {FASTCALL(dual_linear), "dual_linear(tensors) -> bool: (x, dx, weight, bias, y, dy)"},
    {FASTCALL(error_norm), "error_norm(tensors, coefficients, rtol, atol) -> bool: (x, y, terms ..., sums, factor)"},
    {FASTCALL(gated_residual), "gated_residual(tensors) -> bool: (x, gate, h, dx, dgate, dh, y, dy)"},
    {FASTCALL(gated_residual_backward),
     "gated_residual_backward(tensors) -> bool: (h, gate, dgate, dh, gy, gdy, gh, ggate, gdh, gdgate)"},
    {FASTCALL(norm_modulate),
     "norm_modulate(tensors, kind, eps) -> bool: (x, scale, shift, dx, dscale, dshift, y, dy)"},
    {FASTCALL(norm_modulate_backward),
     "norm_modulate_backward(tensors, kind, eps) -> bool: (x, scale, dx, dscale, gy, gdy, gx, gscale, gshift, gdx, "
     "gdscale, gdshift)"},
    {FASTCALL(norm_rope), "norm_rope(tensors, eps) -> bool: (x, weight, cos, sin, dx, dweight, y, dy)"},
    {FASTCALL(norm_rope_backward),
     "norm_rope_backward(tensors, eps) -> bool: (x, weight, cos, sin, dx, dweight, gy, gdy, gx, gweight, gdx, "
     "gdweight)"},
    {FASTCALL(time_embedding), "time_embedding(tensors, span) -> bool: (s, t, frequencies, ds, dt, y, dy)"},
    {FASTCALL(time_embedding_backward),
     "time_embedding_backward(tensors, span) -> bool: (s, t, frequencies, ds, dt, gy, gdy, gs, gt, gds, gdt)"},
    {"version_of", pyflowmap::version_of, METH_O, "version_of(tensor) -> int | None: what pfm.lazy records"},
    {nullptr, nullptr, 0, nullptr},
};

// Keeps references for the life of the process; the module is never unloaded.
void connect(const py::dict& objects) {
  pyflowmap::Torch& torch = pyflowmap::torch();
  const auto keep = [&](const char* name) { return py::object(objects[name]).release().ptr(); };
  torch.is_grad_enabled = keep("is_grad_enabled");
  torch.dispatch_modes = keep("dispatch_modes");
  torch.is_tracing = keep("is_tracing");
  torch.increment_version = keep("increment_version");
  torch.forward_ad = keep("forward_ad");
  torch.allocate = keep("allocate");
  torch.empty_like = keep("empty_like");
  torch.parameter = reinterpret_cast<PyTypeObject*>(keep("Parameter"));
  torch.tensor = reinterpret_cast<PyTypeObject*>(keep("Tensor"));
  pyflowmap::find_descriptors();
}

}  // namespace

PYBIND11_MODULE(PYFLOWMAP_MODULE, m) {
  m.doc() = "pyflowmap's compiled kernels. Use pyflowmap.ops; this module checks without words.";
  if (PyModule_AddFunctions(m.ptr(), kernels) != 0) throw py::error_already_set();
  m.def("connect", &connect, py::arg("objects"), "Hands over the objects of torch that the border asks.");
  pyflowmap::define_build(m);
}
