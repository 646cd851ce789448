#include "tensors.h"

#include <string>
#include <vector>

namespace recmas::python {

namespace {

// DLPack 1.x (dlpack.h of the DMLC project): the parts that are read here.
struct Description {
  void* data;
  int32_t device_type, device_index;
  int32_t dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeTable {
  uint32_t major, minor;
  void* older;
  void (*unused[3])();
  int (*describe)(void* object, void* description);
  void (*current_stream)();
};

constexpr uint32_t kMajor = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

int32_t kernel_dtype_of(uint8_t code, uint8_t bits) {
  if (code == kFloat && bits == 32) return static_cast<int32_t>(Dtype::f32);
  if (code == kFloat && bits == 16) return static_cast<int32_t>(Dtype::f16);
  if (code == kBfloat && bits == 16) return static_cast<int32_t>(Dtype::bf16);
  return View::kOther;
}

void set_dimensions(View& view, const int64_t* sizes, const int64_t* strides) {
  const int32_t n = view.dimensions;
  view.elements = 1;
  view.dense = true;
  for (int32_t i = n; i-- > 0;) {
    view.dense = view.dense && (sizes[i] == 1 || strides[i] == view.elements);
    view.elements *= sizes[i];
  }
  for (int32_t i = 0; n <= 4 && i < n; ++i) {
    view.sizes[i] = sizes[i];
    view.strides[i] = strides[i];
  }
  view.columns = n > 0 ? sizes[n - 1] : 1;
  view.column_stride = n > 0 ? strides[n - 1] : 1;
  view.rows = n > 1 ? sizes[n - 2] : 1;
  view.row_stride = n > 1 ? strides[n - 2] : view.columns;
}

}  // namespace

void Reader::connect(const py::module_& torch, const py::object& table) {
  tensor_ = torch.attr("Tensor");
  parameter_ = torch.attr("nn").attr("Parameter");
  torch_ = torch;
  byte_ = torch.attr("uint8");
  int64_ = torch.attr("int64");
  cpu_ = torch.attr("device")("cpu");
  kernel_dtypes_[static_cast<int>(Dtype::f32)] = torch.attr("float32");
  kernel_dtypes_[static_cast<int>(Dtype::bf16)] = torch.attr("bfloat16");
  kernel_dtypes_[static_cast<int>(Dtype::f16)] = torch.attr("float16");
  describe_ = nullptr;
  if (table.is_none()) return;
  const auto* functions = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  if (functions == nullptr) throw py::error_already_set();
  if (functions->major == kMajor) describe_ = functions->describe;
}

View Reader::read(PyObject* object) const {
  if (!is_plain(object) && !PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(tensor_.ptr()))) {
    throw py::type_error(std::string("expected a tensor, got ") + Py_TYPE(object)->tp_name);
  }
  if (describe_ == nullptr) return read_attributes(object);
  Description found;
  if (describe_(object, &found) != 0) throw py::error_already_set();
  View view{static_cast<char*>(found.data) + found.byte_offset,
            found.device_type,
            found.device_index,
            found.dimensions,
            kernel_dtype_of(found.type_code, found.type_bits),
            0,
            0,
            0,
            0,
            0,
            false,
            found.type_bits * found.type_lanes / 8,
            found.type_code == kInt && found.type_bits == 64 && found.type_lanes == 1,
            {},
            {}};
  set_dimensions(view, found.sizes, found.strides);
  return view;
}

const int64_t* Reader::shape_inside(PyObject* object) const {
  Description found;
  if (describe_ == nullptr || !is_plain(object)) return nullptr;
  if (describe_(object, &found) != 0) throw py::error_already_set();
  const bool side_by_side = found.dimensions <= kShape / 2 && found.strides == found.sizes + kShape / 2;
  return side_by_side ? found.sizes : nullptr;
}

View Reader::read_attributes(PyObject* object) const {
  const py::handle tensor(object);
  const py::object device = tensor.attr("device"), dtype = tensor.attr("dtype");
  View view{};
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  // Devices other than the CPU are only compared, so any number that differs where they differ will do.
  const bool cpu = device.attr("type").cast<std::string>() == "cpu";
  view.device_type = cpu ? View::kCpu : static_cast<int32_t>(py::hash(device.attr("type")) | 0x100);
  view.device_index = device.attr("index").is_none() ? -1 : device.attr("index").cast<int32_t>();
  view.dtype = dtype_of(dtype.ptr());
  view.element_bytes = tensor.attr("element_size")().cast<int32_t>();
  view.is_int64 = dtype.is(int64_);
  const py::tuple sizes = tensor.attr("shape"), strides = tensor.attr("stride")();
  view.dimensions = static_cast<int32_t>(sizes.size());
  std::vector<int64_t> all_sizes, all_strides;
  for (size_t i = 0; i < sizes.size(); ++i) {
    all_sizes.push_back(sizes[i].cast<int64_t>());
    all_strides.push_back(strides[i].cast<int64_t>());
  }
  set_dimensions(view, all_sizes.data(), all_strides.data());
  return view;
}

int32_t Reader::dtype_of(PyObject* dtype) const {
  for (int32_t number = 0; number < 3; ++number) {
    if (dtype == kernel_dtypes_[number].ptr()) return number;
  }
  return View::kOther;
}

py::object Reader::allocate(int64_t bytes) const {
  return torch_.attr("empty")(bytes, py::arg("dtype") = byte_, py::arg("device") = cpu_);  // whatever the default is
}

Reader& reader() {
  static Reader* const kept = new Reader;  // never destroyed: the interpreter may end before static objects do
  return *kept;
}

}  // namespace recmas::python
