"""The twin of mlxd._ext.hashed_tokens: the same hash on Python's integers.

It does not know the extension.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

BITS = 2**64 - 1
Hash = tuple[int, int]


def largest_token_id(token_ids: list[int]) -> int:
    if any(not 0 <= token_id < 2**31 for token_id in token_ids):
        raise ValueError("a token id is out of range")
    return max(token_ids, default=-1)


def mix(state: Hash, word: int) -> Hash:
    a, b = state
    a = (a ^ word) * 0x9E3779B97F4A7C15 & BITS
    a ^= a >> 32
    b = (b + (a << 23 & BITS | a >> 41)) * 0xC2B2AE3D27D4EB4F & BITS
    b ^= b >> 29
    return (a + b) & BITS, b


def mix_tokens(state: Hash, token_ids: Sequence[int]) -> Hash:
    pairs = len(token_ids) // 2 * 2
    for index in range(0, pairs, 2):
        state = mix(state, token_ids[index] | token_ids[index + 1] << 32)
    for token_id in token_ids[pairs:]:
        state = mix(state, token_id)
    return state


class HashedTokens:
    def __init__(self, block_size: int, salt: bytes) -> None:
        if block_size < 1 or len(salt) != 16:
            raise ValueError(f"blocks of {block_size}, a salt of {len(salt)} bytes")
        self.block_size = block_size
        self.tokens: list[int] = []
        self.hashes: list[Hash] = [struct.unpack("=QQ", salt)]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_blocks(self) -> int:
        return len(self.tokens) // self.block_size

    @property
    def salt(self) -> Hash:
        return self.hashes[0]

    def extend(self, token_ids: Sequence[int]) -> None:
        if any(not 0 <= token_id < 2**31 for token_id in token_ids):
            raise ValueError("a token id is out of range")
        self.tokens += token_ids
        for block in range(len(self.hashes) - 1, self.num_blocks):
            self.hashes.append(mix_tokens(self.hashes[block], self.block(block)))

    def block(self, index: int) -> list[int]:
        return self.tokens[index * self.block_size : (index + 1) * self.block_size]

    def token_bytes(self, start: int, stop: int) -> bytes:
        tokens = self.tokens[max(start, 0) : max(stop, 0)]
        return struct.pack(f"={len(tokens)}i", *tokens)

    def block_hash(self, index: int) -> bytes:
        if not -1 <= index < self.num_blocks:
            raise IndexError(index)
        return struct.pack("=QQ", *self.hashes[index + 1])

    def common_blocks(self, other: HashedTokens) -> int:
        if self.block_size != other.block_size:
            raise ValueError("block sizes differ")
        equal = 0
        while (
            self.salt == other.salt
            and equal < min(self.num_blocks, other.num_blocks)
            and self.block(equal) == other.block(equal)
        ):
            equal += 1
        return equal

    def digest(self, num_tokens: int) -> bytes:
        if not 0 <= num_tokens <= len(self.tokens):
            raise ValueError(f"{num_tokens} of {len(self.tokens)} tokens")
        full = num_tokens // self.block_size
        state = mix_tokens(self.hashes[full], self.tokens[full * self.block_size : num_tokens])
        return struct.pack("=QQ", *mix(state, num_tokens))
