"""Attention by platform: one function, and what each platform is fast with.

Plain attention writes T x T logits to memory, which at 4,097 tokens costs far more time than the arithmetic; fused
kernels keep them on the chip.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

FUSED_FROM = 384  # tokens; on TPU, plain attention on 257 moves less through memory than the padded kernel, on 417 more
SIDE_BY_SIDE = 8  # parts of attention on CPU: as many as XLA's runtime hands to a thread at once


def attention(q, k, v, kernel: str = "auto"):
    """softmax(q k^T / sqrt(d)) v, [B, T, H, d] each -> [B, T, H, d]; logits and softmax in float32.

    kernel: one of `KERNELS`, or auto: on TPU splash from `FUSED_FROM` tokens on; on NVIDIA GPUs cudnn for half
      precision; on CPU side_by_side; else plain.
    """
    if kernel != "auto":
        return KERNELS[kernel](q, k, v)
    t, d = q.shape[1], q.shape[3]
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and d % 8 == 0:
        return cudnn(q, k, v)
    # Decided when the program is compiled, which may be for another platform than this machine's.
    on_tpu = dict(tpu=splash_attention) if t >= FUSED_FROM else {}
    return jax.lax.platform_dependent(q, k, v, cpu=side_by_side, default=plain, **on_tpu)


def plain(q, k, v):
    """`attention` by XLA, on any platform."""
    return jax.nn.dot_product_attention(q, k, v)


def cudnn(q, k, v):
    """`attention` by cuDNN: NVIDIA GPUs, bfloat16 or float16, d a multiple of 8."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def side_by_side(q, k, v):
    """`attention` as XLA's CPU compiler is fast with it.

    Heads come first, in the order of the batched products, and fall into parts that do not depend on each other: the
    compiler gives a thread to each product, not several to one of these small ones.
    """
    b, t, heads, d = q.shape
    parts = math.gcd(b * heads, SIDE_BY_SIDE)
    q, k, v = (x.swapaxes(1, 2).reshape(parts, b * heads // parts, t, d) for x in (q, k, v))
    return jnp.stack(list(map(_softmax_of_products, q, k, v))).reshape(b, heads, t, d).swapaxes(1, 2)


@jax.custom_vjp
def _softmax_of_products(q, k, v):
    """[N, T, d] each."""
    return _softmax_forward(q, k, v)[0]


def _softmax_forward(q, k, v):
    logits = _wide("ntd,nsd->nts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return _wide("nts,nsd->ntd", weights, v).astype(v.dtype), (q, k, v, weights)


def _wide(equation, a, b):
    """A product with float32 results: what CPUs that multiply bfloat16 in hardware are asked to do there."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _softmax_backward(saved, g):
    q, k, v, weights = saved
    to_weights = _wide("ntd,nsd->nts", g, v)
    to_logits = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
    to_logits = to_logits.astype(q.dtype)
    turned = lambda a, b: _wide("nts,ntd->nsd", a, b)
    grads = _wide("nts,nsd->ntd", to_logits, k), turned(to_logits, q), turned(weights, g)
    return tuple(grad.astype(q.dtype) for grad in grads)


_softmax_of_products.defvjp(_softmax_forward, _softmax_backward)


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


KERNELS = dict(plain=plain, side_by_side=side_by_side, splash=splash_attention, cudnn=cudnn)
