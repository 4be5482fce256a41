#include "plan_guard.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>
#include <string>

namespace fused_tricks {

namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct Names {
  PyObject* params = interned("params");
  PyObject* lr = interned("lr");
  PyObject* state[kStateTensors];
  PyObject* numbers[std::size(kNumbers)];
  PyObject* flags[std::size(kFlags)];

  Names() {
    for (size_t i = 0; i < kStateTensors; ++i) state[i] = interned(kStateKeys[i]);
    for (size_t i = 0; i < std::size(kNumbers); ++i) numbers[i] = interned(kNumbers[i].key);
    for (size_t i = 0; i < std::size(kFlags); ++i) flags[i] = interned(kFlags[i].key);
  }
};

const Names& names() {
  static const Names all;
  return all;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
  if (value == nullptr) throw py::error_already_set();
  return value;
}

double number(PyObject* dict, PyObject* key) {
  const double value = PyFloat_AsDouble(item(dict, key));
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Returns the option kNumbers[index] of a group.
double number(PyObject* dict, size_t index) {
  PyObject* key = names().numbers[index];
  return kNumbers[index].takes_none && item(dict, key) == Py_None ? kNone : number(dict, key);
}

bool truth(PyObject* dict, PyObject* key) {
  const int value = PyObject_IsTrue(item(dict, key));
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

bool fits_float(double number) { return !std::isfinite(number) || std::isfinite(static_cast<float>(number)); }

bool has_one_element(const TensorView& tensor) {
  int64_t count = 1;
  for (int64_t i = 0; i < tensor.dimensions; ++i) count *= tensor.shape[i];
  return count == 1;
}

// Returns the value of `key` in a parameter's state (borrowed); null without such an item.
PyObject* state_item(PyObject* state, PyObject* key) {
  if (state == nullptr || !PyDict_Check(state)) return nullptr;
  return PyDict_GetItemWithError(state, key);
}

// True if the values of the state keys in a parameter's state are `held`, null for a missing item. Most dicts contain
// only these keys, as the same interned strings, and iteration is faster than two look-ups.
bool has_state(PyObject* state, PyObject* const* held) {
  if (PyDict_Check(state)) {
    PyObject *key, *value, *found[kStateTensors] = {};
    Py_ssize_t position = 0;
    bool is_known = true;
    while (is_known && PyDict_Next(state, &position, &key, &value)) {
      is_known = false;
      for (size_t i = 0; i < kStateTensors; ++i) {
        if (key != names().state[i]) continue;
        found[i] = value;
        is_known = true;
        break;
      }
    }
    if (is_known) return std::equal(found, found + kStateTensors, held);
  }
  for (size_t i = 0; i < kStateTensors; ++i) {
    if (state_item(state, names().state[i]) != held[i]) return false;
  }
  return true;
}

// True if a tensor of the state, and the local part of the tensor, are still at the plan's address.
bool is_in_place(PyObject* held, PyObject* own, const void* address) {
  if (held == nullptr || address == nullptr) return true;
  PyObject* const local = local_part_of(held);
  if (own == held || local == own) return is_at(own, address);
  // The local part has been replaced, unless it was pending when the plan was made.
  if (local != nullptr && is_plain(local)) return false;
  return is_at(held, address) && is_at(own, address);
}

}  // namespace

// The stride of a dimension of size 1 is arbitrary in torch.
bool Layout::matches(const TensorView& tensor) const {
  if (static_cast<size_t>(tensor.dimensions) != shape.size()) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (tensor.shape[i] != shape[i]) return false;
    if (shape[i] > 1 && tensor.strides[i] != strides[i]) return false;
  }
  return true;
}

namespace {

DType dtype_of(const py::object& dtype) {
  const auto name = py::str(dtype).cast<std::string>();
  for (size_t i = 0; i < kDTypes; ++i) {
    if (name == std::string("torch.") + kDTypeNames[i]) return static_cast<DType>(i);
  }
  throw std::invalid_argument("a gradient's dtype is not supported");
}

}  // namespace

PlanGuard::PlanGuard(const py::list& entries, const py::object& step_state, bool reads_lr, const py::list& rates,
                     const py::object& reduction)
    : reads_lr_(reads_lr) {
  plan.state = static_cast<StepState*>(data_of(step_state));
  device = device_of(step_state);
  if (!reduction.is_none()) {
    const py::object partials = reduction.attr("partials");
    plan.reduction.partials = static_cast<double*>(data_of(partials));
    plan.reduction.shard_classes = static_cast<int32_t>(py::len(partials) - kSquares);
    plan.reduction.all_reduce = [object = reduction.ptr()] {
      const py::gil_scoped_acquire acquire;
      py::handle(object).attr("all_reduce")();
    };
  }
  for (const py::handle& item : rates) {
    DeviceLR rate;
    if (!item.is_none()) {
      const py::object factors = item.attr("factors");
      TensorView view;
      if (!read_tensor(factors.ptr(), view)) throw std::invalid_argument("the factors' dtype is not supported");
      rate = {item.attr("lr").ptr(), item.attr("base").cast<double>(), static_cast<const double*>(view.data),
              view.shape[0] - 1, item.attr("origin").cast<int64_t>()};
    }
    rates_.push_back(rate);
  }
  for (const py::handle& entry : entries) add_entry(entry);
  find_written_memory();
}

// Adds a CompiledEntry. CompiledPlanGuard in fused_tricks/backends/compiled.py owns the objects that are borrowed here.
void PlanGuard::add_entry(const py::handle& item) {
  Entry entry;
  GuardedEntry guarded;
  entry.group = item.attr("group").cast<size_t>();
  entry.live = item.attr("live").cast<bool>();
  guarded.object = item.attr("param").ptr();
  guarded.source = item.attr("source").ptr();
  if (entry.live) {
    guarded.home = item.attr("home").ptr();
    const py::object spec = item.attr("spec");
    if (!spec.is_none()) guarded.spec = spec.ptr();
    const py::tuple state = item.attr("state");
    const py::tuple first_update = item.attr("first_update");
    TensorView tensor;
    if (!read_tensor(guarded.home, tensor)) throw std::invalid_argument("a parameter's dtype is not supported");
    entry.type = tensor.type;
    entry.grad_type = dtype_of(item.attr("grad_dtype"));
    entry.count = 1;
    for (int64_t i = 0; i < tensor.dimensions; ++i) entry.count *= tensor.shape[i];
    entry.is_matrix = tensor.dimensions > 1;
    entry.param = tensor.data;
    for (size_t i = 0; i < kStateTensors; ++i) {
      entry.state[i] = data_of(state[i]);
      entry.first_update[i] = static_cast<int64_t*>(data_of(first_update[i]));
      if (!state[i].is_none()) guarded.state_tensors |= 1u << i;
      guarded.own[i] = state[i].ptr();
    }
    entry.shard_class = item.attr("shard_class").cast<int32_t>();
    const py::tuple counted = item.attr("counted");
    const py::tuple watched = item.attr("watched");
    for (size_t i = 0; i < counted.size(); ++i) guarded.counters[i].tensor = counted[i].ptr();
    for (size_t i = 0; i < watched.size(); ++i) {
      guarded.counters[i].watched = watched[i].ptr();
      guarded.counters[i].version = version_of(guarded.counters[i].watched);
    }
    guarded.layout.shape.assign(tensor.shape, tensor.shape + tensor.dimensions);
    guarded.layout.strides.assign(tensor.strides, tensor.strides + tensor.dimensions);
    guarded.device = tensor.device;
  }
  plan.entries.push_back(entry);
  guarded_.push_back(guarded);
}

void PlanGuard::find_written_memory() {
  const auto add = [this](const void* address, int64_t size) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    if (address != nullptr) written_.push_back({begin, begin + static_cast<uintptr_t>(size)});
  };
  for (const Entry& entry : plan.entries) {
    const int64_t state_size = entry.type == DType::kFloat64 ? 8 : 4;
    add(entry.param, entry.count * size_of(entry.type));
    for (const void* tensor : entry.state) add(tensor, entry.count * state_size);
  }
  std::sort(written_.begin(), written_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
}

// The ranges are disjoint, because a plan whose tensors share memory (fused_tricks/step/shared_memory.py) runs on the
// reference backend.
Range PlanGuard::unwritten_around(uintptr_t address) const {
  const auto after = std::upper_bound(written_.begin(), written_.end(), address,
                                      [](uintptr_t begin, const Range& range) { return begin < range.begin; });
  return {after == written_.begin() ? 0 : std::prev(after)->end, after == written_.end() ? UINTPTR_MAX : after->begin};
}

void PlanGuard::watch_state(const py::dict& optimizer_state) {
  watches_state_ = true;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(optimizer_state.ptr(), &position, &key, &value)) watched_.emplace_back(key, value);
  for (size_t i = 0; i < guarded_.size(); ++i) {
    GuardedEntry& guarded = guarded_[i];
    guarded.state = nullptr;
    if (plan.entries[i].live && optimizer_state.contains(py::handle(guarded.object))) {
      guarded.state = PyDict_GetItem(optimizer_state.ptr(), guarded.object);
    }
    for (size_t key = 0; key < kStateTensors; ++key) {
      guarded.held[key] = state_item(guarded.state, names().state[key]);
    }
  }
}

