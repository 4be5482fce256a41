// The parts of torch that the extension looks up once: functions of the stable C interface, and the handle inside a
// tensor's Python object.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../core/dtype.h"
#include "dlpack.h"

namespace fused_tricks {

namespace py = pybind11;

// The description of a tensor. `shape` and `strides` (in elements) point into the tensor.
struct TensorView {
  void* data;
  int64_t dimensions;
  const int64_t* shape;
  const int64_t* strides;
  DType type;
  dlpack::Device device;
};

// Functions of torch's stable C interface. The functions borrow a tensor without a change of its reference count, and
// cost a third of DLPack. A handle points to an at::Tensor, which is one word.
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
  // Torch's own numbers of dtypes, layouts and device types, which differ from DLPack's.
  int32_t dtypes[kDTypes] = {};  // by DType
  int32_t strided = 0;
  int32_t cpu = 0;
  int32_t cuda = 0;
};

// Filled by `connect_torch`, when Python loads the extension.
struct TorchApi {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* increment_version = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  getter grad = nullptr;  // Tensor.grad and Tensor._version, as C functions for these two types
  getter version = nullptr;
  TensorShim shim;
  // at::native::is_neg, which reads the negative bit and is missing in the stable interface. Null: not found in this
  // torch.
  bool (*is_negative)(TensorShim::Handle tensor) = nullptr;
  size_t handle_offset = 0;  // byte offset of the handle's word in objects of these two types; 0: use DLPack
};
extern TorchApi torch_api;

// True if a tensor's type is torch.Tensor or Parameter, and not a subclass, which may override attributes.
inline bool is_plain(PyObject* tensor) {
  const PyTypeObject* type = Py_TYPE(tensor);
  return type == torch_api.parameter || type == torch_api.tensor;
}

// True if a tensor can be read through torch_api.shim.
inline bool has_handle(PyObject* tensor) { return torch_api.handle_offset != 0 && is_plain(tensor); }

inline TensorShim::Handle handle_of(PyObject* tensor) {
  return reinterpret_cast<const char*>(tensor) + torch_api.handle_offset;
}

// Returns false for a tensor that only `read_with_dlpack` can describe or refuse.
bool read_with_shim(TensorShim::Handle tensor, TensorView& out);
bool read_with_dlpack(PyObject* object, TensorView& out);

// Fills torch_api.
//
// functions: addresses of torch's functions by name; before torch 2.14 some are missing.
// samples: a tensor of each DType, in order, from which the handle's offset and torch's own numbers are read.
// negative: a tensor with the negative bit.
void connect_torch(const py::object& tensor_type, const py::object& parameter_type, const py::object& increment_version,
                   const py::dict& functions, const py::list& samples, const py::object& negative);

}  // namespace fused_tricks
