// A product called with Python's tensors, for small layers: there the interpreter and ctypes take longer
// than the product.
//
// It uses Python's limited API, so one library serves every CPython from 3.10 on, and reads tensors
// through DLPack's table of C functions, so it serves every torch that has one: torch's own C++ headers
// would tie it to one release.
#if __has_include(<Python.h>)
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "int4cpu.h"

namespace {

// --- DLPack 1, from its header (https://github.com/dmlc/dlpack) ---------------------------------

struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  const DlExchange* previous;
  void *allocate, *from_python, *to_python;  // tensors that own their memory, which none here does
  int (*view)(void* python, DlTensor* out);  // may be null; -1: a Python exception is set
  void* stream;
};

constexpr int32_t kDlCpu = 1;
constexpr uint8_t kDlUnsigned = 1, kDlFloat = 2, kDlBfloat = 4;

// --- tensors ------------------------------------------------------------------------------------

// A reference that is given back at the end of its scope.
struct Ref {
  PyObject* object;
  explicit Ref(PyObject* object) : object(object) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object); }
};

// What of torch is used, as `NativeLibrary` hands it over; kept until the process ends.
struct Torch {
  PyObject *tensor, *parameter, *bfloat16, *float16, *float32;
  PyObject *empty_strided, *is_grad_enabled, *get_num_threads, *multiply_rows;
} torch;
constexpr Py_ssize_t kTorchParts = sizeof(Torch) / sizeof(PyObject*);

const DlExchange* exchange;
PyObject *name_is_neg, *name_requires_grad;

// Subclasses, which may behave in any way, are none.
bool is_tensor(PyObject* object) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch.tensor;
}

bool is_parameter(PyObject* object) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == torch.parameter;
}

// Where a tensor on the CPU has its numbers. False if it has none, as a sparse, nested or fake one.
bool view(PyObject* tensor, DlTensor& out) {
  return exchange->view(tensor, &out) == 0 && out.device_type == kDlCpu && out.byte_offset == 0 &&
         out.data != nullptr;
}

// Whether the numbers are what lies in memory, and no gradient is wanted.
bool is_plain(PyObject* tensor) {
  const Ref negative(PyObject_CallMethodObjArgs(tensor, name_is_neg, nullptr));
  const Ref requires_grad(PyObject_GetAttr(tensor, name_requires_grad));
  if (negative.object != Py_False) return false;
  if (requires_grad.object == Py_False) return true;
  const Ref grad(PyObject_CallNoArgs(torch.is_grad_enabled));
  return grad.object == Py_False;
}

// In int4cpu::Dtype; -1 for another.
int32_t dtype_of(const DlTensor& tensor) {
  if (tensor.lanes != 1) return -1;
  if (tensor.type == kDlBfloat && tensor.bits == 16) return int4cpu::kBFloat16;
  if (tensor.type == kDlFloat && tensor.bits == 16) return int4cpu::kFloat16;
  if (tensor.type == kDlFloat && tensor.bits == 32) return int4cpu::kFloat32;
  return -1;
}

// Elements between rows of [..., k] taken as [m, k]; -1 if no one number says it.
int64_t row_stride(const DlTensor& x) {
  const int last = x.ndim - 1;
  if (x.shape[last] != 1 && x.strides[last] != 1) return -1;
  int64_t stride = x.shape[last], next = -1;
  for (int i = last; i-- > 0;) {
    if (x.shape[i] == 1) continue;
    if (next < 0) {
      stride = x.strides[i];
    } else if (x.strides[i] != next) {
      return -1;
    }
    next = x.strides[i] * x.shape[i];
  }
  return stride;
}