bool PlanGuard::state_is_unchanged(const py::dict& optimizer_state) const {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t index = 0;
  while (PyDict_Next(optimizer_state.ptr(), &position, &key, &value)) {
    if (index == watched_.size() || watched_[index].first != key || watched_[index].second != value) return false;
    ++index;
  }
  if (index != watched_.size()) return false;
  for (size_t i = 0; i < guarded_.size(); ++i) {
    const Entry& entry = plan.entries[i];
    const GuardedEntry& guarded = guarded_[i];
    if (guarded.state == nullptr) continue;
    if (!has_state(guarded.state, guarded.held)) return false;
    for (size_t key = 0; key < kStateTensors; ++key) {
      if (!is_in_place(guarded.held[key], guarded.own[key], entry.state[key])) return false;
    }
  }
  return true;
}

bool PlanGuard::refresh_entry(Entry& entry, GuardedEntry& guarded) {
  PyObject* grad = grad_of(guarded.source);
  if (grad == Py_None && guarded.spec != nullptr) {
    Py_DECREF(grad);
    grad = local_grad_of(guarded.object, guarded.spec);
    if (grad == nullptr) return false;
  }
  if (grad == Py_None) {
    Py_DECREF(grad);
    entry.grad = nullptr;
    guarded.has_grad = false;
    return true;
  }
  grads_.push_back(grad);
  guarded.has_grad = true;
  if (!entry.live) return false;
  TensorView param, gradient;
  if (guarded.spec != nullptr && !is_local_part(guarded.home, guarded.object, guarded.spec)) return false;
  if (!read_tensor(guarded.home, param) || param.data != entry.param || param.type != entry.type) return false;
  if (!guarded.layout.matches(param)) return false;
  if (!read_tensor(grad, gradient) || !guarded.layout.matches(gradient)) return false;
  if (gradient.device.type != guarded.device.type || gradient.device.index != guarded.device.index) return false;
  // A wrapper subclass has elements but no address.
  if (gradient.data == nullptr && entry.count > 0) return false;
  if (gradient.type != entry.grad_type) return false;
  if ((required_ & ~guarded.state_tensors) != 0) return false;
  for (const Counter& counter : guarded.counters) {
    if (counter.watched != nullptr && version_of(counter.watched) != counter.version) return false;
  }
  // An empty tensor may have no address, and has no elements to update.
  entry.grad = entry.count == 0 ? nullptr : gradient.data;
  if (entry.grad == nullptr) return true;
  if (!has_its_memory(grad, gradient.type, entry.count)) return false;
  if (!plan.groups[entry.group].fits_float && entry.type != DType::kFloat64) {
    throw py::value_error("an option does not fit FP32, in which a parameter is updated");
  }
  plan.in_double = plan.in_double || entry.type == DType::kFloat64;
  // A parameter may be its own gradient, because each element is read before it is written.
  if (entry.grad == entry.param && gradient.type == entry.type) return true;
  const auto begin = reinterpret_cast<uintptr_t>(entry.grad);
  const uintptr_t end = begin + static_cast<uintptr_t>(entry.count * size_of(gradient.type));
  const Range around = unwritten_around(begin);
  return around.begin <= begin && end <= around.end;
}

