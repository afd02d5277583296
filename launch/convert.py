"""Convert a checkpoint: python launch/convert.py --src=model-20.pt --dst=runs/official --num_heads=12

The paths determine the formats: a run folder or one of its checkpoints, an official .pt (U-ViT) or .pth (JiT), or a
.safetensors (weights only). Needs neither PyTorch nor an accelerator. docs/checkpoints.md lists what carries over.
--for=torch writes a folder that runs on PyTorch alone: weights, model code, sampler, model card.
"""

from absl import flags

from maskdm_jax.parallel import runtime

SRC = flags.DEFINE_string(
    "src", None, "Run or checkpoint folder, .pt, or .safetensors (or a folder with model.safetensors).", required=True
)
DST = flags.DEFINE_string("dst", None, "Run folder, .pt or .safetensors; must not exist yet.", required=True)
HEADS = flags.DEFINE_integer(
    "num_heads", None, "Number of attention heads, which U-ViT files do not contain; default: width / 64."
)
CLASS_TOKENS_FROM = flags.DEFINE_integer(
    "class_tokens_from", None, "Block before which a JiT's class tokens join; default: as in the authors' sizes."
)
CONFIG = runtime.config_flag("Config of the run; needed to train it further.")
STAGE = flags.DEFINE_string("stage", None, "Stage of --config that the file belongs to; default: the first.")
FOR = flags.DEFINE_enum("for", None, ["torch"], "Make --dst a folder that PyTorch runs without this project.")
WEIGHTS = flags.DEFINE_string(
    "weights", "ema", "Weights in a .safetensors or a folder --for=torch: averaged (ema; ema2, ...) or raw (params)."
)

DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Dtype of the weights in a .safetensors or a folder."
)


def main(_):
    import jax

    jax.config.update("jax_platforms", "cpu")
    from maskdm_jax.interop.convert import convert
    from maskdm_jax.main import model_path

    options = dict(heads=HEADS.value, class_tokens_from=CLASS_TOKENS_FROM.value)
    options |= dict(config=CONFIG.value, stage=STAGE.value, weights=WEIGHTS.value)
    options |= dict(dtype=DTYPE.value, for_torch=FOR.value == "torch")
    with runtime.program(distributed=False):
        lines = convert(model_path(SRC.value), DST.value, **options)
    print("\n".join(lines))


if __name__ == "__main__":
    runtime.start(main)
