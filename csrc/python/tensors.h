// Access to tensors of Python: address, type, shape, strides, device, gradient and version.
#pragma once

#include <cstdint>

#include "../core/dtype.h"
#include "torch_shim.h"

namespace fused_tricks {

// Returns false, without a Python error, for a tensor of another dtype, of another layout (sparse, quantised, …), or
// with torch's negative bit, whose memory has the negated elements.
bool read_tensor(PyObject* tensor, TensorView& out);

// Returns the address of the first element, for a tensor of any dtype; null for None and for empty tensors.
void* data_of(const py::handle& tensor);
dlpack::Device device_of(const py::handle& tensor);
// True if a tensor's first element is at `address`, or if the tensor has no address, as a DTensor.
bool is_at(PyObject* tensor, const void* address);

// False if a tensor's storage is too small for `count` dense elements, as after a resize.
bool has_its_memory(PyObject* tensor, DType type, int64_t count);

// Returns a new reference to `tensor.grad`.
PyObject* grad_of(PyObject* tensor);
int64_t version_of(PyObject* tensor);

// Returns torch's current stream of a device.
void* current_stream(const dlpack::Device& device);

}  // namespace fused_tricks