bool PlanGuard::refresh_group(PyObject* dict, size_t& index) {
  const py::object params =
      py::reinterpret_steal<py::object>(PySequence_Fast(item(dict, names().params), "group['params'] is no list"));
  if (!params) throw py::error_already_set();
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(params.ptr());
  for (Py_ssize_t i = 0; i < size; ++i, ++index) {
    if (index == guarded_.size()) return false;
    Entry& entry = plan.entries[index];
    GuardedEntry& guarded = guarded_[index];
    const bool is_same = PySequence_Fast_GET_ITEM(params.ptr(), i) == guarded.object;
    if (!is_same || entry.group != plan.groups.size() - 1) return false;
    if (!refresh_entry(entry, guarded)) return false;
  }
  return true;
}

void PlanGuard::follow(const DeviceLR& rate, Group& group) const {
  group.lr = rate.base;
  if (reads_lr_) {
    group.lr_pointer = rate.factors;
    group.lr_last = rate.last;
    group.lr_origin = rate.origin;
    group.lr_is_double = true;
  } else {
    group.lr *= rate.factors[factor_due(plan.state->applied_steps, rate.origin, rate.last)];
  }
}

void PlanGuard::read_lr(PyObject* dict, Group& group) const {
  PyObject* lr = item(dict, names().lr);
  const size_t index = plan.groups.size();
  if (index < rates_.size() && rates_[index].object == lr) {
    follow(rates_[index], group);
    return;
  }
  TensorView tensor;
  const bool readable = reads_lr_ && !PyFloat_Check(lr) && !PyLong_Check(lr) && read_tensor(lr, tensor) &&
                        tensor.device.type == device.type && tensor.device.index == device.index &&
                        has_one_element(tensor) && size_of(tensor.type) >= 4;
  if (readable) {
    group.lr = 1.0;
    group.lr_pointer = tensor.data;
    group.lr_is_double = tensor.type == DType::kFloat64;
  } else {
    group.lr = number(dict, names().lr);
  }
}

