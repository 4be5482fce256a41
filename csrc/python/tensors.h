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

// Returns torch's current stream of a device; null for the CPU.
void* current_stream(const dlpack::Device& device);

}  // namespace fused_tricks
