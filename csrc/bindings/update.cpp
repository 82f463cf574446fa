// update.cpp (bindings) - the algebra's short road: sums of lazy combinations, and combinations into given tensors as one
// call of `combine`, without a line of Python between.
//
// `update` forms the union of their operands and the matrix over them, as pyflowmap/algebra.py does for every other road, and
// compares the versions that the combinations recorded. What is not plain (noise, a tensor beside combinations, a
// coefficient of several leading dimensions) answers False and is left to Python.
#include <utility>

#include "bindings/bindings.h"
#include "bindings/border.h"
#include "bindings/perform.h"
#include "combine/combine.h"

namespace pyflowmap {
namespace {

// Owned references, given back at the end of the scope.
struct Owned {
  PyObject* object = nullptr;
  Owned() = default;
  explicit Owned(PyObject* o) : object(o) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object); }
};

// The three tuples of a lazy combination (pyflowmap/combination.py), in step.
struct Combination {
  Owned operands, coefficients, versions;
  Py_ssize_t size = 0;
};

bool take(PyObject* from, PyObject* name, Owned* to) {
  to->object = PyObject_GetAttr(from, name);
  if (!to->object) PyErr_Clear();  // a tensor, say: Python makes a combination of it
  return to->object && PyTuple_CheckExact(to->object);
}

bool read_combination(PyObject* object, Combination* c) {
  static PyObject* operands = PyUnicode_InternFromString("operands");
  static PyObject* coefficients = PyUnicode_InternFromString("coefficients");
  static PyObject* versions = PyUnicode_InternFromString("versions");
  if (Py_TYPE(object) == torch().tensor || Py_TYPE(object) == torch().parameter) return false;
  if (!take(object, operands, &c->operands) || !take(object, coefficients, &c->coefficients) ||
      !take(object, versions, &c->versions))
    return false;
  c->size = PyTuple_GET_SIZE(c->operands.object);
  return PyTuple_GET_SIZE(c->coefficients.object) == c->size && PyTuple_GET_SIZE(c->versions.object) == c->size;
}

// The operands of all combinations, each once, and the coefficients as a matrix over them. Borrowed references.
struct Union {
  PyObject* operands[kMaxInputs];
  PyObject* coefficients[kMaxOutputs][kMaxInputs];
  int columns = 0;
  bool have_counters = true;
};

Answer unite(const Combination* combinations, int rows, Union* all) {
  for (int k = 0; k < rows; ++k) {
    const Combination& c = combinations[k];
    for (Py_ssize_t i = 0; i < c.size; ++i) {
      PyObject* operand = PyTuple_GET_ITEM(c.operands.object, i);
      PyObject* version = PyTuple_GET_ITEM(c.versions.object, i);
      const int fresh = has_version(operand, version);
      if (fresh != 1) return fresh < 0 ? kError : kNo;
      all->have_counters = all->have_counters && version != Py_None;
      int column = 0;
      while (column < all->columns && all->operands[column] != operand) ++column;
      if (column == kMaxInputs) return kNo;
      if (column == all->columns) {
        for (int l = 0; l < rows; ++l) all->coefficients[l][column] = nullptr;
        all->operands[all->columns++] = operand;
      }
      all->coefficients[k][column] = PyTuple_GET_ITEM(c.coefficients.object, i);
    }
  }
  return kYes;
}

PyObject* tuple_of(PyObject* const* items, int count, PyObject* missing) {
  PyObject* tuple = PyTuple_New(count);
  for (int i = 0; tuple && i < count; ++i) {
    PyObject* item = items[i] ? items[i] : missing;
    Py_INCREF(item);
    PyTuple_SET_ITEM(tuple, i, item);
  }
  return tuple;
}

// c * factor for a number or the pair (number, tensor); a new reference, null without an error for anything else.
PyObject* scaled(PyObject* c, double factor) {
  if (PyFloat_CheckExact(c)) return PyFloat_FromDouble(PyFloat_AS_DOUBLE(c) * factor);
  if (!PyTuple_CheckExact(c) || PyTuple_GET_SIZE(c) != 2 || !PyFloat_CheckExact(PyTuple_GET_ITEM(c, 0))) return nullptr;
  Owned number(PyFloat_FromDouble(PyFloat_AS_DOUBLE(PyTuple_GET_ITEM(c, 0)) * factor));
  return number.object ? PyTuple_Pack(2, number.object, PyTuple_GET_ITEM(c, 1)) : nullptr;
}

// One operand and what stands beside it, in a sum that is being formed. Owns the coefficient.
struct Term {
  PyObject *operand, *version;
  Owned coefficient;
};

constexpr int kMaxSum = 32;  // longer sums are left to Python

