"""Names and layouts of tensors in PyTorch's files, and in our parameters.

Conversion renames, transposes and reshapes, nothing else, so it is exact in both directions.
"""

import dataclasses
import re
import typing

import jax
import numpy as np

_NUMBER = re.compile(r"(?<=blocks\.)(?:0|[1-9]\d{0,3})(?=\.)")  # of a block


@dataclasses.dataclass(frozen=True)
class Names:
    """The tensors of a network: name in PyTorch -> our path, in PyTorch's order; * is the number of a block.

    A Linear's weight [out, in] is our kernel [in, out], and a convolution [D, C, p, p] is our kernel [p*p*C, D].
    """

    network: str  # for messages
    table: dict[str, str]
    embeddings: tuple[str, ...]  # names of matrices that keep their layout
    batched: tuple[str, ...]  # names of tensors that have a first dimension of 1 there
    sides: typing.Callable  # (patch size, scale of the detail patches) -> side of each convolution's kernel, by name
    fixed: tuple[str, ...] = ()  # names of tensors that are computed here, and neither trained nor parameters

    def divide(self, name: str) -> tuple[str, str | None]:
        """Prefix of a name in a file, and the name of a tensor of the network that it ends with, or None."""
        parts = name.split(".")
        for i in range(len(parts)):
            ending = ".".join(parts[i:])
            if ending in self.fixed or self.pattern(ending)[0] in self.table:
                return name.removesuffix(ending), ending
        return name, None

    def pattern(self, name: str) -> tuple[str, int]:
        """A name with its block's number as *, and that number (0 outside the numbered blocks)."""
        number = _NUMBER.search(name)
        return (name, 0) if number is None else (_NUMBER.sub("*", name, count=1), int(number[0]))

    def our_path(self, name: str) -> tuple:
        """Path of the tensor `name` in our parameters, such as ('blocks', 0, 'qkv', 'kernel').

        Raises:
          KeyError: the network has no such tensor.
        """
        pattern, number = self.pattern(name)
        if pattern not in self.table:
            raise KeyError(f"{name!r} is not the name of a {self.network} tensor")
        return tuple(number if part == "*" else part for part in self.table[pattern].split("."))

    def their_name(self, path: tuple) -> str:
        """Inverse of `our_path`."""
        number = next((part for part in path if isinstance(part, int)), None)
        pattern = ".".join("*" if isinstance(part, int) else part for part in path)
        return next(theirs for theirs, ours in self.table.items() if ours == pattern).replace("*", str(number))

    def rank(self, name: str) -> tuple:
        """Sorts names as PyTorch's network lists them; an optimizer numbers its tensors in this order."""
        order = [*self.fixed, *self.table]
        pattern, number = self.pattern(name)
        start = pattern.partition("*")[0]
        return next(i for i, other in enumerate(order) if other.startswith(start)), number, order.index(pattern)

    def our_layout(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Rearrange a tensor of PyTorch.

        Raises:
          ValueError: it has the wrong shape.
        """
        if name in self.batched:
            if tensor.shape[:1] != (1,):
                raise ValueError(f"{name} is {tensor.shape}; its first dimension must be 1, for the batch")
            return tensor[0]
        if tensor.ndim == 4:
            return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
        return tensor.T if tensor.ndim == 2 and name not in self.embeddings else tensor

    def their_layout(self, name: str, tensor: np.ndarray, side: int | None = None) -> np.ndarray:
        """Inverse of `our_layout`; `side` is that of a convolution's kernel, None if it is a Linear there."""
        if name in self.batched:
            return tensor[None]
        if side is not None and tensor.ndim == 2:
            return tensor.reshape(side, side, -1, tensor.shape[1]).transpose(3, 2, 0, 1)
        return tensor.T if tensor.ndim == 2 and name not in self.embeddings else tensor

    def params(self, state_dict: dict) -> dict:
        """Tensors by name, without the fixed ones -> our nested dict of parameters (NumPy, dtypes kept).

        Raises:
          KeyError: the network has no such tensor.
          ValueError: a tensor has the wrong shape.
        """
        params = {}
        for name, tensor in state_dict.items():
            *parents, last = self.our_path(name)
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = self.our_layout(name, np.asarray(tensor))
        return params

    def state_dict(self, params: dict, patch_size: int, scale: int = 1) -> dict:
        """Inverse of `params`: {name: contiguous NumPy array}, in PyTorch's order.

        scale: of a wavelet model, the width of its detail patches in patches.
        """
        tensors, sides = {}, self.sides(patch_size, scale)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = self.their_name(tuple(part.key for part in path))
            tensors[name] = np.ascontiguousarray(self.their_layout(name, np.asarray(leaf), sides.get(name)))
        return {name: tensors[name] for name in sorted(tensors, key=self.rank)}


def _layer(theirs: str, ours: str, weight: str = "kernel", bias: str | None = "bias") -> dict:
    """Entries of a `Names.table` for the weight and the bias of a layer."""
    names = {f"{theirs}.weight": f"{ours}.{weight}"}
    return names | ({f"{theirs}.bias": f"{ours}.{bias}"} if bias else {})


def _scale(theirs: str, ours: str) -> dict:
    return _layer(theirs, ours, "scale", None)


def _block(theirs: str, ours: str) -> dict:
    names = _layer(f"{theirs}.norm1", f"{ours}.norm1", "scale")
    names |= {f"{theirs}.attn.{bias}": f"{ours}.attn.{bias}" for bias in ("q_bias", "v_bias")}
    names |= _layer(f"{theirs}.attn.qkv", f"{ours}.attn.qkv", bias=None)
    names |= _layer(f"{theirs}.attn.proj", f"{ours}.attn.proj")
    names |= _layer(f"{theirs}.norm2", f"{ours}.norm2", "scale")
    for linear in ("mlp.fc1", "mlp.fc2", "skip_linear"):
        names |= _layer(f"{theirs}.{linear}", f"{ours}.{linear}")
    return names


# The U-ViT of the official code, on pixels or wavelet coefficients.
UVIT = Names(
    "U-ViT",
    {"encoder.uncond_embed": "backbone.uncond_embed", "encoder.encoder_pos_embed": "pos_embed"}
    | _layer("encoder.patch_embed.proj", "patch_embed")
    | _layer("encoder.approx_patch_embed.proj", "approx_patch_embed")
    | _layer("encoder.detail_patch_embed.proj", "detail_patch_embed")
    | _layer("encoder.label_emb", "backbone.label_embed", "embedding", bias=None)
    | _layer("encoder.time_embed.0", "backbone.time_mlp.fc1")
    | _layer("encoder.time_embed.2", "backbone.time_mlp.fc2")
    | _block("encoder.in_blocks.*", "backbone.in_blocks.*")
    | _block("encoder.mid_block", "backbone.mid_block")
    | _block("encoder.out_blocks.*", "backbone.out_blocks.*")
    | _layer("encoder.norm", "backbone.norm", "scale")
    | _layer("encoder_to_output", "head")
    | _layer("approx_to_output", "approx_head")
    | _layer("detail_to_output", "detail_head"),
    embeddings=("encoder.label_emb.weight",),
    batched=("encoder.encoder_pos_embed", "encoder.uncond_embed"),
    sides=lambda patch, scale: {
        "encoder.patch_embed.proj.weight": patch,
        "encoder.approx_patch_embed.proj.weight": patch,
        "encoder.detail_patch_embed.proj.weight": patch * scale,
    },
)

# The JiT of its authors' code.
JIT = Names(
    "JiT",
    {"in_context_posemb": "class_positions"}
    | _layer("t_embedder.mlp.0", "time1")
    | _layer("t_embedder.mlp.2", "time2")
    | _layer("y_embedder.embedding_table", "label_table", "embedding", None)
    | _layer("x_embedder.proj1", "embed1", bias=None)
    | _layer("x_embedder.proj2", "embed2")
    | _scale("blocks.*.norm1", "blocks.*.norm1")
    | _scale("blocks.*.attn.q_norm", "blocks.*.q_norm")
    | _scale("blocks.*.attn.k_norm", "blocks.*.k_norm")
    | _layer("blocks.*.attn.qkv", "blocks.*.qkv")
    | _layer("blocks.*.attn.proj", "blocks.*.proj")
    | _scale("blocks.*.norm2", "blocks.*.norm2")
    | _layer("blocks.*.mlp.w12", "blocks.*.w12")
    | _layer("blocks.*.mlp.w3", "blocks.*.w3")
    | _layer("blocks.*.adaLN_modulation.1", "blocks.*.modulation")
    | _scale("final_layer.norm_final", "norm")
    | _layer("final_layer.linear", "head")
    | _layer("final_layer.adaLN_modulation.1", "modulation"),
    embeddings=("y_embedder.embedding_table.weight",),
    batched=("in_context_posemb",),
    sides=lambda patch, _: {"x_embedder.proj1.weight": patch, "x_embedder.proj2.weight": 1},
    fixed=("pos_embed",),
)
NETWORKS = {"uvit": UVIT, "jit": JIT}  # by `config.model.network`


def shape_of(tensors: dict[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with `ndim` dimensions."""
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing")
    if tensors[name].ndim != ndim or not tensors[name].size:
        raise ValueError(f"tensor {name!r} is {tensors[name].shape}; {ndim} dimensions are wanted")
    return tensors[name].shape