bool PlanGuard::refresh(const py::list& group_dicts, const py::dict& optimizer_state) {
  if (!watches_state_) watch_state(optimizer_state);
  if (!state_is_unchanged(optimizer_state)) return false;
  plan.groups.clear();
  plan.in_double = false;
  size_t index = 0;
  for (const py::handle& handle : group_dicts) {
    PyObject* dict = handle.ptr();
    Group group{};
    read_lr(dict, group);
    for (size_t i = 0; i < std::size(kNumbers); ++i) group.*kNumbers[i].field = number(dict, i);
    for (size_t i = 0; i < std::size(kFlags); ++i) group.*kFlags[i].field = truth(dict, names().flags[i]);
    group.fits_float = fits_float(group.lr);
    for (const auto& option : kNumbers) group.fits_float = group.fits_float && fits_float(group.*option.field);
    required_ = 0;
    for (size_t i = 0; i < kStateTensors; ++i) {
      if (i != kMaster && uses(group, i)) required_ |= 1u << i;
    }
    plan.groups.push_back(group);
    if (!refresh_group(dict, index)) return false;
  }
  return index == guarded_.size();
}

// Calls `function` with each version counter that the last step incremented.
template <typename Function>
void PlanGuard::for_each_updated(const Function& function) {
  for (size_t i = 0; i < guarded_.size(); ++i) {
    if (!guarded_[i].has_grad) continue;
    for (Counter& counter : guarded_[i].counters) {
      if (counter.tensor != nullptr) function(counter);
    }
  }
}

void PlanGuard::release_gradients() {
  for (PyObject* grad : grads_) Py_DECREF(grad);
  grads_.clear();
}

void PlanGuard::mark_updated() {
  size_t count = 0;
  bool same = true;
  for_each_updated([&](const Counter& counter) {
    same = same && count < updated_.size() &&
           PyList_GET_ITEM(updated_.ptr(), static_cast<Py_ssize_t>(count)) == counter.tensor;
    ++count;
  });
  same = same && count == updated_.size();
  if (!same) {
    updated_ = py::list();
    for_each_updated([&](const Counter& counter) { updated_.append(py::handle(counter.tensor)); });
  }
  const py::object done =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch_api.increment_version, updated_.ptr()));
  if (!done) throw py::error_already_set();
  for_each_updated([same](Counter& counter) {
    if (counter.watched == nullptr) return;
    if (!same) counter.step = version_of(counter.watched) - counter.version;
    counter.version += counter.step;
  });
}

}  // namespace fused_tricks
