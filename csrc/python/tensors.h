// Access to torch's Python tensors: address, dtype, shape, strides, device, gradient and version.
#pragma once

#include <cstdint>

#include "../core/dtype.h"
#include "torch_shim.h"

namespace fused_tricks {

// Reads a tensor into `out`. Returns false, with no Python error set, for a tensor of another dtype, of another layout
// than strided, or with torch's negative bit (whose memory holds the negated elements).
bool read_tensor(PyObject* tensor, TensorView& out);

// Returns the address of a tensor's first element, for any dtype; null for None and empty tensors.
void* data_of(const py::handle& tensor);
dlpack::Device device_of(const py::handle& tensor);
// True if a tensor's first element is at `address`, without the negative bit. True for a wrapper subclass such as
// DTensor, whose address is unknown.
bool is_at(PyObject* tensor, const void* address);

// False if a tensor's storage is too small for `count` dense elements, as after `resize_`. True if the size is unknown.
bool has_its_memory(PyObject* tensor, DType type, int64_t count);

// Returns a new reference to `tensor.grad`.
PyObject* grad_of(PyObject* tensor);
int64_t version_of(PyObject* tensor);

// Returns the local part of a DTensor (borrowed); null for any other tensor.
PyObject* local_part_of(PyObject* tensor);

// True if `local` and `spec` are still the local part and the DTensorSpec of a DTensor.
bool is_local_part(PyObject* local, PyObject* tensor, PyObject* spec);

// Returns a new reference to the local part of a DTensor's gradient, or to None without a gradient. Returns null, with
// no Python error set, if Python must convert the gradient: a pending one, or one that is placed otherwise than `spec`.
PyObject* local_grad_of(PyObject* tensor, PyObject* spec);

// Returns torch's current stream of a device; null for the CPU.
void* current_stream(const dlpack::Device& device);

}  // namespace fused_tricks