// Adds `factor` times a combination; kNo where Python must look: noise, an operand of two versions, two per-row factors.
Answer add_terms(const Combination& c, double factor, Term* terms, int* count) {
  for (Py_ssize_t i = 0; i < c.size; ++i) {
    PyObject* operand = PyTuple_GET_ITEM(c.operands.object, i);
    PyObject* version = PyTuple_GET_ITEM(c.versions.object, i);
    if (Py_TYPE(operand) != torch().tensor && Py_TYPE(operand) != torch().parameter) return kNo;
    Owned coefficient(scaled(PyTuple_GET_ITEM(c.coefficients.object, i), factor));
    if (!coefficient.object) return PyErr_Occurred() ? kError : kNo;
    int at = 0;
    while (at < *count && terms[at].operand != operand) ++at;
    if (at == kMaxSum) return kNo;
    if (at == *count) {
      terms[at].operand = operand;
      terms[at].version = version;
      std::swap(terms[at].coefficient.object, coefficient.object);
      ++*count;
      continue;
    }
    PyObject* before = terms[at].coefficient.object;
    const int same = version == terms[at].version ? 1 : PyObject_RichCompareBool(version, terms[at].version, Py_EQ);
    if (same != 1) return same < 0 ? kError : kNo;
    if (!PyFloat_CheckExact(before) || !PyFloat_CheckExact(coefficient.object)) return kNo;
    terms[at].coefficient.object =
        PyFloat_FromDouble(PyFloat_AS_DOUBLE(before) + PyFloat_AS_DOUBLE(coefficient.object));
    Py_DECREF(before);
    if (!terms[at].coefficient.object) return kError;
  }
  return kYes;
}

}  // namespace

PyObject* sum_of(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs == 0 || nargs % 2 != 0) {
    PyErr_SetString(PyExc_TypeError, "sum_of takes (factor, a, factor, b, ...)");
    return nullptr;
  }
  if (!torch().tensor) Py_RETURN_NONE;
  Term terms[kMaxSum];
  int count = 0;
  for (Py_ssize_t i = 0; i < nargs; i += 2) {
    Combination c;
    if (!PyFloat_CheckExact(args[i]) || !read_combination(args[i + 1], &c)) Py_RETURN_NONE;
    const Answer answer = add_terms(c, PyFloat_AS_DOUBLE(args[i]), terms, &count);
    if (answer == kError) return nullptr;
    if (answer == kNo) Py_RETURN_NONE;
  }
  Owned operands(PyTuple_New(count)), coefficients(PyTuple_New(count)), versions(PyTuple_New(count));
  if (!operands.object || !coefficients.object || !versions.object) return nullptr;
  for (int i = 0; i < count; ++i) {
    Py_INCREF(terms[i].operand);
    Py_INCREF(terms[i].version);
    PyTuple_SET_ITEM(operands.object, i, terms[i].operand);
    PyTuple_SET_ITEM(coefficients.object, i, std::exchange(terms[i].coefficient.object, nullptr));
    PyTuple_SET_ITEM(versions.object, i, terms[i].version);
  }
  return PyTuple_Pack(3, operands.object, coefficients.object, versions.object);
}

PyObject* update(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2 || !PyTuple_CheckExact(args[0])) {
    PyErr_SetString(PyExc_TypeError, "update takes (combinations, out)");
    return nullptr;
  }
  const Py_ssize_t rows = PyTuple_GET_SIZE(args[0]);
  const bool several = PyTuple_CheckExact(args[1]);
  if (!torch().tensor || rows == 0 || rows > kMaxOutputs || (several ? PyTuple_GET_SIZE(args[1]) : 1) != rows)
    Py_RETURN_FALSE;
  Combination combinations[kMaxOutputs];
  for (Py_ssize_t k = 0; k < rows; ++k) {
    if (!read_combination(PyTuple_GET_ITEM(args[0], k), &combinations[k])) Py_RETURN_FALSE;
  }
  Union all;
  const Answer answer = unite(combinations, static_cast<int>(rows), &all);
  if (answer != kYes) return as_bool(answer);

  static PyObject* one = PyLong_FromLong(1);
  static PyObject* zero = PyFloat_FromDouble(0.0);
  Owned inputs(tuple_of(all.operands, all.columns, nullptr));
  Owned matrix(PyTuple_New(rows));
  if (!inputs.object || !matrix.object) return nullptr;
  for (Py_ssize_t k = 0; k < rows; ++k) {
    PyObject* row = tuple_of(all.coefficients[k], all.columns, zero);
    if (!row) return nullptr;
    PyTuple_SET_ITEM(matrix.object, k, row);
  }
  Owned outputs(several ? nullptr : PyTuple_Pack(1, args[1]));
  if (!several && !outputs.object) return nullptr;
  PyObject* const call[5] = {inputs.object, matrix.object, several ? args[1] : outputs.object, one, Py_False};
  return as_bool(perform(call, 5, false, all.have_counters));
}

}  // namespace pyflowmap
