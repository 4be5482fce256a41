#include "tensors.h"

#include <structmember.h>

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

// The places of `_local_tensor` and `_spec` in the objects of a type; 0 for a type without these slots.
struct DTensorSlots {
  PyTypeObject* type = nullptr;
  Py_ssize_t local = 0;
  Py_ssize_t spec = 0;
};

Py_ssize_t offset_of_slot(PyTypeObject* type, const char* name) {
  const py::object member =
      py::reinterpret_steal<py::object>(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name));
  if (!member) PyErr_Clear();
  if (!member || !Py_IS_TYPE(member.ptr(), &PyMemberDescr_Type)) return 0;
  if (!PyType_IsSubtype(type, PyDescr_TYPE(member.ptr()))) return 0;
  return reinterpret_cast<PyMemberDescrObject*>(member.ptr())->d_member->offset;
}

const DTensorSlots& slots_of(PyTypeObject* type) {
  static DTensorSlots slots;
  if (slots.type != type) {
    const DTensorSlots found{type, offset_of_slot(type, "_local_tensor"), offset_of_slot(type, "_spec")};
    Py_INCREF(type);
    Py_XDECREF(slots.type);
    slots = found;
  }
  return slots;
}

// Returns the object in a slot (borrowed); null for an empty slot, or without the slot.
PyObject* slot(PyObject* object, Py_ssize_t offset) {
  return offset == 0 ? nullptr : *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}

bool is_same_attribute(PyObject* a, PyObject* b, PyObject* name, bool compares) {
  const py::object of_a = py::reinterpret_steal<py::object>(PyObject_GetAttr(a, name));
  const py::object of_b = py::reinterpret_steal<py::object>(PyObject_GetAttr(b, name));
  if (!of_a || !of_b) throw py::error_already_set();
  if (of_a.is(of_b)) return true;
  const int is_equal = compares ? PyObject_RichCompareBool(of_a.ptr(), of_b.ptr(), Py_EQ) : 0;
  if (is_equal < 0) throw py::error_already_set();
  return is_equal != 0;
}

// True if two DTensorSpecs have the same mesh and equal placements.
bool is_placed_alike(PyObject* a, PyObject* b) {
  static PyObject* const mesh = PyUnicode_InternFromString("mesh");
  static PyObject* const placements = PyUnicode_InternFromString("placements");
  return a == b || (is_same_attribute(a, b, mesh, false) && is_same_attribute(a, b, placements, true));
}

}  // namespace

PyObject* local_part_of(PyObject* tensor) {
  return is_plain(tensor) ? nullptr : slot(tensor, slots_of(Py_TYPE(tensor)).local);
}

bool is_local_part(PyObject* local, PyObject* tensor, PyObject* spec) {
  const DTensorSlots& slots = slots_of(Py_TYPE(tensor));
  return slot(tensor, slots.local) == local && slot(tensor, slots.spec) == spec;
}

PyObject* local_grad_of(PyObject* tensor, PyObject* spec) {
  const py::object grad = py::reinterpret_steal<py::object>(torch_api.grad(tensor, nullptr));
  if (!grad) throw py::error_already_set();
  if (grad.is_none()) return py::object(grad).release().ptr();
  if (!Py_IS_TYPE(grad.ptr(), Py_TYPE(tensor))) return nullptr;
  const DTensorSlots& slots = slots_of(Py_TYPE(tensor));
  // Owned references, because a comparison may run Python code.
  const auto grad_spec = py::reinterpret_borrow<py::object>(slot(grad.ptr(), slots.spec));
  auto local = py::reinterpret_borrow<py::object>(slot(grad.ptr(), slots.local));
  if (!local || !is_plain(local.ptr()) || !grad_spec || !is_placed_alike(grad_spec.ptr(), spec)) return nullptr;
  return local.release().ptr();
}

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
  // DTensor does not override `_version`, nor `grad` in `local_grad_of`.
  const bool is_inherited = is_plain(tensor) || local_part_of(tensor) != nullptr;
  PyObject* version = is_inherited ? torch_api.version(tensor, nullptr) : PyObject_GetAttrString(tensor, "_version");
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