// An uninitialized [..., n], contiguous.
PyObject* result_of(const DlTensor& x, int64_t n, int32_t dtype) {
  const Ref sizes(PyTuple_New(x.ndim)), strides(PyTuple_New(x.ndim));
  if (sizes.object == nullptr || strides.object == nullptr) return nullptr;
  int64_t stride = 1;
  for (int i = x.ndim; i-- > 0;) {
    const int64_t size = i == x.ndim - 1 ? n : x.shape[i];
    PyTuple_SetItem(sizes.object, i, PyLong_FromLongLong(size));
    PyTuple_SetItem(strides.object, i, PyLong_FromLongLong(stride));
    stride *= size;
  }
  PyObject* const dtypes[] = {torch.bfloat16, torch.float16, torch.float32};
  return PyObject_CallFunctionObjArgs(torch.empty_strided, sizes.object, strides.object, dtypes[dtype],
                                      nullptr);
}

// --- the product --------------------------------------------------------------------------------

int64_t number(PyObject* value) { return value == nullptr ? -1 : PyLong_AsLongLong(value); }

bool describe_weight(PyObject* weight, int4cpu::Call& call) {
  if (PyTuple_Size(weight) != 6) return false;
  PyObject *qdata = PyTuple_GetItem(weight, 0), *scale_and_zero = PyTuple_GetItem(weight, 1);
  DlTensor codes, pairs;
  if (!is_tensor(qdata) || !is_tensor(scale_and_zero) || !view(qdata, codes) ||
      !view(scale_and_zero, pairs) || codes.ndim != 2 || pairs.ndim != 3) {
    return false;
  }
  call.group_size = static_cast<int32_t>(number(PyTuple_GetItem(weight, 2)));
  call.n = number(PyTuple_GetItem(weight, 4));
  call.k = number(PyTuple_GetItem(weight, 5));
  call.qdata = codes.data;
  call.scale_and_zero = pairs.data;
  call.qparams_stride = pairs.strides[0] / 2;
  call.qparams_dtype = dtype_of(pairs);
  return call.qparams_dtype >= 0;
}

bool describe_bias(PyObject* bias, int4cpu::Call& call) {
  if (bias == Py_None) return true;
  DlTensor b;
  if (!(is_tensor(bias) || is_parameter(bias)) || !is_plain(bias) || !view(bias, b) || b.ndim != 1 ||
      b.shape[0] != call.n || b.strides[0] != 1) {
    return false;
  }
  call.bias = b.data;
  call.bias_dtype = dtype_of(b);
  return call.bias_dtype >= 0;
}

// Multiplies `rows`, a view of x, by what `call` says of the kernel, the weight and the bias. The result,
// or null; `not_finite` is what `int4cpu_mm` returned.
PyObject* multiply(const DlTensor& rows, int4cpu::Call& call, int64_t& not_finite) {
  call.x = rows.data;
  call.x_stride = row_stride(rows);
  call.dtype = dtype_of(rows);
  if (rows.shape[rows.ndim - 1] != call.k || call.x_stride < 0 || call.dtype < 0) return nullptr;
  call.m = 1;
  for (int i = 0; i < rows.ndim - 1; ++i) call.m *= rows.shape[i];
  const Ref threads(PyObject_CallNoArgs(torch.get_num_threads));
  call.threads = static_cast<int32_t>(number(threads.object));
  DlTensor result;
  PyObject* y = result_of(rows, call.n, call.dtype);
  if (y == nullptr || !view(y, result) || PyErr_Occurred() != nullptr) {
    Py_XDECREF(y);
    return nullptr;
  }
  call.y = result.data;

  PyThreadState* state = PyEval_SaveThread();
  not_finite = int4cpu_mm(&call);
  PyEval_RestoreThread(state);
  return y;
}

// The result, or null if this is for Python code: an exception may be set, or not.
PyObject* product(PyObject* kernel, PyObject* x, PyObject* weight, PyObject* bias) {
  DlTensor rows;
  int4cpu::Call call = {};
  call.kernel = static_cast<int32_t>(number(kernel));
  if (!is_tensor(x) || !is_plain(x) || !view(x, rows) || rows.ndim < 1 ||
      !describe_weight(weight, call) || !describe_bias(bias, call)) {
    return nullptr;
  }
  int64_t not_finite;
  PyObject* y = multiply(rows, call, not_finite);
  if (y == nullptr) return nullptr;
  if (not_finite == 0) return y;
  if (not_finite > 0) {
    const Ref done(PyObject_CallFunctionObjArgs(torch.multiply_rows, y, x, weight, bias, nullptr));
    if (done.object != nullptr) return y;
  }
  Py_DECREF(y);
  return nullptr;
}

