"""Attention over a padded batch of whole sequences, in tiles of queries where the scores would be large.

It does not know models: encoders call `attend`, and mlx-lm's decoders find `WholeSequences` in their cache's
place.
"""

from __future__ import annotations

import mlx.core as mx

MAX_SCORES = 1 << 25
"""Scores that exist at one time (128 MB in float32): MLX's CPU device materialises them."""


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """queries [B, H, L, dim], keys and values [B, KV, L, dim] -> [B, H, L, dim].

    `mask` is "causal", None, or bool or additive, broadcast to [B, H, L, L].
    """
    num_rows, num_heads, length, _ = queries.shape
    tile = max(1, MAX_SCORES // (num_rows * num_heads * length))
    if tile >= length:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    outputs = []
    for start in range(0, length, tile):
        end = min(start + tile, length)
        # The queries of a causal mask are the last ones of the keys: what comes after is left out.
        seen = end if mask == "causal" else length
        part = mask[..., start:end, :] if isinstance(mask, mx.array) and mask.shape[-2] > 1 else mask
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, start:end],
                keys[:, :, :seen],
                values[:, :, :seen],
                scale=scale,
                mask=part,
                sinks=sinks,
            )
        )
    return mx.concatenate(outputs, axis=2)


class WholeSequences:
    """Takes the place of a layer's cache (see patching.patch_attention): keeps nothing, attends in tiles."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """As mlx-lm's caches do: causal, over the last `window_size` positions where there is a window."""
        if length == 1:
            return None
        if not return_array and (window_size is None or length <= window_size):
            return "causal"
        positions = mx.arange(length)
        mask = positions[:, None] >= positions[None]
        if window_size is not None:
            mask = mask & (positions[:, None] < positions[None] + window_size)
        return mask

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
