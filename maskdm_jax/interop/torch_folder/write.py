"""What a folder for PyTorch users holds besides the weights: settings, model code, sampler, model card."""

import dataclasses
import json
import pathlib

import maskdm_jax
from maskdm_jax.build import mask_plans, time_scale
from maskdm_jax.config import UNKNOWN, Config
from maskdm_jax.errors import CheckpointError, ConfigError
from maskdm_jax.storage import write_atomically
from maskdm_jax.training import checkpoint, logs

CODE = ("modeling.py", "sample.py")
METHODS = ("ddim", "ddpm", "dpm_solver", "heun", "euler")  # the samplers in sample.py
_MODEL = ("network", "patch_size", "wavelet_scale", "width", "depth", "heads", "mlp_ratio", "qv_bias", "num_classes")
_MODEL += ("time_mlp", "jit")
UNTOLD = "Not known: the weights come from a file that does not say."
_CARD = """---
library_name: pytorch
tags: [diffusion]
---
# {title}

A {network} that generates {size} x {size} images{classes}, {trained} MaskDM-JAX {version}.
{grid}
## Use

    pip install torch safetensors numpy pillow
    python sample.py --n=16 --out=grid.png

In Python, inside this folder:

    import modeling, sample
    model = modeling.from_pretrained()  # on the CPU; .to("cuda") moves it to a GPU
    images = sample.generate(model, 16, seed=1)  # uint8 [16, {size}, {size}, {channels}]

In MaskDM-JAX, `maskdm_jax.load(FOLDER)` loads it.

## Training

{training}

The weights are {weights}. The process is `{process}` with the objective `{objective}`; `config.json` has the settings
of the network and the sampler. The method is that of
[Masked Diffusion Models are Fast Distribution Learners](https://arxiv.org/abs/2306.11363).

## Data

{data}

Licence of the images and of these weights: not stated. Fill it in before you publish this folder.
{numbers}"""


def write(folder, title: str, config: Config, classes: list[str], weights: str, src) -> None:
    """Add all but `model.safetensors` to a folder.

    Args:
      title: of the model card.
      config, classes: of the network.
      weights: ema, ema2, ... or params.
      src: the run, checkpoint or file that they are from; the card describes it.

    Raises:
      ConfigError: `sample.py` has no such sampler.
    """
    if config.sampling.method not in METHODS:
        raise ConfigError(
            f"config.sampling.method of {src} is {config.sampling.method!r}; a folder for PyTorch has the samplers "
            f"{', '.join(METHODS)} (interop/torch_folder/sample.py)"
        )
    raw = dataclasses.asdict(config)
    settings = dict(
        data={name: raw["data"][name] for name in ("image_size", "channels")},
        model={name: raw["model"][name] for name in _MODEL},
        diffusion=raw["diffusion"] | dict(time_scale=time_scale(config.model)),
        sampling=raw["sampling"] | ({} if config.sampling.weak == "unlabelled" else dict(guidance=0.0)),
        classes=classes,
        guidable=bool(
            config.model.num_classes and not config.model.wavelet_scale and not config.untrained("unlabelled")
        ),
    )
    write_atomically(folder / "config.json", json.dumps(settings, indent=2).encode())
    for name in CODE:
        write_atomically(folder / name, pathlib.Path(__file__).with_name(name).read_bytes())
    known = _known(src)
    if weights != "ema":  # of which the run's evaluations and samples are
        known |= dict(evaluated={}, grid=None)
    if known["grid"]:
        write_atomically(folder / "samples.png", known["grid"].read_bytes())
    write_atomically(folder / "README.md", _card(title, config, classes, weights, known).encode())


def _known(src) -> dict:
    """What a run tells besides its weights: step, data card, last evaluation, last grid of samples."""
    try:
        found = checkpoint.find(src)
    except CheckpointError:  # a file
        return dict(step=None, card={}, evaluated={}, grid=None)
    run, meta = found.parent.parent, checkpoint.load_meta(found)
    step = sum(meta["past"].values()) + meta["stage_step"]
    metrics = run / "metrics.jsonl"
    lines = [line for line in logs.read_metrics(metrics) if line["step"] <= step] if metrics.exists() else []
    evaluated = [line for line in lines if any(key.startswith("eval/") for key in line)]
    grids = [path for path in (run / "samples").glob("step_*.png") if int(path.stem.removeprefix("step_")) <= step]
    return dict(
        step=step,
        card=meta["card"],
        evaluated=evaluated[-1] if evaluated else {},
        grid=max(grids, key=lambda path: path.name, default=None),
    )


def _card(title: str, config: Config, classes: list[str], weights: str, known: dict) -> str:
    """The model card, in Markdown."""
    wavelet = " on Haar coefficients" if config.model.wavelet_scale else ""
    card, unknown = known["card"], config.data.path == UNKNOWN
    facts = {"images": f"{card['count']:,}"} if card else {}
    facts |= {key: card[key] for key in ("source", "split") if card.get(key)} | card.get("image", {})
    numbers = {k.removeprefix("eval/"): v for k, v in known["evaluated"].items() if k.startswith("eval/")}
    lines = "\n".join(f"- {name}: {value:.4g}" for name, value in numbers.items())
    return _CARD.format(
        title=title,
        network="JiT" if config.model.network == "jit" else f"U-ViT{wavelet}",
        size=config.data.image_size,
        channels=config.data.channels,
        classes=f" of {len(classes)} classes" if classes else "",
        version=maskdm_jax.__version__,
        trained="converted by" if unknown else f"trained on `{pathlib.PurePath(config.data.path).name}` by",
        grid="\n![Samples](samples.png)\n" if known["grid"] else "",
        training=UNTOLD if unknown else _stages(config, known["step"]),
        weights={"params": "the raw ones"}.get(weights, f"the average `{weights}`")
        + (f" of step {known['step']:,}" if known["step"] is not None else ""),
        process=config.diffusion.process,
        objective=config.diffusion.objective,
        data="\n".join(f"- {name}: {value}" for name, value in facts.items()) or "Not known.",
        numbers=f"\n## Numbers\n\nAt step {known['evaluated']['step']:,}:\n\n{lines}\n" if numbers else "",
    )


def _stages(config: Config, step: int | None) -> str:
    """A table of the stages that the weights have seen; step: of the run, None if all are done."""
    rows = ["| stage | steps | images per step | hidden patches | learning rate |", "|---|--:|--:|---|--:|"]
    for name in config.stages:
        stage = config.stage[name]
        done = stage.steps if step is None else min(step, stage.steps)
        if not done:
            break
        step = None if step is None else step - done
        plans = mask_plans(config, name)
        share = 1 - sum(plan.visible for plan in plans) / sum(plan.total for plan in plans)
        hidden = f"{share:.0%}, {stage.mask.kind}" if share else "none"
        hidden += ", which skip the inner blocks" if share and config.model.outer_blocks else ""
        rows.append(f"| {name} | {done:,} | {stage.batch_size} | {hidden} | {stage.learning_rate:g} |")
    return "\n".join(rows)
