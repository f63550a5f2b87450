# What other extensions may cimport from hashed_tokens; the methods trust their arguments.

cimport cython
from libc.stdint cimport int32_t, uint64_t


cdef struct Hash:
    uint64_t a
    uint64_t b


@cython.final
cdef class HashedTokens:
    cdef readonly Py_ssize_t block_size
    cdef readonly Py_ssize_t num_tokens
    cdef Py_ssize_t capacity  # tokens there is room for
    cdef int32_t* tokens  # [capacity], of which num_tokens are valid
    cdef Hash* hashes  # [capacity // block_size + 1]: the salt, then one a full block

    cdef Py_ssize_t full_blocks(self) noexcept
    cdef int make_room(self, Py_ssize_t num_tokens) except -1
