// The Python module `pmpo_kernels._C`. Importing it registers the operators. Its functions tell the instruction set in use, and
// let tests choose another. It uses Python's limited API, so that one binary serves every Python from 3.10 on.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>

#include "isa.h"

namespace {

using pmpo::Isa;

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(pmpo::isa_name(pmpo::current_isa()).c_str()); }

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (!names || isa > pmpo::best_isa()) break;
    PyObject* name = PyUnicode_FromString(pmpo::isa_name(isa).c_str());
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* use_isa(PyObject*, PyObject* argument) {
  PyObject* encoded = PyUnicode_AsUTF8String(argument);
  if (!encoded) return nullptr;
  const std::string name = PyBytes_AsString(encoded);
  Py_DECREF(encoded);
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa > pmpo::best_isa() || pmpo::isa_name(isa) != name) continue;
    pmpo::current_isa() = isa;
    Py_RETURN_NONE;
  }
  PyErr_Format(PyExc_ValueError, "isa: expected one of isas(), got %R", argument);
  return nullptr;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Name of the instruction set in use."},
    {"isas", isas, METH_NOARGS, "Names of those that this machine can run, the best one last."},
    {"use_isa", use_isa, METH_O, "Use another one from now on, in every thread; for tests."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