// (x, weight, bias) of `NativeLibrary.mm`, x with any number of dimensions; `kernel` is the number of
// one. None where something has to be said or done first, which Python code does.
PyObject* call_product(PyObject* kernel, PyObject* const* arguments, Py_ssize_t count) {
  PyObject* y = count == 3 ? product(kernel, arguments[0], arguments[1], arguments[2]) : nullptr;
  if (y != nullptr) return y;
  PyErr_Clear();
  Py_INCREF(Py_None);
  return Py_None;
}

// --- the op -------------------------------------------------------------------------------------

// Whether the parts are those of a weight [n, k]: `check_packed` of format/checks.py, which says what is
// wrong with others. They may come from a file, so no number is computed with before it is compared.
bool fits(const DlTensor& codes, const DlTensor& pairs, int64_t group_size, int64_t n, int64_t k) {
  if (group_size != 32 && group_size != 64 && group_size != 128 && group_size != 256) return false;
  if (codes.ndim != 2 || codes.type != kDlUnsigned || codes.bits != 8 || codes.lanes != 1 ||
      pairs.ndim != 3 || dtype_of(pairs) < 0 || dtype_of(pairs) == int4cpu::kFloat32) {
    return false;
  }
  const int64_t padded_n = codes.shape[0], half_k = codes.shape[1];
  if (n < 1 || n > padded_n || padded_n - n >= 16 || padded_n % 16 != 0) return false;
  if (k < 1 || k > 2 * half_k || 2 * half_k - k >= group_size || 2 * half_k % group_size != 0) {
    return false;
  }
  const int64_t groups = 2 * half_k / group_size;
  const bool apart =
      groups == 1 || (pairs.strides[0] % 2 == 0 && pairs.strides[0] >= 2 * padded_n);
  return codes.strides[0] == half_k && codes.strides[1] == 1 && pairs.shape[0] == groups &&
         pairs.shape[1] == padded_n && pairs.shape[2] == 2 && pairs.strides[1] == 2 &&
         pairs.strides[2] == 1 && apart;
}

// Where the functions of ops find what they need, in the tuple that is their "self".
enum OpState : Py_ssize_t { kKernels, kOtherwise, kIsWatched, kOpStateSize };

// The result, or null if this is for the other function: an exception may be set, or not.
PyObject* op_product(PyObject* state, PyObject* const* arguments) {
  PyObject *x = arguments[0], *qdata = arguments[1], *scale_and_zero = arguments[2];
  DlTensor rows, codes, pairs;
  if (!is_tensor(x) || !is_tensor(qdata) || !is_tensor(scale_and_zero) || !view(x, rows) ||
      !view(qdata, codes) || !view(scale_and_zero, pairs) || rows.ndim != 2) {
    return nullptr;
  }
  PyObject* is_watched = PyTuple_GetItem(state, kIsWatched);
  if (is_watched != Py_None) {
    if (!is_plain(x) || !is_plain(qdata) || !is_plain(scale_and_zero)) return nullptr;
    const Ref watched(PyObject_CallNoArgs(is_watched));
    if (watched.object != Py_False) return nullptr;
  }
  PyObject* kernel = PyDict_GetItemWithError(PyTuple_GetItem(state, kKernels), arguments[4]);
  if (kernel == nullptr) return nullptr;
  int4cpu::Call call = {};
  call.kernel = static_cast<int32_t>(number(kernel));
  const int64_t group_size = number(arguments[3]);
  call.group_size = static_cast<int32_t>(group_size);
  call.n = number(arguments[5]);
  call.k = rows.shape[1];
  if (!fits(codes, pairs, group_size, call.n, call.k)) return nullptr;
  call.qdata = codes.data;
  call.scale_and_zero = pairs.data;
  call.qparams_stride = pairs.strides[0] / 2;
  call.qparams_dtype = dtype_of(pairs);
  int64_t not_finite;
  PyObject* y = multiply(rows, call, not_finite);
  if (y == nullptr || not_finite == 0) return y;
  Py_DECREF(y);
  return nullptr;
}

