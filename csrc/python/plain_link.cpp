#include "plain_link.h"

namespace recmas::python {

namespace {

// Whether the parameters of a link fit x, tensor by tensor.
class Fit {
 public:
  Fit(const View& x, bool mixed, const Reader& reader) : x_(x), mixed_(mixed), reader_(reader) {}

  bool matrix(PyObject* object, int64_t rows, int64_t columns) const {
    if (!reader_.is_plain(object)) return false;
    const View view = reader_.read(object);
    return view.is_matrix(rows, columns) && joins(view);
  }

  bool vector(PyObject* object, int64_t length) const {
    if (object == Py_None) return true;
    if (!reader_.is_plain(object)) return false;
    const View view = reader_.read(object);
    return view.is_vector(length) && joins(view);
  }

  bool norm(PyObject* weight, PyObject* bias, int64_t length) const {
    return (weight != Py_None || bias == Py_None) && vector(weight, length) && vector(bias, length);
  }

 private:
  bool joins(const View& view) const {
    return view.device_type == x_.device_type && view.device_index == x_.device_index &&
           (mixed_ ? view.dtype != View::kOther : view.dtype == x_.dtype) && view.column_stride == 1 &&
           view.is_contiguous();
  }

  const View& x_;
  bool mixed_;
  const Reader& reader_;
};

}  // namespace

bool is_plain_link(const LinkArguments& a, bool mixed, const Reader& reader) {
  const bool identity = equals(a.residual, "identity"), linear = equals(a.residual, "linear");
  if (!(identity || linear || equals(a.residual, "none"))) return false;
  if (linear != (a.w3 != Py_None) || (!linear && a.b3 != Py_None)) return false;
  if (!reader.is_plain(a.x) || !reader.is_plain(a.w1) || !reader.is_plain(a.w2)) return false;
  const View x = reader.read(a.x);
  const int64_t in = x.columns, hidden = reader.read(a.w1).rows, out = reader.read(a.w2).rows;
  if (x.dimensions != 2 || x.dtype == View::kOther || x.column_stride != 1 || (identity && in != out)) return false;
  const Fit fit(x, mixed, reader);
  return fit.matrix(a.w1, hidden, in) && fit.matrix(a.w2, out, hidden) && (!linear || fit.matrix(a.w3, out, in)) &&
         fit.vector(a.b1, hidden) && fit.vector(a.b2, out) && fit.vector(a.b3, out) &&
         fit.norm(a.norm_in_weight, a.norm_in_bias, in) && fit.norm(a.norm_out_weight, a.norm_out_bias, out);
}

}  // namespace recmas::python
