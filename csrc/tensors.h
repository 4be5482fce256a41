// Reading Python's tensors: address, type, shape, strides, device, gradient and version.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.h"
#include "dtype.h"

namespace fused_tricks {

namespace py = pybind11;

// Functions of torch's stable C interface. They read a tensor without owning it even for a moment, which costs a
// third of what DLPack does. A handle points to the one word that a tensor is to torch's C++.
struct TensorShim {
  using Handle = const void*;
  int32_t (*from_object)(void* object, void** handle) = nullptr;
  int32_t (*delete_handle)(void* handle) = nullptr;
  int32_t (*data)(Handle tensor, void** out) = nullptr;
  int32_t (*dimensions)(Handle tensor, int64_t* out) = nullptr;
  int32_t (*shape)(Handle tensor, const int64_t** out) = nullptr;
  int32_t (*strides)(Handle tensor, const int64_t** out) = nullptr;
  int32_t (*dtype)(Handle tensor, int32_t* out) = nullptr;
  int32_t (*layout)(Handle tensor, int32_t* out) = nullptr;
  int32_t (*device_type)(Handle tensor, int32_t* out) = nullptr;
  int32_t (*device_index)(Handle tensor, int32_t* out) = nullptr;
  int32_t (*storage_size)(Handle tensor, int64_t* bytes) = nullptr;
  int32_t (*storage_offset)(Handle tensor, int64_t* elements) = nullptr;
  // How torch numbers what DLPack numbers otherwise.
  int32_t dtypes[kDTypes] = {};  // by DType
  int32_t strided = 0;
  int32_t cpu = 0;
  int32_t cuda = 0;
};

// Borrowed from torch once, when the package is imported.
struct TorchApi {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* increment_version = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  getter grad = nullptr;  // Tensor.grad and Tensor._version, as plain functions for those two types
  getter version = nullptr;
  TensorShim shim;
  // Whether a tensor has the negative bit: at::native::is_neg, which no stable interface has. Null: unknown to this
  // torch.
  bool (*is_negative)(TensorShim::Handle tensor) = nullptr;
  size_t handle_offset = 0;  // where objects of those two types have what a handle points to; 0: read through DLPack
};
extern TorchApi torch_api;

// Fills torch_api.
//
// functions: addresses of torch's functions by name; before torch 2.14 some are missing.
// samples: a tensor of each DType, in order, to see how torch stores and numbers things.
// negative: a tensor with the negative bit.
void connect_torch(const py::object& tensor_type, const py::object& parameter_type, const py::object& increment_version,
                   const py::dict& functions, const py::list& samples, const py::object& negative);

// What a tensor is. Shape and strides, in elements, are the tensor's own.
struct TensorView {
  void* data;
  int64_t dimensions;
  const int64_t* shape;
  const int64_t* strides;
  DType type;
  dlpack::Device device;
};

// False, with no Python error left, for a tensor of another dtype, whose elements are not all in one place (sparse,
// quantised, …), or whose memory holds their negatives (torch's negative bit).
bool read_tensor(PyObject* tensor, TensorView& out);
// The same for a tensor that was at `address` before; false, too, where it no longer is. Its device, which can only
// have changed together with its address, is left out.
bool read_tensor_at(const void* address, PyObject* tensor, TensorView& out);

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
