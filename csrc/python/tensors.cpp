#include "tensors.h"

namespace fused_tricks {

namespace {

dlpack::Tensor require_dlpack(PyObject* object) {
  dlpack::Tensor tensor;
  if (torch_api.exchange->tensor_from_object(object, &tensor) != 0) throw py::error_already_set();
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

// DLPack does not report the negative bit.
bool is_negative(PyObject* tensor) {
  if (torch_api.is_negative != nullptr && has_handle(tensor)) return torch_api.is_negative(handle_of(tensor));
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const py::object value = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
  if (!value) throw py::error_already_set();
  return value.ptr() == Py_True;
}

}  // namespace

bool read_tensor(PyObject* tensor, TensorView& out) {
  const bool is_read = (has_handle(tensor) && read_with_shim(handle_of(tensor), out)) || read_with_dlpack(tensor, out);
  return is_read && !is_negative(tensor);
}

void* data_of(const py::handle& tensor) { return tensor.is_none() ? nullptr : require_dlpack(tensor.ptr()).data; }

dlpack::Device device_of(const py::handle& tensor) { return require_dlpack(tensor.ptr()).device; }

bool is_at(PyObject* tensor, const void* address) {
  void* data;
  if (has_handle(tensor) && torch_api.shim.data(handle_of(tensor), &data) == 0) {
    return data == address && !is_negative(tensor);
  }
  TensorView view;
  if (!read_tensor(tensor, view)) return false;
  return view.data == address || (view.data == nullptr && !is_plain(tensor));
}

bool has_its_memory(PyObject* tensor, DType type, int64_t count) {
  const TensorShim& shim = torch_api.shim;
  int64_t bytes, offset;
  if (!has_handle(tensor) || shim.storage_size == nullptr || shim.storage_offset == nullptr) return true;
  if (shim.storage_size(handle_of(tensor), &bytes) != 0 || shim.storage_offset(handle_of(tensor), &offset) != 0) {
    return true;
  }
  return (offset + count) * size_of(type) <= bytes;
}

PyObject* grad_of(PyObject* tensor) {
  PyObject* grad = is_plain(tensor) ? torch_api.grad(tensor, nullptr) : PyObject_GetAttrString(tensor, "grad");
  if (grad == nullptr) throw py::error_already_set();
  return grad;
}

int64_t version_of(PyObject* tensor) {
  PyObject* version =
      is_plain(tensor) ? torch_api.version(tensor, nullptr) : PyObject_GetAttrString(tensor, "_version");
  if (version == nullptr) throw py::error_already_set();
  const int64_t number = PyLong_AsLongLong(version);
  Py_DECREF(version);
  return number;
}

void* current_stream(const dlpack::Device& device) {
  void* stream = nullptr;
  if (device.type == dlpack::kCpu) return stream;
  if (torch_api.exchange->current_work_stream(device.type, device.index, &stream) != 0) throw py::error_already_set();
  return stream;
}

}  // namespace fused_tricks
