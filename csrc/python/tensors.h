// Reading Python's tensors: address, type, shape, strides, device, gradient and version.
#pragma once

#include <cstdint>

#include "../core/dtype.h"
#include "torch_shim.h"

namespace fused_tricks {

// False, with no Python error left, for a tensor of another dtype, whose elements are not all in one place (sparse,
// quantised, …), or whose memory holds their negatives (torch's negative bit).
bool read_tensor(PyObject* tensor, TensorView& out);

// The address of a tensor's first element; null for None and for empty tensors. Reads a tensor of any dtype.
void* data_of(const py::handle& tensor);
dlpack::Device device_of(const py::handle& tensor);
// Whether a tensor's first element is at `address` as it is, or has no address that could be known, as a DTensor's.
bool is_at(PyObject* tensor, const void* address);

// False where a tensor's storage is known to be too small for `count` dense elements, as after it was resized.
bool has_its_memory(PyObject* tensor, DType type, int64_t count);

// `tensor.grad`, a new reference.
PyObject* grad_of(PyObject* tensor);
int64_t version_of(PyObject* tensor);

// Torch's current stream of a device.
void* current_stream(const dlpack::Device& device);

}  // namespace fused_tricks
