#include "torch_shim.h"

#include <stdexcept>
#include <string>

namespace fused_tricks {

TorchApi torch_api;

namespace {

bool to_dtype(const dlpack::DataType& type, DType& out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kBfloat && type.bits == 16) {
    out = DType::kBFloat16;
  } else if (type.code == dlpack::kFloat && type.bits == 16) {
    out = DType::kFloat16;
  } else if (type.code == dlpack::kFloat && type.bits == 32) {
    out = DType::kFloat32;
  } else if (type.code == dlpack::kFloat && type.bits == 64) {
    out = DType::kFloat64;
  } else {
    return false;
  }
  return true;
}

}  // namespace

bool read_with_dlpack(PyObject* object, TensorView& out) {
  dlpack::Tensor tensor;
  if (torch_api.exchange->tensor_from_object(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  out.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  out.dimensions = tensor.ndim;
  out.shape = tensor.shape;
  out.strides = tensor.strides;
  out.device = tensor.device;
  return to_dtype(tensor.dtype, out.type);
}

bool read_with_shim(TensorShim::Handle tensor, TensorView& out) {
  const TensorShim& shim = torch_api.shim;
  int32_t layout, dtype, device_type;
  if (shim.layout(tensor, &layout) != 0 || layout != shim.strided) return false;
  if (shim.data(tensor, &out.data) != 0 || shim.dimensions(tensor, &out.dimensions) != 0) return false;
  if (shim.shape(tensor, &out.shape) != 0 || shim.strides(tensor, &out.strides) != 0) return false;
  if (shim.dtype(tensor, &dtype) != 0 || shim.device_type(tensor, &device_type) != 0) return false;
  size_t type = 0;
  while (shim.dtypes[type] != dtype) {
    if (++type == kDTypes) return false;
  }
  out.type = static_cast<DType>(type);
  if (device_type == shim.cpu) {
    out.device = {dlpack::kCpu, 0};
    return true;
  }
  out.device.type = dlpack::kCuda;
  return device_type == shim.cuda && shim.device_index(tensor, &out.device.index) == 0;
}

namespace {

getter getter_of(const py::handle& type, const char* name) {
  const py::object descriptor = type.attr(name);
  if (!Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type)) {
    throw std::runtime_error(std::string("torch.Tensor.") + name + " is not the attribute that fused_tricks expects");
  }
  return reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset->get;
}

template <typename Function>
bool find(const py::dict& functions, const char* name, Function& out) {
  if (!functions.contains(name)) return false;
  out = reinterpret_cast<Function>(functions[name].cast<uintptr_t>());
  return true;
}

bool find_shim(const py::dict& functions) {
  TensorShim& shim = torch_api.shim;
  int32_t (*cuda)() = nullptr;
  const bool complete =
      find(functions, "torch_tensor_from_pyobject", shim.from_object) &&
      find(functions, "aoti_torch_delete_tensor_object", shim.delete_handle) &&
      find(functions, "torch_get_mutable_data_ptr", shim.data) &&
      find(functions, "aoti_torch_get_dim", shim.dimensions) && find(functions, "aoti_torch_get_sizes", shim.shape) &&
      find(functions, "aoti_torch_get_strides", shim.strides) && find(functions, "aoti_torch_get_dtype", shim.dtype) &&
      find(functions, "aoti_torch_get_layout", shim.layout) &&
      find(functions, "aoti_torch_get_device_type", shim.device_type) &&
      find(functions, "aoti_torch_get_device_index", shim.device_index) &&
      find(functions, "aoti_torch_device_type_cuda", cuda);
  if (complete) shim.cuda = cuda();
  find(functions, "aoti_torch_get_storage_size", shim.storage_size);
  find(functions, "aoti_torch_get_storage_offset", shim.storage_offset);
  return complete;
}

// Returns the byte offset, in a tensor's Python object, of the word that a handle points to; 0 unless exactly one word
// matches.
size_t offset_of_handle(const py::handle& tensor) {
  void* handle = nullptr;
  if (torch_api.shim.from_object(tensor.ptr(), &handle) != 0) return 0;
  const void* const word = *static_cast<const void**>(handle);
  torch_api.shim.delete_handle(handle);
  size_t found = 0;
  const auto size = static_cast<size_t>(Py_TYPE(tensor.ptr())->tp_basicsize);
  for (size_t offset = sizeof(PyObject); offset + sizeof(void*) <= size; offset += sizeof(void*)) {
    if (*reinterpret_cast<const void* const*>(reinterpret_cast<const char*>(tensor.ptr()) + offset) != word) continue;
    if (found != 0) return 0;
    found = offset;
  }
  return found;
}

bool same_sample(const TensorView& a, const TensorView& b) {
  return a.data == b.data && a.dimensions == b.dimensions && a.shape[0] == b.shape[0] && a.strides[0] == b.strides[0] &&
         a.type == b.type && a.device.type == b.device.type && a.device.index == b.device.index;
}

// Stores torch's own test for the negative bit, if the test is right for `negative` and for all samples.
void learn_negative(const py::dict& functions, const py::list& samples, const py::object& negative) {
  bool (*is_negative)(TensorShim::Handle) = nullptr;
  if (!find(functions, "_ZN2at6native6is_negERKNS_6TensorE", is_negative)) return;
  if (!has_handle(negative.ptr()) || !is_negative(handle_of(negative.ptr()))) return;
  for (const py::handle& sample : samples) {
    if (is_negative(handle_of(sample.ptr()))) return;
  }
  torch_api.is_negative = is_negative;
}

// Reads the samples (one dimension, on the CPU) by handle and by DLPack. Stores the handle's offset if both results are
// equal; otherwise DLPack remains in use.
void learn_handles(const py::list& samples) {
  TensorShim& shim = torch_api.shim;
  size_t offset = 0;
  for (size_t i = 0; i < samples.size(); ++i) {
    const py::object sample = samples[i];
    const size_t at = is_plain(sample.ptr()) ? offset_of_handle(sample) : 0;
    if (at == 0 || (offset != 0 && at != offset)) return;
    offset = at;
    const auto handle = reinterpret_cast<const char*>(sample.ptr()) + at;
    if (shim.dtype(handle, &shim.dtypes[i]) != 0 || shim.layout(handle, &shim.strided) != 0) return;
    if (shim.device_type(handle, &shim.cpu) != 0) return;
  }
  for (const py::handle& sample : samples) {
    TensorView expected, read;
    const auto handle = reinterpret_cast<const char*>(sample.ptr()) + offset;
    if (!read_with_shim(handle, read) || !read_with_dlpack(sample.ptr(), expected) || !same_sample(expected, read))
      return;
  }
  torch_api.handle_offset = offset;
}

}  // namespace

void connect_torch(const py::object& tensor_type, const py::object& parameter_type, const py::object& increment_version,
                   const py::dict& functions, const py::list& samples, const py::object& negative) {
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->version.major != 1 || api->tensor_from_object == nullptr) {
    throw std::runtime_error("torch offers no DLPack 1.x exchange interface that fused_tricks can use");
  }
  // These references are never dropped, because torch's types and functions live as long as the process.
  torch_api.exchange = api;
  torch_api.increment_version = increment_version.inc_ref().ptr();
  torch_api.tensor = reinterpret_cast<PyTypeObject*>(tensor_type.inc_ref().ptr());
  torch_api.parameter = reinterpret_cast<PyTypeObject*>(parameter_type.inc_ref().ptr());
  torch_api.grad = getter_of(tensor_type, "grad");
  torch_api.version = getter_of(tensor_type, "_version");
  torch_api.handle_offset = 0;
  torch_api.is_negative = nullptr;
  if (find_shim(functions)) learn_handles(samples);
  if (torch_api.handle_offset != 0) learn_negative(functions, samples, negative);
}

}  // namespace fused_tricks
