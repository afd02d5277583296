"""From a config to the network, used functionally: a graphdef and a plain dict of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from maskdm_jax.models.uvit import UViT
from maskdm_jax.models.wavelet_uvit import WaveletUViT


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without its parameters."""

    graphdef: nnx.GraphDef
    make: object  # rngs -> module
    dtype: jnp.dtype  # of the computation

    def init(self, key) -> dict:
        """Fresh parameters, a nested dict of float32 arrays. Call it under `jax.jit` to place them."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key)), nnx.Param))

    def apply(self, params, x, t, labels=None, positions=None):
        """See `UViT.__call__` and `WaveletUViT.__call__`."""
        return nnx.merge(self.graphdef, params)(x, t, labels, positions)

    def cast(self, params) -> dict:
        """The same with matrices in the dtype of the computation, to which `apply` would bring them at every call."""
        is_matrix = lambda path: path[-1].key == "kernel"
        ready = lambda path, leaf: leaf.astype(self.dtype) if is_matrix(path) else leaf
        return jax.tree_util.tree_map_with_path(ready, params)

    def abstract_params(self) -> dict:
        """ShapeDtypeStructs of the parameters; nothing is computed."""
        return jax.eval_shape(self.init, jax.random.key(0))


def make_network(config, *, remat: bool = False) -> Network:
    """The network of a `config.Config`; `remat` recomputes its blocks in the backward pass."""
    fields = dataclasses.asdict(config.model) | dict(remat=remat)
    fields |= dict(dtype=jnp.dtype(fields["dtype"]), image_size=config.data.image_size, channels=config.data.channels)

    scale = fields.pop("wavelet_scale")

    def make(rngs):
        return WaveletUViT(scale=scale, **fields, rngs=rngs) if scale else UViT(**fields, rngs=rngs)

    return Network(nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0)))), make, fields["dtype"])
