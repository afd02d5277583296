"""Classify the demo's samples: do they show the requested digits?

    python benchmarks/demo_quality.py --run=runs/demo [--n=1000]

Trains a logistic regression on half of the real digits. Prints its accuracy and its mean top probability on the other
half and on samples of the run as JSON; `ratio` is the ratio of the two probabilities. A good demo reaches an accuracy
and a ratio of 0.85. Needs scikit-learn (`pip install -e .[test]`).
"""

import argparse
import json

import numpy as np
from sklearn.linear_model import LogisticRegression

from maskdm_jax import sampling
from maskdm_jax.data.sources import Digits


def classifier(seed: int = 0):
    """Logistic regression on a random half of the digits, and the other half as (pixels, labels)."""
    source = Digits(labels=True)
    images, labels = zip(*(source.read(i) for i in range(len(source))), strict=True)
    pixels, labels = pixels_of(np.stack(images)), np.array(labels)
    order = np.random.RandomState(seed).permutation(len(labels))
    train, test = np.split(order, [len(order) // 2])
    model = LogisticRegression(max_iter=2000).fit(pixels[train], labels[train])
    return model, (pixels[test], labels[test])


def pixels_of(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 8, 8, 1] -> float [n, 64] in 0..1."""
    return images.reshape(len(images), -1) * (1 / 255)


def score(model, pixels, labels) -> dict:
    """Accuracy and mean top probability."""
    probabilities = model.predict_proba(pixels)
    return {
        "accuracy": float((probabilities.argmax(1) == labels).mean()),
        "top_probability": float(probabilities.max(1).mean()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="run folder or checkpoint of the demo")
    parser.add_argument("--n", type=int, default=1000, help="samples")
    parser.add_argument("--seed", type=int, default=1, help="of the samples' noise")
    args = parser.parse_args()
    loaded = sampling.load(args.run)
    labels = np.arange(args.n) % 10
    images = loaded.sample(args.n, seed=args.seed, batch_size=500)
    model, (pixels, truth) = classifier()
    real, samples = score(model, pixels, truth), score(model, pixels_of(images), labels)
    ratio = samples["top_probability"] / real["top_probability"]
    print(json.dumps({"real": real, "samples": samples, "ratio": ratio, "checkpoint": str(loaded.checkpoint)}))


if __name__ == "__main__":
    main()