PyObject* call_otherwise(PyObject* state, PyObject* const* arguments, Py_ssize_t count,
                         PyObject* names) {
  const Ref positional(PyTuple_New(count)), named(PyDict_New());
  if (positional.object == nullptr || named.object == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Py_INCREF(arguments[i]);
    PyTuple_SetItem(positional.object, i, arguments[i]);
  }
  const Py_ssize_t names_count = names == nullptr ? 0 : PyTuple_Size(names);
  for (Py_ssize_t i = 0; i < names_count; ++i) {
    if (PyDict_SetItem(named.object, PyTuple_GetItem(names, i), arguments[count + i]) != 0) {
      return nullptr;
    }
  }
  return PyObject_Call(PyTuple_GetItem(state, kOtherwise), positional.object, named.object);
}

PyObject* call_op(PyObject* state, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  if (count == 6 && names == nullptr) {
    PyObject* y = op_product(state, arguments);
    if (y != nullptr) return y;
    PyErr_Clear();
  }
  return call_otherwise(state, arguments, count, names);
}

PyMethodDef kOpMethod = {
    "int4_mm_op", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_op)),
    METH_FASTCALL | METH_KEYWORDS,
    "(x, qdata, scale_and_zero, group_size, layout, columns) -> Tensor"};

PyMethodDef kMethod = {
    "int4_mm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_product)),
    METH_FASTCALL, "(x, weight, bias) -> Tensor or None"};

}  // namespace

// A Python function for the kernel of this number, or None where torch has no table that this code can
// read. `table` is ``torch.Tensor.__dlpack_c_exchange_api__``; `parts` are those of `Torch`, in order.
extern "C" __attribute__((visibility("default"))) PyObject* int4cpu_product(PyObject* kernel,
                                                                            PyObject* table,
                                                                            PyObject* parts) {
  if (exchange == nullptr) {
    const void* found = PyCapsule_GetPointer(table, "dlpack_exchange_api");
    if (found == nullptr || PyTuple_Size(parts) != kTorchParts) return nullptr;
    const DlExchange* offered = static_cast<const DlExchange*>(found);
    while (offered != nullptr && offered->major != 1) offered = offered->previous;
    if (offered == nullptr || offered->view == nullptr) {
      Py_INCREF(Py_None);
      return Py_None;
    }
    name_is_neg = PyUnicode_InternFromString("is_neg");
    name_requires_grad = PyUnicode_InternFromString("requires_grad");
    PyObject** part = &torch.tensor;
    for (Py_ssize_t i = 0; i < kTorchParts; ++i) {
      part[i] = PyTuple_GetItem(parts, i);
      Py_INCREF(part[i]);
    }
    exchange = offered;
  }
  return PyCFunction_NewEx(&kMethod, kernel, nullptr);
}

// A Python function ``(x, qdata, scale_and_zero, group_size, layout, columns)`` that multiplies, or calls
// `otherwise` with its arguments: where they are not those of a weight, or are rare. `kernels` is a dict
// that says which kernel multiplies now, its number by the layout that it reads. `is_watched` tells
// whether torch has to see the call; it is None for the kernel of an op, whose call torch has seen, along
// with gradients and negative views. Returns None where `int4cpu_product` got no table of torch's.
extern "C" __attribute__((visibility("default"))) PyObject* int4cpu_op(PyObject* kernels,
                                                                       PyObject* otherwise,
                                                                       PyObject* is_watched) {
  if (exchange == nullptr) {
    Py_INCREF(Py_None);
    return Py_None;
  }
  const Ref state(PyTuple_Pack(kOpStateSize, kernels, otherwise, is_watched));
  return state.object == nullptr ? nullptr : PyCFunction_NewEx(&kOpMethod, state.object, nullptr);
}
#endif
