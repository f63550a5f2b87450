"""Any tokens: extension and twin hash alike, and equal hashes mean equal beginnings under one salt.

It does not know how a hash is made.
"""

from __future__ import annotations

from array import array
from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mlxd._ext import hashed_tokens as extension
from tests.reference import hashed_tokens as twin

SALTS = (b"\0" * 16, b"\0" * 15 + b"\1", bytes(range(16)))

block_sizes = st.integers(1, 5)
salts = st.sampled_from(SALTS)
token_ids = st.lists(st.one_of(st.integers(0, 2), st.integers(0, 2**31 - 1)), max_size=20)


def outcome(act: object, *arguments: object) -> object:
    try:
        return act(*arguments)  # type: ignore[operator]
    except (ValueError, IndexError, TypeError) as error:
        return type(error)


@given(block_sizes, salts, st.lists(token_ids, max_size=4), st.integers(-3, 90), st.integers(-3, 90))
def test_extension_and_twin_agree(
    block_size: int, salt: bytes, parts: list[list[int]], one: int, other: int
) -> None:
    both = [module.HashedTokens(block_size, salt) for module in (extension, twin)]
    for part in parts:
        for tokens in both:
            tokens.extend(part)
    ours, plain = both
    whole = [token for part in parts for token in part]
    assert ours.num_tokens == plain.num_tokens == len(whole)
    assert ours.num_blocks == plain.num_blocks == len(whole) // block_size
    assert ours.token_bytes(one, other) == plain.token_bytes(one, other)
    assert array("i", ours.token_bytes(one, other)).tolist() == whole[max(one, 0) : max(other, 0)]
    assert outcome(ours.block_hash, one) == outcome(plain.block_hash, one)
    assert outcome(ours.digest, other) == outcome(plain.digest, other)
    assert ours.block_hash(-1) == salt


@given(block_sizes, salts, salts, token_ids, token_ids, token_ids)
def test_hashes_tell_where_sequences_part(
    block_size: int, salt: bytes, other_salt: bytes, head: list[int], one: list[int], other: list[int]
) -> None:
    for module in (extension, twin):
        a, b = module.HashedTokens(block_size, salt), module.HashedTokens(block_size, other_salt)
        a.extend(head + one)
        b.extend(head + other)
        common = a.common_blocks(b)
        assert common == b.common_blocks(a)
        for index in range(-1, min(a.num_blocks, b.num_blocks)):
            stop = (index + 1) * block_size
            same = salt == other_salt and a.token_bytes(0, stop) == b.token_bytes(0, stop)
            assert (a.block_hash(index) == b.block_hash(index)) == same
            assert same == (salt == other_salt and index < common)
            assert (a.digest(stop) == b.digest(stop)) == same


@given(st.lists(st.integers(-2, 2**31 + 1), max_size=5))
def test_a_wrong_token_appends_nothing(token_ids: list[int]) -> None:
    for module in (extension, twin):
        tokens = module.HashedTokens(2, SALTS[0])
        tokens.extend([7])
        wrong = any(not 0 <= token < 2**31 for token in token_ids)
        assert (outcome(tokens.extend, token_ids) is ValueError) == wrong
        assert tokens.num_tokens == 1 + (0 if wrong else len(token_ids))


@given(st.lists(st.integers(-2, 2**31 + 1) | st.just(2**70), max_size=5) | token_ids)
def test_the_largest_token_is_found_unless_one_is_wrong(token_ids: list[int]) -> None:
    ours, plain = (outcome(module.largest_token_id, token_ids) for module in (extension, twin))
    assert ours == plain
    assert (ours is ValueError) == any(not 0 <= token < 2**31 for token in token_ids)


@pytest.mark.parametrize("wrong", ["a", None, [1], 1.5])
def test_what_is_no_token_has_no_largest(wrong: object) -> None:
    with pytest.raises(TypeError):
        extension.largest_token_id([3, wrong])  # type: ignore[list-item]


def test_no_two_small_blocks_collide_in_either_half() -> None:
    """Not only the 128 bits differ: each 64-bit half does, so each of them mixes well."""
    halves: tuple[set[bytes], set[bytes]] = (set(), set())
    count = 0
    for pair in product(range(256), repeat=2):
        tokens = extension.HashedTokens(2, SALTS[0])
        tokens.extend(list(pair))
        value = tokens.block_hash(0)
        halves[0].add(value[:8])
        halves[1].add(value[8:])
        count += 1
    assert len(halves[0]) == len(halves[1]) == count


def test_digest_names_the_count_too() -> None:
    tokens = extension.HashedTokens(4, SALTS[0])
    tokens.extend([5, 0, 0, 0, 0, 0])
    assert len({tokens.digest(n) for n in range(7)}) == 7


def test_refuses_what_is_no_block_size_or_salt() -> None:
    for module in (extension, twin):
        with pytest.raises(ValueError, match="block"):
            module.HashedTokens(0, SALTS[0])
        with pytest.raises(ValueError, match="salt"):
            module.HashedTokens(4, b"short")
        with pytest.raises(ValueError, match="block"):
            module.HashedTokens(4, SALTS[0]).common_blocks(module.HashedTokens(2, SALTS[0]))
