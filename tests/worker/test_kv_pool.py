"""The pool itself: copying blocks copies these, and nothing else."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxd.worker.kv_pool import KvPool
from mlxd.worker.support import LayerShape


def test_copying_blocks_does_not_copy_the_pool() -> None:
    pool = KvPool([LayerShape(2, 16, 16)], num_blocks=4096, block_size=16, dtype=mx.float32)
    layer = pool.layers[0]
    layer.keys[3] = 1.0
    layer.values[3] = 2.0
    layer.keys[4] = 3.0
    mx.eval(layer.keys, layer.values)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pool.copy_blocks([(3, 4), (4, 5)])
    mx.eval(layer.keys, layer.values)
    assert mx.get_peak_memory() - before < pool.nbytes / 16
    keys, values = np.array(layer.keys[3:7]), np.array(layer.values[3:7])
    assert [float(block.mean()) for block in keys] == [1.0, 1.0, 3.0, 0.0], (
        "all are read before any is written"
    )
    assert [float(block.mean()) for block in values] == [2.0, 2.0, 0.0, 0.0]
