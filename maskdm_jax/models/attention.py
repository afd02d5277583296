"""Attention by platform: one function, and what each platform is fast with.

Plain attention writes T x T logits to memory, which at 4,097 tokens costs far more time than the arithmetic; fused
kernels keep them on the chip.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

FUSED_FROM = 1024  # tokens; on TPU, plain attention is as fast with fewer


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, [B, T, H, d] each -> [B, T, H, d]; logits and softmax in float32.

    On TPU the splash kernel from `FUSED_FROM` tokens on; on NVIDIA GPUs cuDNN's for half precision; else XLA's own.
    """
    plain, t, d = jax.nn.dot_product_attention, q.shape[1], q.shape[3]
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and d % 8 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if t < FUSED_FROM:
        return plain(q, k, v)
    # Decided when the program is compiled, which may be for another platform than this machine's.
    return jax.lax.platform_dependent(q, k, v, tpu=splash_attention, default=lambda q, k, v: plain(q, k, v))


def splash_attention(q, k, v, *, interpret: bool = False):
    """`attention` by the TPU's kernel. `interpret` runs it elsewhere, slowly, for tests."""
    t, heads, d = q.shape[1:]
    padded, block = tiles(t)
    kernel = _kernel(heads, padded, block, interpret)
    # The kernel wants heads first, no scale of its own, and whole tiles: padding sees and is seen by padding alone.
    ready = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - t), (0, 0)))
    ids = (jnp.arange(padded) >= t).astype(jnp.int32)
    out = jax.vmap(kernel, (0, 0, 0, None))(ready(q * d**-0.5), ready(k), ready(v), splash.SegmentIds(ids, ids))
    return out[:, :, :t].swapaxes(1, 2)


def tiles(t: int) -> tuple[int, int]:
    """(padded length, tile) for t tokens: the least padding among good tiles, then the largest tile."""
    return min(((-(-t // tile) * tile, tile) for tile in (512, 384, 256)), key=lambda pair: (pair[0], -pair[1]))


@functools.lru_cache
def _kernel(heads: int, length: int, tile: int, interpret: bool):
    with jax.ensure_compile_time_eval():
        mask = splash.MultiHeadMask([splash.FullMask((length, length))] * heads)
        names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq")
        sizes = splash.BlockSizes(**dict.fromkeys((*names, "block_kv_compute", "block_kv_dq"), tile))
        return splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
