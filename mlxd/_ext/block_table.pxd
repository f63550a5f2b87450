# What other extensions may cimport from block_table; the methods trust their arguments.

cimport cython
from libc.stdint cimport int32_t


@cython.final
cdef class BlockPool:
    cdef readonly Py_ssize_t num_blocks
    cdef readonly Py_ssize_t block_size
    cdef readonly Py_ssize_t num_free
    cdef int32_t* ref_cnts  # [num_blocks]; 0 = free
    cdef int32_t* free_ids  # [num_blocks], of which the first num_free are valid; a stack, its top last

    cdef int32_t take(self) except -1
    cdef int drop(self, int32_t block_id) except -1
    cdef int32_t check_live(self, Py_ssize_t block_id) except -1
    cdef int32_t* count_owned(self, owned) except NULL
    cdef int verify(self, const int32_t* owned) except -1


@cython.final
cdef class BlockTables:
    cdef readonly BlockPool pool
    cdef readonly Py_ssize_t max_num_seqs
    cdef readonly Py_ssize_t max_blocks_per_seq
    cdef int32_t* tables  # [max_num_seqs, max_blocks_per_seq]
    cdef int32_t* lengths  # [max_num_seqs]: blocks in each table

    cdef int32_t* table(self, Py_ssize_t slot) except NULL
    cdef Py_ssize_t blocks_for(self, Py_ssize_t slot, Py_ssize_t num_tokens) except -1
    cdef int grow(self, Py_ssize_t slot, Py_ssize_t num_blocks) except -1
