import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from maskdm_jax.build import make_network
from maskdm_jax.diffusion import masking
from maskdm_jax.models.layers import patchify, unpatchify
from maskdm_jax.models.routing import take
from maskdm_jax.models.uvit import UViT


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (dict(image_size=64, width=512, depth=13, heads=8), 44_292_144),
        (dict(image_size=256, width=512, depth=13, heads=8), 46_258_224),
        (dict(image_size=256, width=768, depth=12, heads=12), 102_417_456),
        (dict(image_size=256, width=768, depth=13, heads=12), 102_417_456),
    ],
)
def test_parameter_counts_of_the_paper(fields, parameters):
    model = nnx.eval_shape(lambda: UViT(patch_size=4, rngs=nnx.Rngs(0), **fields))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters


@pytest.fixture(scope="module")
def net():
    network = make_network(tiny.config())
    return network, jax.jit(network.init)(jax.random.key(0)), jax.jit(network.apply)


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(keys[0], (3, 8, 8, 1)), jnp.array([0, 500, 999]), jnp.array([3, 0, 9])


def test_patchify_is_row_column_channel_and_inverts():
    images = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], images[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 2, (2, 3)), images)
    with pytest.raises(ValueError, match="4 x 6 do not divide into patches of 4 x 4"):
        patchify(images, 4)


def test_all_visible_equals_no_plan(net, batch):
    _, params, apply = net
    x, t, labels = batch
    whole = apply(params, x, t, labels)
    patches = apply(params, patchify(x, 2), t, labels, jnp.tile(jnp.arange(16), (3, 1)))
    np.testing.assert_allclose(unpatchify(patches, 2, (4, 4)), whole, atol=1e-5)
    without_positions = apply(params, patchify(x, 2), t, labels)
    np.testing.assert_allclose(without_positions, patches, atol=1e-5)


def test_order_of_patches_does_not_matter(net, batch):
    _, params, apply = net
    x, t, labels = batch
    order = np.random.RandomState(4).permutation(16)
    straight = patchify(apply(params, x, t, labels), 2)
    shuffled = apply(params, patchify(x, 2)[:, order], t, labels, jnp.tile(order, (3, 1)))
    np.testing.assert_allclose(shuffled, straight[:, order], atol=1e-5)


def test_a_hidden_patch_has_zero_gradient(net, batch):
    network, params, _ = net
    x, t, labels = batch
    plan = masking.make_plan("patch", (4, 4), rate=0.5)
    positions = jax.vmap(lambda key: masking.sample_positions(plan, key))(jax.random.split(jax.random.key(5), 3))

    def total(x, pos_embed):
        visible = take(patchify(x, 2), positions)
        return jnp.square(network.apply(params | {"pos_embed": pos_embed}, visible, t, labels, positions)).sum()

    by_image, by_position = jax.jit(jax.grad(total, argnums=(0, 1)))(x, params["pos_embed"])
    size = jnp.abs(patchify(by_image, 2)).sum(-1)
    hidden = np.ones((3, plan.total), bool)
    np.put_along_axis(hidden, np.asarray(positions), False, axis=1)
    assert (size[hidden] == 0).all()
    assert (size[~hidden] > 0).all()
    never = hidden.all(axis=0)
    assert (by_position[2:][never] == 0).all()


def test_labels(net, batch):
    _, params, apply = net
    x, t, labels = batch
    unlabelled = apply(params, x, t)
    np.testing.assert_allclose(apply(params, x, t, jnp.full(3, -1)), unlabelled, atol=1e-6)
    assert jnp.abs(apply(params, x, t, labels) - unlabelled).max() > 1e-3
    mixed = apply(params, x, t, jnp.array([-1, 0, 9]))
    np.testing.assert_allclose(mixed[0], unlabelled[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1:], apply(params, x, t, labels)[1:], atol=1e-5)


def test_bad_calls_are_refused(batch):
    x, t, labels = batch
    network = make_network(tiny.config(model__num_classes=0, data__labels=False))
    call = lambda *args: jax.eval_shape(network.apply, network.abstract_params(), *args)
    with pytest.raises(ValueError, match="unconditional"):
        call(x, t, labels)
    with pytest.raises(ValueError, match="positions go with patches"):
        call(x, t, None, jnp.zeros((3, 16), jnp.int32))
    with pytest.raises(ValueError, match="got 8 patches, but the model.s grid has 16; give all"):
        call(patchify(x, 2)[:, :8], t)


def test_remat_changes_nothing(net, batch):
    network, params, _ = net
    x, t, labels = batch
    grads = [
        jax.jit(jax.grad(lambda p, n=n: jnp.square(n.apply(p, x, t, labels)).sum()))(params)
        for n in (network, make_network(tiny.config(), remat=True))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(net, batch):
    _, params, apply = net
    x, t, labels = batch
    network = make_network(tiny.config(model__dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(network.abstract_params()))
    out = jax.jit(network.apply)(params, x, t, labels)
    assert out.dtype == jnp.float32
    ready = network.cast(params)
    assert ready["head"]["kernel"].dtype == jnp.bfloat16
    assert ready["backbone"]["norm"]["scale"].dtype == ready["pos_embed"].dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(network.apply)(ready, x, t, labels), out)
    expected = apply(params, x, t, labels)
    error = float(jnp.abs(out - expected).max() / expected.std())
    assert 1e-5 < error < 0.1, "it must round, but not more than bfloat16 does"
    text = jax.jit(network.apply).lower(params, x, t, labels).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    full = [line for line in dots if "bf16" not in line]
    assert not full, f"matrix products in float32: {full}"


def test_initialisation():
    fields = dict(image_size=64, patch_size=4, width=128, depth=1, heads=2, num_classes=50, qv_bias=True)
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(UViT(**fields, rngs=nnx.Rngs(0)))))()
    params = jax.tree.map(np.asarray, params)
    assert params["pos_embed"].std() == pytest.approx(0.02, rel=0.05)
    assert params["backbone"]["mid_block"]["attn"]["qkv"]["kernel"].std() == pytest.approx(0.02, rel=0.05)
    assert params["backbone"]["label_embed"]["embedding"].std() == pytest.approx(1.0, rel=0.05)
    bound = (4 * 4 * 3) ** -0.5
    for tensor in (params["patch_embed"]["kernel"], params["patch_embed"]["bias"]):
        assert np.abs(tensor).max() <= bound
        assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert abs(tensor.mean()) < 0.2 * bound
    assert (params["head"]["bias"] == 0).all()
    assert (params["backbone"]["norm"]["scale"] == 1).all()
