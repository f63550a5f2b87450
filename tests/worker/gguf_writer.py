"""Writes small GGUF files: float32 tensors, and the block formats that MLX reads as its own quantisation.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Value = str | int | float | bool | list[str] | list[int] | list[float]

ALIGNMENT = 32
GROUP = 32
TENSOR_TYPES = {"f32": 0, "q4_0": 2, "q4_1": 3, "q8_0": 8}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


def write_gguf(
    path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[str, Float32Array]]
) -> dict[str, Float32Array]:
    """Writes the file; `tensors` are (type, values [rows, columns]). Returns what the blocks really hold."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(string(key) + value_of(value) for key, value in metadata.items())
    stored: dict[str, Float32Array] = {}
    data = b""
    for name, (kind, values) in tensors.items():
        blob, stored[name] = encode(kind, values)
        data += b"\0" * (-len(data) % ALIGNMENT)
        header += string(name) + struct.pack("<I", values.ndim)
        header += struct.pack(f"<{values.ndim}Q", *reversed(values.shape))
        header += struct.pack("<IQ", TENSOR_TYPES[kind], len(data))
        data += blob
    header += b"\0" * (-len(header) % ALIGNMENT)
    path.write_bytes(header + data + b"\0" * (-len(data) % ALIGNMENT))
    return stored


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value_of(value: Value) -> bytes:
    if isinstance(value, list):
        kind, items = max(scalar(item) for item in value)[0], [scalar(item)[1] for item in value]
        return struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(items)
    kind, data = scalar(value)
    return struct.pack("<I", kind) + data


def scalar(value: str | int | float | bool) -> tuple[int, bytes]:
    if isinstance(value, str):
        return STRING, string(value)
    if isinstance(value, bool):
        return BOOL, struct.pack("<B", value)
    if isinstance(value, int):
        return (UINT32, struct.pack("<I", value)) if value >= 0 else (INT32, struct.pack("<i", value))
    return FLOAT32, struct.pack("<f", value)


def encode(kind: str, values: Float32Array) -> tuple[bytes, Float32Array]:
    """(bytes of the blocks, the values they decode to). Scales are powers of two: decoding is exact."""
    if kind == "f32":
        return values.tobytes(), values
    groups = values.reshape(-1, GROUP)
    largest = np.abs(groups).max(axis=1, keepdims=True)
    levels = {"q4_0": 7, "q4_1": 7, "q8_0": 127}[kind]
    scales = np.exp2(np.ceil(np.log2(largest / levels))).astype(np.float16)
    steps = np.rint(groups / scales).astype(np.int32)
    if kind == "q8_0":
        blocks = [s.tobytes() + q.astype(np.int8).tobytes() for s, q in zip(scales, steps, strict=True)]
        return b"".join(blocks), (steps * scales).astype(np.float32).reshape(values.shape)
    nibbles = np.clip(steps + 8, 0, 15).astype(np.uint8)
    packed = nibbles[:, : GROUP // 2] | nibbles[:, GROUP // 2 :] << 4
    minimums = (-8 * scales).astype(np.float16) if kind == "q4_1" else np.empty((len(scales), 0), np.float16)
    blocks = [
        s.tobytes() + m.tobytes() + q.tobytes() for s, m, q in zip(scales, minimums, packed, strict=True)
    ]
    decoded = (nibbles.astype(np.int32) - 8) * scales.astype(np.float32)
    return b"".join(blocks), decoded.astype(np.float32).reshape(values.shape)
