"""The hook that evaluates a run during training."""

import logging

from maskdm_jax.data.images import Framing
from maskdm_jax.evaluation.evaluate import Evaluator, check_comparable, compare
from maskdm_jax.evaluation.features import Images, open_images, sampled, transform
from maskdm_jax.sampling import in_memory

log = logging.getLogger(__name__)


class Evaluation:
    """Compares samples of the EMA with the run's reference, whose features are computed once."""

    def __init__(self, run):
        """Read weights and reference, so that errors occur before training. run: `training.loop.Run`."""
        self.every, self._run, settings = run.config.evaluation.every, run, run.config.evaluation
        self._evaluator = Evaluator(settings.metrics, settings.inception_weights, batch_size=min(64, settings.n))
        if settings.reference:
            reference = open_images(settings.reference)
            samples = Images("the samples", settings.n, card=run.data.card)
            check_comparable(reference, samples, settings.metrics)
        else:
            reference = transform(run.config.data.path, run.data.source, Framing.of(run.config.data))
        self._reference = self._evaluator.reference(reference)

    def __call__(self, at) -> None:
        """Write the metrics at a `training.loop.Moment`."""
        run, settings = self._run, self._run.config.evaluation
        loaded = in_memory(run, at.state.ema)
        images = sampled(loaded, settings.n, seed=run.config.seed, batch_size=self._evaluator.batch_size)
        values = compare(self._reference, self._evaluator.samples(images), settings.metrics)
        run.metrics.write(at.step, {f"eval/{name}": value for name, value in values.items()})
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("evaluation of %d samples of the EMA at step %d: %s", settings.n, at.step, text)
