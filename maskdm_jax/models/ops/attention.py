"""Attention kernels, one for each platform, and the choice between them.

Plain attention writes T x T logits to memory. For 4,097 tokens, this takes far longer than the arithmetic. Fused
kernels keep the logits on the chip.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

FUSED_FROM = 384  # tokens on TPU; at 257, plain attention moves fewer HBM bytes than the padded kernel, at 417 more
PARALLEL_PARTS = 8  # of attention on CPU: XLA's runtime gives a thread at most this many products at a time


def attention(q, k, v, kernel: str = "auto"):
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017), with logits and softmax in float32.

    Args:
      q, k, v: [B, T, H, d] of equal dtype.
      kernel: one of `KERNELS`.

    Returns:
      [B, T, H, d] of q's dtype.
    """
    return KERNELS[kernel](q, k, v)


def choose_by_platform(q, k, v):
    """`attention` on TPU by `splash` from `FUSED_FROM` tokens on; on GPUs by `cudnn` where it can; on CPU by
    `parallel_heads`; otherwise by `plain`.
    """
    t, d = q.shape[1], q.shape[3]
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and d % 8 == 0 and d <= cudnn_limit():
        return cudnn_attention(q, k, v)
    # The choice is made at compilation, because the program may be compiled for another platform than this machine's.
    on_tpu = dict(tpu=splash_attention) if t >= FUSED_FROM else {}
    return jax.lax.platform_dependent(q, k, v, cpu=parallel_heads, default=plain_attention, **on_tpu)


def plain_attention(q, k, v):
    """`attention` by XLA, on any platform."""
    return jax.nn.dot_product_attention(q, k, v)


def cudnn_limit() -> int:
    """The largest d of `cudnn_attention` on this machine's GPU; 0 for AMD, and for NVIDIA before Ampere."""
    capability = str(jax.local_devices()[0].compute_capability)  # such as 9.0; AMD's are like gfx90a
    major = int(capability.split(".")[0]) if capability[0].isdecimal() else 0
    return 256 if major >= 9 else 128 if major == 8 else 0


def cudnn_attention(q, k, v):
    """`attention` by cuDNN: NVIDIA GPUs, bfloat16 or float16, d a multiple of 8 up to `cudnn_limit`."""
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    b, t = q.shape[:2]
    if t % 2 == 0:
        return fused(q, k, v)
    # JAX has no backward pass for odd lengths, so a token is added that no other attends to.
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    length = jnp.full(b, t, jnp.int32)
    return fused(q, k, v, query_seq_lengths=length, key_value_seq_lengths=length)[:, :t]


# --- CPU ------------------------------------------------------------------------------------------


@jax.custom_vjp
def parallel_heads(q, k, v):
    """`attention` for XLA:CPU, which computes each of these small products on one thread.

    Heads are put before tokens, the layout of the batched products, and split into independent parts, which run in
    parallel. The backward pass of the softmax reads the weights once.
    """
    return _parallel_heads_forward(q, k, v)[0]


def _parallel_heads_forward(q, k, v):
    out, saved = zip(*map(_heads_first, *map(_split_heads, (q, k, v))), strict=True)
    return _join_heads(out, q.shape), saved


def _parallel_heads_backward(saved, g):
    grads = map(_heads_first_backward, saved, _split_heads(g))
    return tuple(_join_heads(parts, g.shape) for parts in zip(*grads, strict=True))


parallel_heads.defvjp(_parallel_heads_forward, _parallel_heads_backward)


def _split_heads(x):
    """The parts [parts, N, T, d] of x [B, T, H, d]."""
    b, t, heads, d = x.shape
    parts = math.gcd(b * heads, PARALLEL_PARTS)
    return x.swapaxes(1, 2).reshape(parts, b * heads // parts, t, d)


def _join_heads(parts, shape):
    b, t, heads, d = shape
    return jnp.stack(parts).reshape(b, heads, t, d).swapaxes(1, 2)


def _heads_first(q, k, v):
    """`attention` of q, k, v [N, T, d], and what its backward pass needs."""
    logits = _product("ntd,nsd->nts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return _product("nts,nsd->ntd", weights, v).astype(v.dtype), (q, k, v, weights)


def _product(equation, a, b):
    # XLA:CPU uses bfloat16 instructions only for products with float32 results.
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _heads_first_backward(saved, g):
    q, k, v, weights = saved
    d_weights = _product("ntd,nsd->nts", g, v)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
    d_logits = d_logits.astype(q.dtype)
    dq = _product("nts,nsd->ntd", d_logits, k)
    dk = _product("nts,ntd->nsd", d_logits, q)
    dv = _product("nts,ntd->nsd", weights, g)
    return tuple(grad.astype(q.dtype) for grad in (dq, dk, dv))


# --- TPU ------------------------------------------------------------------------------------------


def splash_attention(q, k, v, *, interpret: bool = False):
    """`attention` by JAX's Pallas kernel for TPUs. `interpret` runs it on any platform, slowly, for tests."""
    b, t, heads, d = q.shape
    padded, tile = padded_length(t)
    kernel = _splash_kernel(heads, padded, tile, interpret)

    # The kernel takes heads first, whole tiles and no scale. Padding has its own segment: it attends only to padding.
    def prepare(x):
        # With heads first, a head of 64 takes the memory of 128. The barrier makes XLA pad before.
        x = jnp.pad(x.reshape(b, t, heads * d), ((0, 0), (0, padded - t), (0, 0)))
        return jax.lax.optimization_barrier(x).reshape(b, padded, heads, d).swapaxes(1, 2)

    ids = (jnp.arange(padded) >= t).astype(jnp.int32)
    segments = splash.SegmentIds(ids, ids)
    out = jax.vmap(kernel, (0, 0, 0, None))(prepare(q * d**-0.5), prepare(k), prepare(v), segments)
    out = jax.lax.optimization_barrier(out.swapaxes(1, 2).reshape(b, padded, heads * d))
    return out[:, :t].reshape(q.shape)


def padded_length(t: int) -> tuple[int, int]:
    """(padded length, tile) for t tokens: the tile of 256, 384 or 512 that pads least, the larger one if two tie."""
    return min(((-(-t // tile) * tile, tile) for tile in (512, 384, 256)), key=lambda pair: (pair[0], -pair[1]))


@functools.lru_cache
def _splash_kernel(heads: int, length: int, tile: int, interpret: bool):
    with jax.ensure_compile_time_eval():
        mask = splash.MultiHeadMask([splash.FullMask((length, length))] * heads)
        names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq")
        sizes = splash.BlockSizes(**dict.fromkeys((*names, "block_kv_compute", "block_kv_dq"), tile))
        return splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)


KERNELS = {  # by `config.model.attention`
    "auto": choose_by_platform,
    "plain": plain_attention,
    "parallel_heads": parallel_heads,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}
