"""One entry in one table, or one file, adds a sampler, process, schedule, mask, metric or network."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdm_jax import config as config_lib
from maskdm_jax import run, sampling
from maskdm_jax.build import make_network, mask_plans
from maskdm_jax.diffusion import gaussian, masking, process, samplers
from maskdm_jax.errors import CheckpointError, ConfigError
from maskdm_jax.evaluation import metrics
from maskdm_jax.interop import convert
from maskdm_jax.tools import cost
from maskdm_jax.training import step

OWN = pathlib.Path(__file__).parent.parent / "experiments" / "own_network.py"
NNX = """
import jax
from flax import nnx
class Linear(nnx.Module):
    def __init__(self, model, image_size, channels, *, rngs):
        self.layer = nnx.Linear(model.patch_size**2 * channels, model.patch_size**2 * channels, rngs=rngs)
    def __call__(self, x, t, labels=None, positions=None):
        return self.layer(x) if x.ndim == 3 else x
class Wide(Linear):
    def __call__(self, x, *args):
        return x if x.ndim == 4 else x[..., :1]
class Blind(Linear):
    def __call__(self, x, t, labels, positions):
        if positions is not None:
            raise TypeError("no shape")
        return x
broken = lambda model: None

class Plain:
    def __init__(self, model, image_size, channels):
        pass

    def init(self, key, x, t, labels):
        return {"kernel": jax.numpy.ones(())}

    def apply(self, params, x, t, labels, positions):
        return params["kernel"] * x

class Misspelt(Plain):
    def init(self, key, x, t, labels):
        return self.widht

class Listed(Plain):
    def init(self, key, x, t, labels):
        return {"layers": [jax.numpy.ones(())]}
"""


def test_entries_of_tables(monkeypatch):
    table = dict(process=process.PROCESSES, schedule=gaussian.SCHEDULES, kind=masking.KINDS, method=samplers.SAMPLERS)
    for entries, like in zip(table.values(), ("ddpm", "linear", "patch", "ddim"), strict=True):
        monkeypatch.setitem(entries, "mine", entries[like])
    monkeypatch.setitem(samplers.SAMPLERS, "mine", dataclasses.replace(table["method"]["ddpm"], calls=lambda s, n: 7))
    monkeypatch.setitem(metrics.METRICS, "mine", dataclasses.replace(metrics.METRICS["fid"], keys={"mine": None}))
    changes = dict(diffusion__process="mine", diffusion__schedule="mine", sampling__method="mine")
    config = tiny.config(**changes, pretrain__mask__kind="mine", evaluation__metrics=("mine",))
    run.check(config)
    assert cost.evaluations(config) == 7
    assert mask_plans(config, "pretrain")[0].visible == 8
    shown = config_lib.describe(config)
    for name, entries in table.items():
        assert f"{name}='mine'" in shown, name
        assert f"one of {', '.join(entries)}" in shown, name


def test_a_network_of_ones_own(tmp_path):
    changes = dict(model__depth=1, stages=("pretrain",), sampling__guidance=0.5, data__label_dropout=0.2)
    config = tiny.config(model__network=f"{OWN}:Transformer", **changes)
    run.train(config, tmp_path / "run")
    loaded = sampling.load(tmp_path / "run")
    assert loaded.network is make_network(config)
    images = [image for _, image in sampling.generate_batches(loaded, range(3), [0, 1, 2], seed=0, batch_size=4)]
    assert images[0].shape == (3, 8, 8, 1)
    network, x, t = loaded.network, jnp.ones((2, 16, 4)), jnp.array([3.0, 7.0])
    whole = network.apply(loaded.params, x, t, jnp.array([1, -1]), jnp.arange(16)[None].repeat(2, 0))
    some = network.apply(loaded.params, x[:, :4], t, jnp.array([1, -1]), jnp.array([[0, 5, 6, 9]] * 2))
    assert whole.shape == x.shape
    assert some.shape == (2, 4, 4)
    with pytest.raises(CheckpointError, match="a network that PyTorch code has no counterpart of"):
        convert.convert(tmp_path / "run", tmp_path / "own.pt")


def test_a_network_in_nnx(tmp_path):
    (tmp_path / "own.py").write_text(NNX)
    config = tiny.config(model__network=f"{tmp_path}/own.py:Linear")
    network = make_network(config)
    params = network.init(jax.random.key(0))
    half = make_network(tiny.config(model__network=f"{tmp_path}/own.py:Linear", model__dtype="bfloat16"))
    assert half.cast(params)["layer"]["kernel"].dtype == "float32", "it may compute in float32"
    data = dict(
        image=np.zeros((2, 8, 8, 1), np.uint8), label=np.zeros(2, np.int32), index=np.arange(2, dtype=np.uint32)
    )
    inputs = step.draw_inputs(config, "pretrain", jax.random.key(1), data)
    assert np.isfinite(step.make_loss(config, network)(params, inputs))
    messages = dict(missing=r"own.py defines no missing, but Linear, Wide, Blind, broken, Plain, Misspelt, Listed$")
    messages |= dict(
        broken=r"own.py:broken cannot be built \(<lambda>\(\) takes 1 positional argument but 3 were given"
    )
    messages |= dict(
        Blind=r"own.py:Blind fails when called with \(x \[2, 8, 4\], t, labels, positions \[2, 8\]\): no shape"
    )
    for name, message in messages.items():
        with pytest.raises(ConfigError, match=message):
            make_network(tiny.config(model__network=f"{tmp_path}/own.py:{name}"))
    with pytest.raises(ConfigError, match=r"own.py:Wide returns \[2, 8, 1\] for x of \[2, 8, 4\]"):
        make_network(tiny.config(model__network=f"{tmp_path}/own.py:Wide"))
    with pytest.raises(ConfigError, match=r"there is no file 'nothing.py' in /"):
        make_network(tiny.config(model__network="nothing.py:X"))
    with pytest.raises(ConfigError, match="remat must be False"):
        make_network(config, remat=True)
    with pytest.raises(ConfigError, match="own.py:Misspelt cannot be built .*no attribute 'widht'"):
        make_network(tiny.config(model__network=f"{tmp_path}/own.py:Misspelt"))
    with pytest.raises(ConfigError, match="own.py:Listed must keep its parameters in nested dicts of arrays"):
        make_network(tiny.config(model__network=f"{tmp_path}/own.py:Listed"))
    with pytest.raises(ConfigError, match="wavelet_scale is 1; it must be 0 for another network than a U-ViT"):
        tiny.config(**tiny.WAVELET | dict(model__network=f"{tmp_path}/own.py:Linear"))


def test_a_network_whose_apply_has_no_defaults(tmp_path):
    (tmp_path / "own.py").write_text(NNX)
    run.train(tiny.config(model__network=f"{tmp_path}/own.py:Plain", preview__every=1), tmp_path / "run")
    assert sampling.load(tmp_path / "run").sample(2, labels=np.int64(1)).shape == (2, 8, 8, 1)
