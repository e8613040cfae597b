// The Python module `pmpo_kernels._C`. Importing it registers the operators. Its functions tell the instruction set in use, and
// for tests choose another, and tell what the kernels share with Python. It uses Python's limited API, so that one binary serves
// every Python from 3.10 on.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>

#include "contract.h"
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

// The names of contract.h, each list as one string, and its numbers.
PyObject* contract(PyObject*, PyObject*) {
#define PMPO_NAME(name) #name " "
  return Py_BuildValue(
      "{s:s, s:s, s:s, s:s, s:s, s:i, s:d, s:L}", "RULES", PMPO_RULES(PMPO_NAME), "TrajectoryOptions",
      PMPO_TRAJECTORY_OPTIONS(PMPO_NAME), "AggregateOptions", PMPO_AGGREGATE_OPTIONS(PMPO_NAME), "STATS",
      PMPO_STATS(PMPO_NAME), "METRICS", PMPO_METRICS(PMPO_NAME), "MAX_NEWTON_ITERATIONS", pmpo::MAX_NEWTON_ITERATIONS,
      "NEWTON_TOLERANCE", pmpo::NEWTON_TOLERANCE, "ELSEWHERE", static_cast<long long>(pmpo::ELSEWHERE));
#undef PMPO_NAME
}

PyMethodDef methods[] = {
    {"contract", contract, METH_NOARGS, "What the kernels share with pmpo_kernels.contract."},
    {"isa", isa, METH_NOARGS, "Name of the instruction set in use."},
    {"isas", isas, METH_NOARGS, "Names of those that this machine can run, the best one last."},
    {"use_isa", use_isa, METH_O, "Use another one from now on, in every thread; for tests."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
