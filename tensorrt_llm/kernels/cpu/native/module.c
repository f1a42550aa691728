// What Python sees: functions of addresses and numbers. Shapes, dtypes and lifetimes are the callers' to check.
//
// Nothing here may need AVX2: this file runs before it is known whether the processor has it.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <sys/mman.h>

#include "attention.h"
#include "matmul.h"
#include "norm.h"
#include "pool.h"

// Reads `count` integers (addresses, sizes, formats) into `numbers`; false with an exception set.
static int read_numbers(PyObject *const *arguments, Py_ssize_t given, Py_ssize_t count, size_t *numbers) {
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", count, given);
        return 0;
    }
    for (Py_ssize_t index = 0; index < count; index++) {
        numbers[index] = PyLong_AsSize_t(arguments[index]);
        if (PyErr_Occurred()) return 0;
    }
    return 1;
}

static PyObject *result_of(int status) {
    if (status) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

// A recipe holds, as 12 sizes, what is known when a weight is loaded: see Product in matmul.py.
static PyObject *py_multiply(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    size_t n[5], r[12];
    if (given != 6 || !PyBytes_Check(arguments[0]) || PyBytes_GET_SIZE(arguments[0]) != sizeof r) {
        return PyErr_Format(PyExc_TypeError, "expected a recipe of %zu bytes and 5 numbers", sizeof r);
    }
    if (!read_numbers(arguments + 1, 5, 5, n)) return NULL;
    memcpy(r, PyBytes_AS_STRING(arguments[0]), sizeof r);
    struct product product = {
        .format = (int)r[0], .n = r[1], .groups = r[2], .columns = r[3], .padded = r[4],
        .weight = {(void *)r[5], (void *)r[6], (void *)r[7]}, .gate = {(void *)r[8], (void *)r[9], (void *)r[10]},
        .bias = (void *)r[11], .tokens = n[0], .x = (void *)n[1], .x_format = (int)n[2], .y = (void *)n[3],
        .y_format = (int)n[4],
    };
    int status;
    Py_BEGIN_ALLOW_THREADS
    pool_lock();
    status = multiply(&product);
    pool_unlock();
    Py_END_ALLOW_THREADS
    return result_of(status);
}

static PyObject *py_normalize(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    size_t n[10];
    if (given != 11) return PyErr_Format(PyExc_TypeError, "expected 11 arguments, got %zd", given);
    double eps = PyFloat_AsDouble(arguments[0]);
    if (PyErr_Occurred() || !read_numbers(arguments + 1, 10, 10, n)) return NULL;
    struct norm norm = {
        .eps = (float)eps, .tokens = n[0], .hidden = n[1], .x = (void *)n[2], .x_format = (int)n[3],
        .added = (void *)n[4], .added_format = (int)n[5], .residual = (void *)n[6], .weight = (void *)n[7],
        .y = (void *)n[8], .y_format = (int)n[9],
    };
    Py_BEGIN_ALLOW_THREADS
    pool_lock();
    normalize(&norm);
    pool_unlock();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_attend(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    size_t n[19];
    if (given != 21) return PyErr_Format(PyExc_TypeError, "expected 21 arguments, got %zd", given);
    double rotary_base = PyFloat_AsDouble(arguments[0]), score_scale = PyFloat_AsDouble(arguments[1]);
    if (PyErr_Occurred() || !read_numbers(arguments + 2, 19, 19, n)) return NULL;
    struct decodes decodes = {
        .rotary_base = rotary_base, .score_scale = score_scale, .sequences = n[0], .heads = n[1], .kv_heads = n[2],
        .head_size = n[3], .block_size = n[4], .blocks_per_row = n[5], .rotary_dim = n[6], .ntk_length = n[7],
        .logn_length = n[8], .qkv = (void *)n[9], .format = (int)n[10], .pool = (void *)n[11],
        .pool_format = (int)n[12], .pool_scales = (void *)n[13], .positions = (void *)n[14], .lengths = (void *)n[15],
        .prompts = (void *)n[16], .block_tables = (void *)n[17], .context = (void *)n[18],
    };
    int status;
    Py_BEGIN_ALLOW_THREADS
    pool_lock();
    status = attend(&decodes);
    pool_unlock();
    Py_END_ALLOW_THREADS
    return result_of(status);
}

static PyObject *py_advise_huge_pages(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    size_t n[2];
    if (!read_numbers(arguments, given, 2, n)) return NULL;
    madvise((void *)n[0], n[1], MADV_HUGEPAGE);  // advice: where there are no huge pages nothing is lost
    Py_RETURN_NONE;
}

static PyObject *py_set_threads(PyObject *module, PyObject *count) {
    (void)module;
    long threads = PyLong_AsLong(count);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    pool_set_threads((int)threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_is_supported(PyObject *module, PyObject *nothing) {
    (void)module, (void)nothing;
    return PyBool_FromLong(
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
    );
}

static PyMethodDef methods[] = {
    {"multiply", (PyCFunction)(void *)py_multiply, METH_FASTCALL, "matmul.h"},
    {"normalize", (PyCFunction)(void *)py_normalize, METH_FASTCALL, "norm.h"},
    {"attend", (PyCFunction)(void *)py_attend, METH_FASTCALL, "attention.h"},
    {"advise_huge_pages", (PyCFunction)(void *)py_advise_huge_pages, METH_FASTCALL, "Of the bytes from an address on."},
    {"set_threads", py_set_threads, METH_O, "Threads of the calls that follow, the caller among them."},
    {"is_supported", py_is_supported, METH_NOARGS, "Whether this processor has what the kernels are made of."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "compiled", "Kernels in C; native/__init__.py says what they are.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_compiled(void) { return PyModule_Create(&definition); }
