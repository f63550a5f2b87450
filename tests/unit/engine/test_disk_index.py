"""What the disk holds: against a plain list, over random trees of blocks."""

from __future__ import annotations

import random
import struct

import pytest

from mlxd.engine.disk_index import DiskIndex
from mlxd.step import StoredBlock

ROOT = bytes(16)


def block(number: int, parent: int = 0) -> StoredBlock:
    return StoredBlock(struct.pack("<QQ", number, 1), struct.pack("<QQ", parent, 1) if parent else ROOT, b"t")


@pytest.mark.parametrize("seed", range(20))
def test_ends_of_paths_go_in_the_order_of_their_last_use(seed: int) -> None:
    rng = random.Random(seed)
    index = DiskIndex(12)
    parents: dict[int, int] = {}
    last_used: dict[int, int] = {}
    for now in range(400):
        number = now + 1
        parent = rng.choice([0, *parents, *list(parents)[-3:]])
        stored = block(number, parent)
        index.add_storing(stored)
        assert index.find([stored.key], b"t") == []
        assert index.mark_stored(stored.key) and not index.mark_stored(stored.key)
        parents[number], last_used[number] = parent, now
        if rng.random() < 0.5:
            path = [rng.choice(list(parents))]
            while parents.get(path[-1]):
                path.append(parents[path[-1]])
            index.touch([block(n).key for n in reversed(path)])
            last_used |= dict.fromkeys((n for n in path if n in parents), now)
        if rng.random() < 0.1:
            gone = rng.choice(list(parents))
            assert index.remove(block(gone).key) and not index.remove(block(gone).key)
            del parents[gone], last_used[gone]
        for key in index.make_room():
            ends = set(parents) - set(parents.values())
            oldest = min(last_used[n] for n in ends)
            (gone,) = [n for n in ends if block(n).key == key]
            assert last_used[gone] == oldest
            del parents[gone], last_used[gone]
        assert len(index) == index.num_stored == len(parents) <= 12
        assert all(index.find([block(n).key], b"t") == [block(n, parents[n])] for n in parents)


def test_a_hit_is_verified() -> None:
    index = DiskIndex(4)
    index.add_found(block(1))
    assert index.find([block(1).key], b"t") == [block(1)]
    assert index.find([block(1).key], b"u") == []
    assert index.find([block(2).key], b"t") == []


def test_a_path_is_found_as_far_as_it_is_stored_and_right() -> None:
    index = DiskIndex(9)
    path = [block(number, number - 1) for number in range(1, 6)]
    for item in path[:4]:
        index.add_storing(item)
    for item in path[:3]:
        index.mark_stored(item.key)
    keys = [item.key for item in path]
    assert index.find(keys, b"ttttt") == path[:3]
    assert index.find(keys, b"tuttt") == path[:1]
    assert index.find(keys[1:2], b"t") == path[1:2]
    assert index.find([], b"") == []


def test_found_blocks_are_older_than_new_ones_and_last_used_first() -> None:
    index = DiskIndex(1)
    for number in (1, 2, 3):
        index.add_found(block(number))
    index.add_storing(block(4))
    assert index.make_room() == [block(number).key for number in (3, 2, 1)]
    index.add_storing(block(5))
    assert index.make_room() == [], "blocks on their way cannot go"


def test_a_block_that_names_itself_is_not_believed() -> None:
    index = DiskIndex(4)
    index.add_found(StoredBlock(ROOT, ROOT, b"t"))
    assert len(index) == 0


def test_what_continues_a_block_goes_with_it() -> None:
    index = DiskIndex(10)
    for number, parent in ((1, 0), (2, 1), (3, 2), (4, 1), (5, 0)):
        index.add_found(block(number, parent))
    assert sorted(index.remove_below([block(2).key, block(9).key])) == [block(2).key, block(3).key]
    assert sorted(index.remove_below([block(1).key])) == [block(1).key, block(4).key]
    assert len(index) == 1
