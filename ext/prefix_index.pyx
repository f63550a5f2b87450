# cython: cdivision=True
# (all operands of // and % here are non-negative, and block sizes positive)
"""The prefix index: which cached blocks hold the beginning of a prompt, and which block is given up next.

It knows tokens, slots and block ids; not requests, plans or tensors. Not thread-safe: one thread, the
front's event loop, owns it.

A cached block is a node of a tree whose paths from the root are token sequences. Full blocks are found by
their chained hash and verified by their tokens (hashed_tokens.pyx says why that suffices). The children of a
node also form a treap in the order of their tokens, where the child with the longest common beginning of any
tokens is found on one way down: that gives reuse by the token inside the block where prompts part. The last
block of a sequence may be cached partly filled; it is in the treap alone, and has no children.

The index holds one reference on each cached block. Everybody else who holds one holds its whole path: a
slot's table (its first blocks are the path, because `share` and `publish` put the path's blocks there), or
whoever called `hold`. So the blocks that nobody else holds have no held ones below them, and a queue to
which releases append them tail first has every block behind those below it: its oldest entry is always a
leaf, and eviction is a pop.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport int32_t, uint64_t
from libc.string cimport memcmp, memcpy

from mlxd._ext.block_table cimport BlockPool, BlockTables
from mlxd._ext.hashed_tokens cimport Hash, HashedTokens

from mlxd._ext import IntegrityError


cdef extern from *:
    """
    #ifndef MLXD_DEBUG
    #define MLXD_DEBUG 0
    #endif
    """
    const bint DEBUG "MLXD_DEBUG"


cdef Py_ssize_t live = 0


def live_objects():
    """Objects of this module now alive, by class. Empty unless built with MLXD_DEBUG=1."""
    return {"PrefixIndex": live} if DEBUG else {}


cdef struct Node:
    # Of block id b = its place in the array; 0 (NULL_BLOCK) stands for "none", and in place 0 is the root.
    Hash hash  # chained, at the block's end; only of a full block
    Hash salt
    int32_t length  # tokens; 0: the block is not cached
    int32_t parent
    int32_t children  # the root of the treap of the blocks that continue this one
    int32_t left, right  # in the parent's treap
    int32_t older, younger  # in the ring of the eviction queue, which node 0 closes; itself when not in it


@cython.final
cdef class PrefixIndex:
    """Cached blocks of the pool of `tables`. `num_cached` counts them, `num_evictable` those only it holds.

    From the moment an index exists, slots are released through it. Every call either does all it was asked
    or raises and changes nothing.
    """

    cdef readonly BlockTables tables
    cdef readonly Py_ssize_t num_cached
    cdef readonly Py_ssize_t num_evictable
    cdef BlockPool pool
    cdef Py_ssize_t block_size
    cdef Node* nodes  # [num_blocks]
    cdef int32_t* tokens  # [num_blocks, block_size]
    cdef int32_t* buckets  # [mask + 1]: open addressing by hash.a; 0 = empty
    cdef Hash* evicted  # [mask + 1]: hashes of full blocks evicted of late, each where its hash.a says
    cdef Py_ssize_t mask
    cdef int32_t* published  # [max_num_seqs]: leading entries of a slot's table that are cached
    cdef int32_t* shared  # [max_num_seqs]: of these, the ones that the slot found cached

    def __cinit__(self, BlockTables tables not None):
        global live
        cdef Py_ssize_t num_blocks = tables.pool.num_blocks, size = 4
        while size < 2 * num_blocks:
            size *= 2
        self.tables = tables
        self.pool = tables.pool
        self.block_size = tables.pool.block_size
        self.mask = size - 1
        self.nodes = <Node*> PyMem_Calloc(num_blocks, sizeof(Node))
        self.tokens = <int32_t*> PyMem_Calloc(num_blocks * self.block_size, sizeof(int32_t))
        self.buckets = <int32_t*> PyMem_Calloc(size, sizeof(int32_t))
        self.evicted = <Hash*> PyMem_Calloc(size, sizeof(Hash))
        self.published = <int32_t*> PyMem_Calloc(2 * tables.max_num_seqs, sizeof(int32_t))
        if (
            self.nodes is NULL
            or self.tokens is NULL
            or self.buckets is NULL
            or self.evicted is NULL
            or self.published is NULL
        ):
            raise MemoryError(f"no memory for an index of {num_blocks} blocks")
        self.shared = self.published + tables.max_num_seqs
        if DEBUG:
            live += 1

    def __dealloc__(self):
        global live
        if DEBUG and self.shared is not NULL:
            live -= 1
        PyMem_Free(self.nodes)
        PyMem_Free(self.tokens)
        PyMem_Free(self.buckets)
        PyMem_Free(self.evicted)
        PyMem_Free(self.published)

    # Finding

    def match(self, HashedTokens tokens not None, Py_ssize_t max_tokens):
        """What is cached of the first `max_tokens` tokens: (block_ids, nearest, num_common).

        `block_ids` are full blocks, first block first. Of the blocks that continue them, `nearest` is the one
        with the longest common beginning with the tokens that follow, and `num_common` its length; 0, 0 if no
        block continues them. No other sequence in the index has more of these tokens in common. ValueError if
        there are fewer tokens, or block sizes differ.
        """
        cdef Py_ssize_t block_size = self.block_size, index = 0
        cdef int32_t parent = 0, child
        cdef Py_ssize_t num_common = 0
        self.check_tokens(tokens, max_tokens)
        found = []
        while (index + 1) * block_size <= max_tokens:
            child = self.find(tokens.hashes[index + 1], parent, tokens.tokens + index * block_size)
            if child == 0:
                break
            found.append(child)
            parent = child
            index += 1
        child = self.closest(
            parent,
            tokens.hashes[0],
            tokens.tokens + index * block_size,
            min(block_size, max_tokens - index * block_size),
            &num_common,
        )
        return found, child, num_common

    def was_evicted(self, HashedTokens tokens not None, Py_ssize_t index):
        """Whether full block `index` of `tokens` was cached and given up, not too many evictions ago."""
        cdef Hash hash
        cdef Hash* seen
        if not 0 <= index < tokens.full_blocks():
            return False
        hash = tokens.hashes[index + 1]
        seen = &self.evicted[hash.a & self.mask]
        return same(seen[0], hash)

    def block_tokens(self, Py_ssize_t block_id):
        """The tokens of a cached block. ValueError if it is not cached."""
        self.check_cached(block_id)
        return [self.tokens[block_id * self.block_size + i] for i in range(self.nodes[block_id].length)]

    def is_cached_as(self, Py_ssize_t block_id, bytes block_hash not None):
        """Whether this is a full cached block with this chained hash, as HashedTokens.block_hash gives it."""
        if block_id <= 0 or block_id >= self.pool.num_blocks or len(block_hash) != sizeof(Hash):
            return False
        if self.nodes[block_id].length != self.block_size:
            return False
        return memcmp(&self.nodes[block_id].hash, PyBytes_AS_STRING(block_hash), sizeof(Hash)) == 0

    # Holding

    def share(self, Py_ssize_t slot, block_ids):
        """Begin the slot's empty table with the path `block_ids`, as `match` gave it.

        ValueError if the table is not empty or has no room, or the blocks are no path of full cached blocks.
        """
        cdef list path = list(block_ids)
        cdef int32_t block_id
        self.tables.table(slot)
        if self.tables.lengths[slot] != 0:
            raise ValueError(f"slot {slot} has {self.tables.lengths[slot]} blocks already")
        self.check_path(path)
        self.tables.share(slot, path)
        for block_id in path:
            self.unqueue(block_id)
        self.published[slot] = self.shared[slot] = <int32_t> len(path)

    def adopt(self, Py_ssize_t slot, Py_ssize_t block_id, Py_ssize_t num_tokens):
        """Make the partly filled block that `match` named `nearest` the table's next block, if that can be.

        True: the block has left the index and belongs to the slot, which goes on behind its `num_tokens`
        tokens. False, and nothing done: it is full, has other tokens than these or is held by somebody, so it
        must be copied. ValueError if it is not cached, or does not continue the slot's path.
        """
        cdef int32_t* table = self.tables.table(slot)
        cdef Py_ssize_t length = self.tables.lengths[slot]
        cdef Node* node
        self.check_cached(block_id)
        node = &self.nodes[block_id]
        if self.published[slot] != length or (table[length - 1] if length else 0) != node.parent:
            raise ValueError(f"slot {slot}: block {block_id} does not continue its path")
        if node.length == self.block_size or node.length != num_tokens or not self.is_queued(block_id):
            return False
        if length == self.tables.max_blocks_per_seq:
            raise ValueError(f"slot {slot}: no room for another block")
        self.forget(<int32_t> block_id)
        table[length] = <int32_t> block_id
        self.tables.lengths[slot] += 1
        return True

    def publish(self, Py_ssize_t slot, HashedTokens tokens not None, Py_ssize_t num_tokens):
        """Cache the slot's blocks that the first `num_tokens` tokens fill.

        Where the same block is cached already, it takes the place of the slot's own, which is freed. Nothing
        happens once `discard` has cut the slot's path. ValueError if there are fewer tokens, or the table
        does not cover them.
        """
        self.check_table(slot, tokens, num_tokens)
        self.extend_path(slot, tokens, num_tokens)

    def release(self, Py_ssize_t slot, HashedTokens tokens not None, Py_ssize_t num_tokens):
        """Publish the first `num_tokens` tokens, a last, partly filled block too, and empty the slot's table.

        What is cached stays so until it is evicted; the rest is freed. Raises as `publish`.
        """
        cdef int32_t* table
        cdef Py_ssize_t index, length
        self.check_table(slot, tokens, num_tokens)
        self.extend_path(slot, tokens, num_tokens)
        self.cache_tail(slot, tokens, num_tokens)
        table = self.tables.table(slot)
        length = self.tables.lengths[slot]
        self.tables.lengths[slot] = 0
        self.published[slot] = self.shared[slot] = 0
        for index in range(length - 1, -1, -1):
            self.drop(table[index])

    def discard(self, Py_ssize_t slot):
        """Forget the cached blocks that this slot filled, and all that continue them: they cannot be trusted.

        Whoever uses them keeps them. Returns how many were forgotten.
        """
        cdef int32_t* table = self.tables.table(slot)
        cdef int32_t first = 0, block_id, parent
        cdef Py_ssize_t before = self.num_cached
        if self.shared[slot] < self.published[slot]:
            first = table[self.shared[slot]]
        # So that nothing of it is published any more either.
        self.published[slot] = -1
        block_id = first
        while block_id and self.nodes[first].length:
            while self.nodes[block_id].children:
                block_id = self.nodes[block_id].children
            parent = self.nodes[block_id].parent
            self.forget(block_id)
            self.pool.drop(block_id)
            block_id = parent
        return before - self.num_cached

    def touch(self, Py_ssize_t block_id):
        """An evictable block becomes the last to be evicted. ValueError if it is not cached.

        The caller holds the blocks above it, which must not be evicted before it.
        """
        cdef int32_t parent
        self.check_cached(block_id)
        parent = self.nodes[block_id].parent
        if parent and self.is_queued(parent):
            raise ValueError(f"block {block_id} continues block {parent}, which nobody holds")
        if self.is_queued(block_id):
            self.unqueue(<int32_t> block_id)
            self.enqueue(<int32_t> block_id)

    def hold(self, block_ids):
        """One reference more on each block of a path, so that none is evicted. ValueError as `share`."""
        cdef list path = list(block_ids)
        cdef int32_t block_id
        self.check_path(path)
        for block_id in path:
            self.pool.ref_cnts[block_id] += 1
            self.unqueue(block_id)

    def unhold(self, block_ids):
        """Give back the references of `hold`, the path's end first. ValueError if only the index has any."""
        cdef list path = list(block_ids)
        cdef int32_t block_id
        for block_id in path:
            if self.pool.ref_cnts[self.pool.check_live(block_id)] < 1 + (self.nodes[block_id].length != 0):
                raise ValueError(f"nobody holds block {block_id}")
        for block_id in reversed(path):
            self.drop(block_id)

    # Giving up

    def evict(self, Py_ssize_t n):
        """Free up to `n` blocks, those whose last use is longest ago; returns how many."""
        cdef Py_ssize_t done = 0
        cdef int32_t block_id
        while done < n and self.num_evictable:
            block_id = self.nodes[0].younger
            if self.nodes[block_id].length == self.block_size:
                self.evicted[self.nodes[block_id].hash.a & self.mask] = self.nodes[block_id].hash
            self.forget(block_id)
            self.pool.drop(block_id)
            done += 1
        return done

    def check_integrity(self, held=None):
        """Everything agrees: references, paths, hashes, treaps, buckets and the queue's order.

        `held` maps block id to the references that callers of `hold` (and of the pool) have. IntegrityError
        with the block at fault.
        """
        cdef Py_ssize_t num_blocks = self.pool.num_blocks, cached = 0, index, slot
        cdef int32_t block_id, parent
        cdef Node* node
        owned = dict(held or {})
        rank = {}
        block_id = self.nodes[0].younger
        while block_id and len(rank) <= num_blocks:
            rank[block_id] = len(rank)
            block_id = self.nodes[block_id].younger
        for block_id in range(1, num_blocks):
            node = &self.nodes[block_id]
            if node.length == 0:
                continue
            cached += 1
            owned[block_id] = owned.get(block_id, 0) + 1
            parent = node.parent
            self.verify_node(block_id)
            if (block_id in rank) != (self.pool.ref_cnts[block_id] == 1):
                raise IntegrityError(
                    f"block {block_id} has {self.pool.ref_cnts[block_id]} references and "
                    f"{'is' if block_id in rank else 'is not'} in the eviction queue"
                )
            if block_id in rank and parent in rank and rank[parent] < rank[block_id]:
                raise IntegrityError(f"block {parent} would be evicted before {block_id}, which continues it")
            if block_id not in rank and parent in rank:
                raise IntegrityError(f"block {parent} is evictable, but {block_id} continues it and is held")
        for slot in range(self.tables.max_num_seqs):
            for index in range(self.published[slot]):
                block_id = self.tables.table(slot)[index]
                # A block whose path was discarded is no longer cached, nor is what follows it.
                parent = self.tables.table(slot)[index - 1] if index else 0
                if self.nodes[block_id].length and self.nodes[block_id].parent != parent:
                    raise IntegrityError(f"block {block_id} of slot {slot} does not continue its block {parent}")
        if cached != self.num_cached or len(rank) != self.num_evictable:
            raise IntegrityError(
                f"{cached} blocks are cached and {len(rank)} evictable; counted {self.num_cached} and "
                f"{self.num_evictable}"
            )
        self.tables.check_integrity(owned)

    # Within: the books of references

    cdef int drop(self, int32_t block_id) except -1:
        """One reference less; a cached block that only the index holds joins the queue's young end."""
        self.pool.drop(block_id)
        if self.nodes[block_id].length and self.pool.ref_cnts[block_id] == 1:
            self.enqueue(block_id)
        return 0

    cdef int extend_path(self, Py_ssize_t slot, HashedTokens tokens, Py_ssize_t num_tokens) except -1:
        """publish(), checked."""
        cdef int32_t* table = self.tables.table(slot)
        cdef Py_ssize_t block_size = self.block_size, index = self.published[slot]
        cdef int32_t parent, own, existing
        if not self.has_path(slot):
            return 0
        parent = table[index - 1] if index else 0
        while (index + 1) * block_size <= num_tokens:
            own = table[index]
            existing = self.find(tokens.hashes[index + 1], parent, tokens.tokens + index * block_size)
            if existing == 0:
                self.insert(own, parent, tokens, index, block_size)
                existing = own
            elif existing != own:
                self.pool.ref_cnts[existing] += 1
                self.unqueue(existing)
                table[index] = existing
                self.pool.drop(own)
            parent = existing
            index += 1
        self.published[slot] = <int32_t> index
        return 0

    cdef int cache_tail(self, Py_ssize_t slot, HashedTokens tokens, Py_ssize_t num_tokens) except -1:
        """Cache the slot's partly filled block, unless what it holds is cached already."""
        cdef Py_ssize_t index = self.published[slot], length = num_tokens % self.block_size, num_common = 0
        cdef int32_t* table = self.tables.table(slot)
        cdef int32_t parent
        if length == 0 or index != num_tokens // self.block_size or not self.has_path(slot):
            return 0
        parent = table[index - 1] if index else 0
        self.closest(
            parent, tokens.hashes[0], tokens.tokens + index * self.block_size, length, &num_common
        )
        if num_common < length:
            self.insert(table[index], parent, tokens, index, length)
        return 0

    cdef bint has_path(self, Py_ssize_t slot) except -1:
        """Whether the slot's path is still there to be continued."""
        cdef Py_ssize_t index = self.published[slot]
        if index < 0:
            return False
        return index == 0 or self.nodes[self.tables.table(slot)[index - 1]].length != 0

    cdef int insert(
        self, int32_t block_id, int32_t parent, HashedTokens tokens, Py_ssize_t index, Py_ssize_t length
    ) except -1:
        """Cache a block that holds the first `length` tokens of block `index` of `tokens`."""
        cdef Node* node = &self.nodes[block_id]
        cdef Py_ssize_t bucket
        assert node.length == 0 and 0 < length <= self.block_size
        memcpy(
            self.tokens + block_id * self.block_size,
            tokens.tokens + index * self.block_size,
            length * sizeof(int32_t),
        )
        node.salt = tokens.hashes[0]
        node.length = <int32_t> length
        node.parent = parent
        node.children = node.left = node.right = 0
        node.older = node.younger = block_id
        # Partly filled blocks have no chained hash of their own; the last full one's gives the treap chance.
        node.hash = tokens.hashes[index + (length == self.block_size)]
        if length == self.block_size:
            bucket = node.hash.a & self.mask
            while self.buckets[bucket]:
                bucket = (bucket + 1) & self.mask
            self.buckets[bucket] = block_id
        self.nodes[parent].children = self.plant(self.nodes[parent].children, block_id)
        self.pool.ref_cnts[block_id] += 1
        self.num_cached += 1
        return 0

    cdef int forget(self, int32_t block_id) except -1:
        """Take a leaf out of the index; its reference is the caller's now."""
        cdef Node* node = &self.nodes[block_id]
        assert node.length and node.children == 0
        self.unqueue(block_id)
        self.nodes[node.parent].children = self.uproot(self.nodes[node.parent].children, block_id)
        if node.length == self.block_size:
            self.empty_bucket(block_id)
        node.length = 0
        self.num_cached -= 1
        return 0

    # Within: the eviction queue

    cdef bint is_queued(self, Py_ssize_t block_id) noexcept:
        return self.nodes[block_id].younger != block_id

    cdef void enqueue(self, int32_t block_id) noexcept:
        """At the young end."""
        cdef int32_t youngest = self.nodes[0].older
        self.nodes[block_id].older = youngest
        self.nodes[block_id].younger = 0
        self.nodes[youngest].younger = block_id
        self.nodes[0].older = block_id
        self.num_evictable += 1

    cdef void unqueue(self, int32_t block_id) noexcept:
        """Out of the queue, if it is in it."""
        cdef Node* node = &self.nodes[block_id]
        if node.younger == block_id:
            return
        self.nodes[node.older].younger = node.younger
        self.nodes[node.younger].older = node.older
        node.older = node.younger = block_id
        self.num_evictable -= 1

    # Within: full blocks by hash

    cdef int32_t find(self, Hash hash, int32_t parent, const int32_t* tokens) noexcept:
        """The full cached block with this chained hash, parent and tokens [block_size]; else 0."""
        cdef Py_ssize_t bucket = hash.a & self.mask
        cdef int32_t block_id = self.buckets[bucket]
        while block_id:
            if (
                same(self.nodes[block_id].hash, hash)
                and self.nodes[block_id].parent == parent
                and memcmp(
                    self.tokens + block_id * self.block_size, tokens, self.block_size * sizeof(int32_t)
                ) == 0
            ):
                return block_id
            bucket = (bucket + 1) & self.mask
            block_id = self.buckets[bucket]
        return 0

    cdef int empty_bucket(self, int32_t block_id) except -1:
        """Take a block out of its bucket; later ones of its run move up, so that no gap hides them."""
        cdef Py_ssize_t gap = self.nodes[block_id].hash.a & self.mask, bucket, home
        while self.buckets[gap] != block_id:
            assert self.buckets[gap]
            gap = (gap + 1) & self.mask
        bucket = gap
        while True:
            bucket = (bucket + 1) & self.mask
            if self.buckets[bucket] == 0:
                break
            home = self.nodes[self.buckets[bucket]].hash.a & self.mask
            # It may move to the gap unless its home lies behind the gap, on the way to where it is.
            if ((bucket - home) & self.mask) >= ((bucket - gap) & self.mask):
                self.buckets[gap] = self.buckets[bucket]
                gap = bucket
        self.buckets[gap] = 0
        return 0

    # Within: children in the order of their tokens

    cdef int32_t closest(
        self, int32_t parent, Hash salt, const int32_t* tokens, Py_ssize_t length, Py_ssize_t* num_common
    ) noexcept:
        """Of the children of `parent` the one that has most of `tokens` [length] in common; 0 if none is.

        The neighbours of `tokens` in the order have most in common with them, and both are on the way down.
        """
        cdef int32_t at = self.nodes[parent].children, best = 0
        cdef Py_ssize_t common, order, best_common = 0
        cdef Node* node
        while at:
            node = &self.nodes[at]
            order = 0 if parent else compare_salts(salt, node.salt)
            if order == 0:
                common = 0
                while (
                    common < length
                    and common < node.length
                    and tokens[common] == self.tokens[at * self.block_size + common]
                ):
                    common += 1
                if best == 0 or common > best_common:
                    best = at
                    best_common = common
                if common == length:
                    break
                order = 1
                if common < node.length and tokens[common] < self.tokens[at * self.block_size + common]:
                    order = -1
            at = node.left if order < 0 else node.right
        num_common[0] = best_common
        return best

    cdef bint precedes(self, int32_t one, int32_t other) noexcept:
        """Whether block `one` stands before its sibling `other`: by salt (first blocks only), then tokens."""
        cdef Node* a = &self.nodes[one]
        cdef Node* b = &self.nodes[other]
        cdef Py_ssize_t order = 0 if a.parent else compare_salts(a.salt, b.salt)
        cdef Py_ssize_t index
        if order:
            return order < 0
        for index in range(min(a.length, b.length)):
            if self.tokens[one * self.block_size + index] != self.tokens[other * self.block_size + index]:
                return (
                    self.tokens[one * self.block_size + index] < self.tokens[other * self.block_size + index]
                )
        return a.length < b.length

    cdef uint64_t priority(self, int32_t block_id) noexcept:
        """Random-like, and fixed while the block is cached: a treap is a heap of these."""
        return (self.nodes[block_id].hash.b ^ <uint64_t> block_id) * <uint64_t> 0x9E3779B97F4A7C15

    cdef int32_t plant(self, int32_t root, int32_t block_id) except -1:
        """Add to the treap `root`; its new root."""
        if root == 0:
            return block_id
        if self.priority(block_id) > self.priority(root):
            self.split(root, block_id, &self.nodes[block_id].left, &self.nodes[block_id].right)
            return block_id
        if self.precedes(block_id, root):
            self.nodes[root].left = self.plant(self.nodes[root].left, block_id)
        else:
            self.nodes[root].right = self.plant(self.nodes[root].right, block_id)
        return root

    cdef int split(self, int32_t root, int32_t block_id, int32_t* before, int32_t* after) except -1:
        """Part the treap `root` into what stands before the block and what stands after it."""
        if root == 0:
            before[0] = after[0] = 0
        elif self.precedes(root, block_id):
            before[0] = root
            self.split(self.nodes[root].right, block_id, &self.nodes[root].right, after)
        else:
            after[0] = root
            self.split(self.nodes[root].left, block_id, before, &self.nodes[root].left)
        return 0

    cdef int32_t uproot(self, int32_t root, int32_t block_id) except -1:
        """Remove from the treap `root`; its new root."""
        assert root
        if root == block_id:
            return self.join(self.nodes[root].left, self.nodes[root].right)
        if self.precedes(block_id, root):
            self.nodes[root].left = self.uproot(self.nodes[root].left, block_id)
        else:
            self.nodes[root].right = self.uproot(self.nodes[root].right, block_id)
        return root

    cdef int32_t join(self, int32_t before, int32_t after) except -1:
        """One treap of two, of which one stands wholly before the other."""
        if before == 0 or after == 0:
            return before or after
        if self.priority(before) > self.priority(after):
            self.nodes[before].right = self.join(self.nodes[before].right, after)
            return before
        self.nodes[after].left = self.join(before, self.nodes[after].left)
        return after

    # Within: checks

    cdef int check_tokens(self, HashedTokens tokens, Py_ssize_t num_tokens) except -1:
        if tokens.block_size != self.block_size:
            raise ValueError(f"blocks of {tokens.block_size} tokens in an index of {self.block_size}")
        if not 0 <= num_tokens <= tokens.num_tokens:
            raise ValueError(f"{num_tokens} of {tokens.num_tokens} tokens")
        return 0

    cdef int check_table(self, Py_ssize_t slot, HashedTokens tokens, Py_ssize_t num_tokens) except -1:
        """The tokens exist, and the slot's table covers them."""
        self.tables.table(slot)
        self.check_tokens(tokens, num_tokens)
        if num_tokens > self.tables.lengths[slot] * self.block_size:
            raise ValueError(
                f"slot {slot}: {num_tokens} tokens, the table has {self.tables.lengths[slot]} blocks"
            )
        return 0

    cdef int check_cached(self, Py_ssize_t block_id) except -1:
        if not 0 < block_id < self.pool.num_blocks or self.nodes[block_id].length == 0:
            raise ValueError(f"block {block_id} is not cached")
        return 0

    cdef int check_path(self, list block_ids) except -1:
        """Full cached blocks, each continuing the one before, the first one none."""
        cdef int32_t parent = 0
        cdef Py_ssize_t block_id
        for block_id in block_ids:
            self.check_cached(block_id)
            if self.nodes[block_id].length != self.block_size or self.nodes[block_id].parent != parent:
                raise ValueError(f"block {block_id} does not continue block {parent}")
            parent = <int32_t> block_id
        return 0

    cdef int verify_node(self, int32_t block_id) except -1:
        """check_integrity() of one cached block: its parent, its hash, and that it can be found."""
        cdef Node* node = &self.nodes[block_id]
        cdef Node* parent = &self.nodes[node.parent]
        cdef const int32_t* tokens = self.tokens + block_id * self.block_size
        cdef int32_t at = parent.children
        cdef HashedTokens chain
        cdef Hash before
        if node.parent and (parent.length != self.block_size or not same(parent.salt, node.salt)):
            raise IntegrityError(f"block {block_id} continues block {node.parent}, which it cannot")
        before = parent.hash if node.parent else node.salt
        chain = HashedTokens(self.block_size, (<char*> &before)[: sizeof(Hash)])
        chain.extend([tokens[i] for i in range(node.length)])
        if not same(chain.hashes[node.length == self.block_size], node.hash):
            raise IntegrityError(f"block {block_id} does not have the hash of its tokens")
        if node.length == self.block_size and self.find(node.hash, node.parent, tokens) != block_id:
            raise IntegrityError(f"block {block_id} is not found by its hash")
        while at and at != block_id:
            at = self.nodes[at].left if self.precedes(block_id, at) else self.nodes[at].right
        if at == 0:
            raise IntegrityError(f"block {block_id} is not found among its siblings")
        return 0


cdef inline bint same(Hash one, Hash other) noexcept:
    return one.a == other.a and one.b == other.b


cdef inline Py_ssize_t compare_salts(Hash one, Hash other) noexcept:
    """-1, 0, 1: any total order will do."""
    if one.a != other.a:
        return -1 if one.a < other.a else 1
    return (one.b > other.b) - (one.b < other.b)
