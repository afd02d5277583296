"""Fused attention against the plain one; the TPU kernel in its interpreter."""

import jax
import numpy as np
import pytest
import tiny

from maskdm_jax.errors import ConfigError
from maskdm_jax.models.ops import attention
from maskdm_jax.training.loop import make_run_mesh


def qkv(t, d=64, heads=2, batch=2):
    return jax.random.normal(jax.random.key(t), (3, batch, t, heads, d))


@pytest.mark.parametrize("t", [257, 385])
def test_the_tpu_kernel_equals_plain_attention(t):
    """In values and gradients, whatever is padded."""
    probe = jax.random.normal(jax.random.key(1), (2, t, 2, 64))

    def value_and_grad(fn):
        return jax.jit(jax.value_and_grad(lambda x: (fn(*x) * probe).sum(), has_aux=False))(qkv(t))

    ours = attention.splash_attention(*qkv(t), interpret=True)
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(*qkv(t)), atol=2e-6)
    value, grad = value_and_grad(lambda q, k, v: attention.splash_attention(q, k, v, interpret=True))
    expected, expected_grad = value_and_grad(jax.nn.dot_product_attention)
    assert value == pytest.approx(float(expected), rel=1e-4)
    np.testing.assert_allclose(grad, expected_grad, atol=5e-6)


@pytest.mark.parametrize(("batch", "heads", "dtype", "atol"), [(3, 4, "float32", 2e-6), (1, 3, "bfloat16", 2e-2)])
def test_parts_side_by_side_equal_plain_attention(batch, heads, dtype, atol):
    """What a CPU computes, in values and gradients; with 12 heads in 4 parts and with 3 in one."""
    x = qkv(33, heads=heads, batch=batch).astype(dtype)
    probe = jax.random.normal(jax.random.key(1), x.shape[1:])
    for fn in (
        lambda attend: attend(*x),
        lambda attend: jax.grad(lambda x: (attend(*x) * probe).sum())(x),
    ):
        found, expected = fn(attention.side_by_side), fn(jax.nn.dot_product_attention)
        assert found.dtype == expected.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (found, expected)), atol=atol)


def test_long_sequences_are_fused_on_tpu_alone(monkeypatch):
    """Here the program holds plain attention; for a TPU it would hold the kernel."""
    monkeypatch.setattr(attention, "FUSED_FROM", 64)
    x = qkv(65)
    for fn in (attention.attention, jax.grad(lambda *x: attention.attention(*x).sum())):
        lowered = jax.jit(fn).trace(*x).lower(lowering_platforms=("tpu",)).as_text()
        plain = jax.jit(fn).lower(*x).as_text()
        assert "tpu_custom_call" in lowered
        assert "tpu_custom_call" not in plain
    text = jax.jit(attention.attention).trace(*x).lower(lowering_platforms=("tpu",)).as_text()
    assert "65x65" not in text, "there are no logits in memory"
    np.testing.assert_allclose(attention.attention(*x), jax.nn.dot_product_attention(*x), atol=2e-6)


@pytest.mark.parametrize("kernel", ["plain", "side_by_side"])
def test_a_kernel_can_be_chosen(kernel):
    x = qkv(9)
    chosen = jax.make_jaxpr(lambda *x: attention.attention(*x, kernel))(*x)
    assert str(chosen) == str(jax.make_jaxpr(attention.KERNELS[kernel])(*x))


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_of_another_platform_is_refused(kernel):
    config = tiny.config(model__attention=kernel, model__dtype="bfloat16")
    with pytest.raises(ConfigError, match=f"attention '{kernel}' is not for devices of cpu; take 'auto'"):
        make_run_mesh(config)


def test_tiles():
    assert [attention.tiles(t) for t in (417, 1025, 4097, 4224)] == [(512, 512), (1152, 384), (4224, 384), (4224, 384)]
    assert all(
        padded % tile == 0 and t <= padded < t + 256 for t in range(1, 5000) for padded, tile in [attention.tiles(t)]
    )
