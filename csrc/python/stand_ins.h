// Tensors that hold one element for all: what packed weights leave in their places. Whether they still do is asked at
// every step of a decoder, of hundreds, none of which is in a cache by then.
//
// torch says so by way of four or five places in memory, each of which tells where the next one is. But a tensor whose
// own memory is what it was still has its description where that was; and if sizes and strides there are what they
// were, it is what it was. That takes two places, which are known beforehand.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "tensors.h"

namespace recmas::python {

class StandIns {
 public:
  explicit StandIns(PyObject* tensors) : tuple_(py::reinterpret_borrow<py::object>(tensors)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) all_.push_back({PyTuple_GET_ITEM(tensors, i)});
  }

  // Whether all of them still hold one element for all.
  bool hold() {
    for (StandIn& each : all_) {
      if (each.is_as_seen()) continue;
      const View view = reader().read(each.tensor);
      if (view.row_stride != 0 || view.column_stride != 0) return false;
      each.see();
    }
    return true;
  }

 private:
  struct StandIn {
    PyObject* tensor;
    const int64_t* at = nullptr;  // sizes and strides; null: not seen, or not where they could be looked at
    int64_t shape[Reader::kShape] = {};
    size_t bytes = 0;
    char own[96] = {};  // but for the count of references

    const char* memory() const { return reinterpret_cast<const char*>(tensor) + sizeof(Py_ssize_t); }

    bool is_as_seen() const {
      return at != nullptr && std::memcmp(memory(), own, bytes) == 0 && std::memcmp(at, shape, sizeof shape) == 0;
    }

    void see() {
      at = nullptr;
      const auto size = static_cast<size_t>(Py_TYPE(tensor)->tp_basicsize) - sizeof(Py_ssize_t);
      const int64_t* const found = size <= sizeof own ? reader().shape_inside(tensor) : nullptr;
      if (found == nullptr || !points_to(found, size)) return;
      bytes = size;
      std::memcpy(own, memory(), size);
      std::memcpy(shape, found, sizeof shape);
      at = found;
    }

    // Whether the tensor's own memory says where the description is that holds this: while that is so, it lives.
    bool points_to(const int64_t* inside, size_t size) const {
      constexpr uintptr_t kDescription = 512;  // bytes at most
      for (size_t i = 0; i + sizeof(uintptr_t) <= size; i += sizeof(uintptr_t)) {
        uintptr_t begin;
        std::memcpy(&begin, memory() + i, sizeof begin);
        if (reinterpret_cast<uintptr_t>(inside) - begin < kDescription) return true;
      }
      return false;
    }
  };

  py::object tuple_;  // holds the tensors
  std::vector<StandIn> all_;
};

}  // namespace recmas::python
