"""Each operation of `models.ops` agrees with its plain twin, in values and gradients; the choice of a kernel."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdm_jax.errors import ConfigError
from maskdm_jax.models.ops import attention, dense
from maskdm_jax.training.loop import make_run_mesh

SHAPES = [(4, 6), (3, 5, 8), (2, 7, 33)]  # of x, with even and odd numbers of rows and columns
float32_and_bfloat16 = pytest.mark.parametrize(("dtype", "atol"), [("float32", 5e-6), ("bfloat16", 3e-2)])


def draw(*shapes, dtype="float32", seed=0):
    """Standard normal arrays of these shapes."""
    rng = np.random.RandomState(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def assert_twins(fn, plain, args, *, atol):
    """The value of `fn`, and the gradients of a random projection of it, are those of `plain` computed in float32."""
    (probe,) = draw(jax.eval_shape(plain, *args).shape, seed=1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(fn, args):
        value, pullback = jax.vjp(fn, *args)
        return value, *pullback(probe.astype(value.dtype))

    value, *grads = run(fn, args)
    assert [a.dtype for a in (value, *grads)] == [a.dtype for a in (args[0], *args)]
    expected, *expected_grads = run(plain, [a.astype(jnp.float32) for a in args])
    np.testing.assert_allclose(np.float32(value), expected, atol=atol)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(np.float32(ours), theirs, atol=atol)


@float32_and_bfloat16
@pytest.mark.parametrize(("shape", "columns"), list(zip(SHAPES, (10, 9, 4), strict=True)))
def test_matmul(shape, columns, dtype, atol):
    x, w = draw(shape, (shape[-1], columns), dtype=dtype)
    assert_twins(dense.matmul, dense.plain_matmul, (x / 2, w / 2), atol=atol)


@float32_and_bfloat16
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape, dtype, atol):
    x, scale, bias = draw(shape, shape[-1:], shape[-1:])
    fn, plain = (functools.partial(f, epsilon=1e-2) for f in (dense.layer_norm, dense.plain_layer_norm))
    assert_twins(fn, plain, ((x + 3).astype(dtype), scale, bias), atol=atol)


@float32_and_bfloat16
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape, dtype, atol):
    (x,) = draw(shape, dtype=dtype)
    assert_twins(dense.gelu, dense.plain_gelu, (3 * x,), atol=atol)


@float32_and_bfloat16
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_and_swiglu(shape, dtype, atol):
    x, scale = draw(shape, shape[-1:])
    x = x.astype(dtype)
    fn, plain = (functools.partial(f, epsilon=1e-2) for f in (dense.rms_norm, dense.plain_rms_norm))
    assert_twins(fn, plain, (x, scale), atol=atol)
    assert_twins(dense.swiglu, dense.plain_swiglu, (jnp.concatenate([x, -x / 2], axis=-1),), atol=atol)


@float32_and_bfloat16
@pytest.mark.parametrize("rows", [1, 2])
def test_rotate(rows, dtype, atol):
    """As on TPU and as elsewhere; the gradient, which is a rotation back, is that of the plain version."""
    x, angles = draw((2, 5, 3, 8), (rows, 5, 4))
    x = x.astype(dtype)
    for fn in (dense.rotate, dense.rotate_by_product):
        assert_twins(lambda x, fn=fn: fn(x, angles), lambda x: dense.plain_rotate(x, angles), (x,), atol=atol)
    on_tpu = jax.jit(dense.rotate).trace(x, angles).lower(lowering_platforms=("tpu",)).as_text()
    assert "dot_general" in on_tpu
    assert "dot_general" not in jax.jit(dense.rotate).lower(x, angles).as_text()


def qkv(t, d=64, heads=2, batch=2, dtype="float32"):
    return draw(*[(batch, t, heads, d)] * 3, dtype=dtype)


@pytest.mark.parametrize(("batch", "heads", "dtype", "atol"), [(3, 4, "float32", 2e-6), (1, 3, "bfloat16", 2e-2)])
def test_parallel_heads(batch, heads, dtype, atol):
    """12 heads in 4 parts, 3 heads in one."""
    args = qkv(33, heads=heads, batch=batch, dtype=dtype)
    assert_twins(attention.parallel_heads, attention.plain_attention, args, atol=atol)


@pytest.mark.parametrize("t", [257, 385])
def test_the_tpu_kernel(t):
    """In its interpreter, with different amounts of padding."""
    splash = functools.partial(attention.splash_attention, interpret=True)
    assert_twins(splash, attention.plain_attention, qkv(t), atol=2e-6)


def test_long_sequences_are_fused_on_tpu_alone(monkeypatch):
    """Here the program holds plain attention; for a TPU it would hold the kernel."""
    monkeypatch.setattr(attention, "FUSED_FROM", 64)
    x = qkv(65)
    lowered = {}
    for name, fn in dict(forward=attention.attention, grad=jax.grad(lambda *x: attention.attention(*x).sum())).items():
        traced = jax.jit(fn).trace(*x)
        lowered[name] = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in lowered[name]
        assert "tpu_custom_call" not in traced.lower().as_text()
    assert "65x65" not in lowered["forward"], "there are no logits in memory"
    np.testing.assert_allclose(attention.attention(*x), attention.plain_attention(*x), atol=2e-6)


@pytest.mark.parametrize("t", [8, 9])
def test_the_gpu_kernel(monkeypatch, t):
    """JAX accepts its backward pass, as far as can be told without a GPU; and by XLA it equals plain attention."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    x = tuple(part.astype(jnp.bfloat16) for part in qkv(t))
    program = jax.make_jaxpr(jax.grad(lambda *x: attention.cudnn_attention(*x).sum(dtype=jnp.float32)))(*x)
    assert "dot_product_attention_bwd" in str(program)
    with monkeypatch.context() as patch:
        patch.setattr(
            attention.jax.nn, "dot_product_attention", functools.partial(_by_xla, jax.nn.dot_product_attention)
        )
        assert_twins(attention.cudnn_attention, attention.plain_attention, qkv(t), atol=2e-6)


@pytest.mark.parametrize(
    ("capability", "fused"), [("9.0", True), ("10.3", True), ("8.0", False), ("7.5", False), ("gfx90a", False)]
)
def test_the_choice_on_a_gpu(monkeypatch, capability, fused):
    """Heads of width 136 are too wide for an A100."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    monkeypatch.setattr(attention, "cudnn_attention", lambda q, k, v: "fused")
    x = jnp.zeros((1, 4, 1, 136), jnp.bfloat16)
    assert isinstance(attention.attention(x, x, x), str) == fused


def _by_xla(original, *args, implementation=None, **more):
    return original(*args, **more)


@pytest.mark.parametrize("kernel", ["plain", "parallel_heads"])
def test_a_kernel_can_be_chosen(kernel):
    x = qkv(9)
    chosen = jax.make_jaxpr(lambda *x: attention.attention(*x, kernel))(*x)
    assert str(chosen) == str(jax.make_jaxpr(attention.KERNELS[kernel])(*x))


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_of_another_platform_is_refused(kernel):
    config = tiny.config(model__attention=kernel, model__dtype="bfloat16")
    with pytest.raises(ConfigError, match=f"attention '{kernel}' is not for devices of cpu; take 'auto'"):
        make_run_mesh(config)


def test_padded_length():
    lengths = [attention.padded_length(t) for t in (417, 1025, 4097, 4224)]
    assert lengths == [(512, 512), (1152, 384), (4224, 384), (4224, 384)]
    for t in range(1, 5000):
        padded, tile = attention.padded_length(t)
        assert padded % tile == 0
        assert t <= padded < t + 256
