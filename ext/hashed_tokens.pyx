# cython: cdivision=True
# (all operands of // and % here are non-negative, and block sizes positive)
"""A sequence of tokens with the chained 128-bit hash of each of its full blocks.

It knows tokens and a salt; not where a block's keys and values lie, nor who asks.

The hash of block i is `mix` of block i's tokens into the hash of block i - 1; that of block -1 is the salt.
For given tokens `mix` is a bijection of the hash before (it xors, adds, multiplies by odd numbers and shifts,
each of which can be undone). So two blocks with equal hashes and equal tokens have equal hashes before them,
and by induction: sequences whose hashes and tokens agree block by block have the same salt too. That is what
lets the prefix index verify a hit by comparing tokens. It is no cryptographic hash: whoever must not be able
to guess another's prefixes needs a secret salt.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from libc.stdint cimport INT32_MAX, int32_t, uint64_t
from libc.string cimport memcpy


cdef extern from *:
    """
    #ifndef MLXD_DEBUG
    #define MLXD_DEBUG 0
    #endif
    """
    const bint DEBUG "MLXD_DEBUG"


cdef Py_ssize_t live = 0

# Odd, so that multiplying by them can be undone: 2^64 divided by the golden ratio, and a prime of xxHash64.
cdef uint64_t MULTIPLIER_A = 0x9E3779B97F4A7C15
cdef uint64_t MULTIPLIER_B = 0xC2B2AE3D27D4EB4F


def live_objects():
    """Objects of this module now alive, by class. Empty unless built with MLXD_DEBUG=1."""
    return {"HashedTokens": live} if DEBUG else {}


def largest_token_id(list token_ids not None):
    """The largest of them, -1 of none; ValueError if one is not in 0 … 2^31 - 1, TypeError if it is no integer.

    One pass, a tenth of the time that min() and max() take: prompts are checked on the event loop.
    """
    cdef long long token, largest = -1
    cdef int overflow = 0
    for item in token_ids:
        token = PyLong_AsLongLongAndOverflow(item, &overflow)
        if overflow or not 0 <= token <= INT32_MAX:
            raise ValueError(f"token id {item} is not in 0 … {INT32_MAX}")
        if token > largest:
            largest = token
    return largest


cdef inline void mix(Hash* hash, uint64_t word) noexcept nogil:
    """Take a word in. For a given word, a bijection of the hash."""
    cdef uint64_t a = (hash.a ^ word) * MULTIPLIER_A
    cdef uint64_t b
    a ^= a >> 32
    b = (hash.b + (a << 23 | a >> 41)) * MULTIPLIER_B
    b ^= b >> 29
    hash.a = a + b
    hash.b = b


cdef inline Hash mix_tokens(Hash hash, const int32_t* tokens, Py_ssize_t length) noexcept nogil:
    """Two tokens a word; an odd one has a word of its own."""
    cdef Py_ssize_t index
    for index in range(length // 2):
        mix(&hash, <uint64_t> tokens[2 * index] | <uint64_t> tokens[2 * index + 1] << 32)
    if length % 2:
        mix(&hash, <uint64_t> tokens[length - 1])
    return hash


cdef bytes to_bytes(Hash hash):
    cdef bytes data = PyBytes_FromStringAndSize(NULL, sizeof(Hash))
    memcpy(PyBytes_AS_STRING(data), &hash, sizeof(Hash))
    return data


@cython.final
cdef class HashedTokens:
    """Append-only. `block_size` is in tokens, `salt` is 16 bytes: sequences under different salts share nothing.

    Costs 5 bytes a token, and each token is hashed once.
    """

    def __cinit__(self, Py_ssize_t block_size, bytes salt not None):
        global live
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; at least 1")
        if len(salt) != sizeof(Hash):
            raise ValueError(f"a salt of {len(salt)} bytes; it has {sizeof(Hash)}")
        self.hashes = <Hash*> PyMem_Calloc(1, sizeof(Hash))
        if self.hashes is NULL:
            raise MemoryError("no memory for a salt")
        if DEBUG:
            live += 1
        memcpy(self.hashes, PyBytes_AS_STRING(salt), sizeof(Hash))
        self.block_size = block_size

    def __dealloc__(self):
        global live
        if DEBUG and self.hashes is not NULL:
            live -= 1
        PyMem_Free(self.tokens)
        PyMem_Free(self.hashes)

    @property
    def num_blocks(self):
        """Full blocks."""
        return self.full_blocks()

    def extend(self, token_ids):
        """Append tokens. ValueError, and nothing is appended, if one is not in 0 … 2^31 - 1."""
        cdef list added = token_ids if type(token_ids) is list else list(token_ids)
        cdef Py_ssize_t length = len(added), old = self.num_tokens, block = self.full_blocks(), index
        cdef Py_ssize_t block_size = self.block_size
        cdef long long token
        if length == 0:
            return
        self.make_room(old + length)
        for index in range(length):
            token = added[index]
            if not 0 <= token <= INT32_MAX:
                raise ValueError(f"token id {token} is not in 0 … {INT32_MAX}")
            self.tokens[old + index] = <int32_t> token
        self.num_tokens = old + length
        with nogil:
            while (block + 1) * block_size <= old + length:
                self.hashes[block + 1] = mix_tokens(
                    self.hashes[block], self.tokens + block * block_size, block_size
                )
                block += 1

    def token_bytes(self, Py_ssize_t start, Py_ssize_t stop):
        """Tokens start … stop - 1, those that there are, as int32."""
        start, stop = max(start, 0), min(stop, self.num_tokens)
        if start >= stop:
            return b""
        return PyBytes_FromStringAndSize(<char*> (self.tokens + start), (stop - start) * sizeof(int32_t))

    def block_hash(self, Py_ssize_t index):
        """16 bytes: the chained hash of full block `index`; -1 is the salt. IndexError beyond."""
        if not -1 <= index < self.full_blocks():
            raise IndexError(f"there is no block {index} among {self.full_blocks()} full ones")
        return to_bytes(self.hashes[index + 1])

    def common_blocks(self, HashedTokens other not None):
        """How many full blocks both begin with, under the same salt. ValueError if block sizes differ."""
        # Equal hashes mean equal beginnings (up to a collision), so the last equal ones can be bisected.
        cdef Py_ssize_t equal = -1, unequal = min(self.full_blocks(), other.full_blocks()) + 1, middle
        if self.block_size != other.block_size:
            raise ValueError(f"blocks of {self.block_size} and {other.block_size} tokens")
        while unequal - equal > 1:
            middle = (equal + unequal) // 2
            if (
                self.hashes[middle].a == other.hashes[middle].a
                and self.hashes[middle].b == other.hashes[middle].b
            ):
                equal = middle
            else:
                unequal = middle
        return max(equal, 0)

    def digest(self, Py_ssize_t num_tokens):
        """16 bytes that name the first `num_tokens` tokens under this salt. ValueError if there are fewer."""
        cdef Hash hash
        cdef Py_ssize_t start
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"{num_tokens} of {self.num_tokens} tokens")
        start = num_tokens // self.block_size * self.block_size
        hash = mix_tokens(
            self.hashes[num_tokens // self.block_size], self.tokens + start, num_tokens - start
        )
        # Without the count, an odd token and a pair that ends in token 0 would be one.
        mix(&hash, <uint64_t> num_tokens)
        return to_bytes(hash)

    cdef Py_ssize_t full_blocks(self) noexcept:
        return self.num_tokens // self.block_size

    cdef int make_room(self, Py_ssize_t num_tokens) except -1:
        """Room for `num_tokens` tokens and the hashes of their full blocks."""
        cdef Py_ssize_t capacity
        cdef void* moved
        if num_tokens <= self.capacity:
            return 0
        # The first time a prompt, exactly; then output tokens, a few at a time.
        capacity = num_tokens if self.capacity == 0 else max(num_tokens, self.capacity + self.capacity // 2)
        moved = PyMem_Realloc(self.tokens, capacity * sizeof(int32_t))
        if moved is NULL:
            raise MemoryError(f"no memory for {capacity} tokens")
        self.tokens = <int32_t*> moved
        moved = PyMem_Realloc(self.hashes, (capacity // self.block_size + 1) * sizeof(Hash))
        if moved is NULL:
            raise MemoryError(f"no memory for the hashes of {capacity} tokens")
        self.hashes = <Hash*> moved
        self.capacity = capacity
        return 0
