"""Sample images with PyTorch: python sample.py --n=16 --out=grid.png [--steps=50 --labels=3,7 --guidance=1.5]

The sampler and its settings are those of config.json unless flags change them. Image number i of a seed is the same
image for any --n. This file needs torch, safetensors, numpy and pillow, and `modeling.py` beside it.
"""

import argparse
import functools
import math
import pathlib

import modeling
import numpy as np
import torch
from PIL import Image

HERE = pathlib.Path(__file__).parent

# --- Processes: the inputs of the network and the meaning of its output. All images have the same time t ----


class Ddpm:
    """Discrete diffusion: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise, t = 0..T-1."""

    samplers = ("ddim", "ddpm", "dpm_solver")

    def __init__(self, c: dict):
        n, self.objective = c["timesteps"], c["objective"]
        if c["schedule"] == "linear":
            self.betas = np.linspace(0.1 / n, 20 / n, n)
        else:  # cosine; shifted for larger images
            odds = (64 / (c["shift_size"] if c["schedule"] == "shifted_cosine" else 64)) ** 2
            a = np.cos((np.linspace(0, 1, n + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
            a = odds * a / (1 + (odds - 1) * a)
            self.betas = np.clip(1 - a[1:] / a[:-1], 0, 0.999)
        self.alpha_bar = np.cumprod(1 - self.betas)
        self.timesteps = n

    def network_inputs(self, x, t):
        return x, t

    def progress(self, t):
        return 1 - t / max(self.timesteps - 1, 1)

    def x0(self, output, x, t, alpha, sigma):
        """The clean image, from the output for x = alpha x0 + sigma noise."""
        return {"noise": (x - sigma * output) / alpha, "v": alpha * x - sigma * output, "x0": output}[self.objective]

    def predictions(self, output, x, t: int, clip):
        """The clean image, clipped, and the noise, from the output at time step t."""
        alpha, sigma = math.sqrt(self.alpha_bar[t]), math.sqrt(1 - self.alpha_bar[t])
        x0 = clip(self.x0(output, x, t, alpha, sigma))
        return x0, output if self.objective == "noise" else (x - alpha * x0) / sigma


class Flow:
    """Flow matching: x_t = t x0 + (1 - t) noise, t = 0 (noise) to 1 (data)."""

    samplers = ("heun", "euler", "dpm_solver")
    half_log_snr = (-5.0, 7.0)

    def __init__(self, c: dict):
        self.start, self.scale, self.predicts = c["flow"]["noise_scale"], c["time_scale"], c["objective"]

    def network_inputs(self, x, t):
        return x, self.scale * t

    def progress(self, t):
        return t

    def x0(self, output, x, t, *_):
        return output if self.predicts == "x0" else x + (1 - t) * output

    def slope(self, output, x, t):
        return (output - x) / max(1 - t, 0.05) if self.predicts == "x0" else output

    def times(self, steps: int):
        return np.linspace(0, 1, steps + 1)

    def alpha_sigma_t(self, half_log_snr):
        t = 1 / (1 + np.exp(-half_log_snr) / self.start)
        return t, (1 - t) * self.start, t


class Edm:
    """EDM (Karras et al. 2022): x = x0 + sigma noise, with a preconditioned network; the time is sigma."""

    samplers = ("heun", "euler", "dpm_solver")

    def __init__(self, c: dict):
        self.data, self.rho, self.scale = c["edm"]["sigma_data"], c["edm"]["rho"], c["time_scale"]
        self.start, self.end = c["edm"]["sigma_max"], c["edm"]["sigma_min"]
        self.half_log_snr = -math.log(self.start), -math.log(self.end)
        self.ends = self.start ** (1 / self.rho), self.end ** (1 / self.rho)

    def network_inputs(self, x, s):
        return x / math.sqrt(s**2 + self.data**2), self.scale * math.log(s) / 4

    def progress(self, s):
        return (self.ends[0] - s ** (1 / self.rho)) / (self.ends[0] - self.ends[1])

    def x0(self, output, x, s, *_):
        total = s**2 + self.data**2
        return self.data**2 / total * x + s * self.data / math.sqrt(total) * output

    def slope(self, output, x, s):
        return (x - self.x0(output, x, s)) / s

    def times(self, steps: int):
        return np.append(np.linspace(*self.ends, steps) ** self.rho, 0.0)

    def alpha_sigma_t(self, half_log_snr):
        sigma = np.exp(-half_log_snr)
        return np.ones_like(sigma), sigma, sigma


PROCESSES = {"ddpm": Ddpm, "flow": Flow, "edm": Edm}

# --- Samplers: (predict, x, noise(i), process, settings, clip) -> x0 ------------------------------------


def ddim(predict, x, noise, process, s, clip):
    """DDIM (Song et al. 2021); with eta = 1 over all steps, DDPM."""
    n, steps = process.timesteps, s["steps"]
    i = np.arange(steps + 1, dtype=np.float32)  # linspace(-1, n - 1) in float32 and from both ends, as PyTorch has it
    width = np.float32(n) / np.float32(steps)
    times = np.where(i < (steps + 1) // 2, width * i - 1, n - 1 - width * (steps - i)).astype(int)[::-1]
    for i, (t, after) in enumerate(zip(times[:-1], times[1:])):
        a, a_next = process.alpha_bar[t], process.alpha_bar[after] if after >= 0 else 1.0
        sigma = s["eta"] * math.sqrt((1 - a / a_next) * (1 - a_next) / (1 - a))
        x0, eps = process.predictions(predict(x, t), x, t, clip)
        x = math.sqrt(a_next) * x0 + math.sqrt(max(1 - a_next - sigma**2, 0)) * eps + (sigma * noise(i) if sigma else 0)
    return x


def ddpm(predict, x, noise, process, s, clip):
    """Ancestral sampling over all time steps (Ho et al. 2020, algorithm 2)."""
    bar, betas = process.alpha_bar, process.betas
    for i, t in enumerate(range(process.timesteps - 1, -1, -1)):
        x0, _ = process.predictions(predict(x, t), x, t, clip)
        before = bar[t - 1] if t else 1.0
        mean = (
            betas[t] * math.sqrt(before) / (1 - bar[t]) * x0 + (1 - before) * math.sqrt(1 - betas[t]) / (1 - bar[t]) * x
        )
        variance = betas[t] * (1 - before) / (1 - bar[t])
        x = mean + (math.sqrt(max(variance, 1e-20)) * noise(i) if t else 0)
    return x


def dpm_solver(predict, x, noise, process, s, clip):
    """DPM-Solver++ multistep (Lu et al. 2022), of order 1, 2 or 3."""
    if isinstance(process, Ddpm):
        alpha, sigma, t = ddpm_levels(process, s)
    else:
        alpha, sigma, t = process.alpha_sigma_t(np.linspace(*process.half_log_snr, s["steps"] + 1))
        x = float(sigma[0]) * x
    levels, earlier = np.log(alpha / sigma), []  # predictions of x0, newest first
    for i in range(s["steps"]):
        now = float(t[i]), float(alpha[i]), float(sigma[i])
        earlier = [clip(process.x0(predict(x, now[0]), x, *now)), *earlier[:2]]
        before = [levels[j] - levels[j - 1] for j in (i, i - 1) if j > 0]
        weights = multistep_weights(levels[i + 1] - levels[i], before, min(s["order"], i + 1))
        x = float(sigma[i + 1] / sigma[i]) * x
        x = x + sum(float(alpha[i + 1] * w) * x0 for w, x0 in zip(weights, earlier))
    return x


def ddpm_levels(process: Ddpm, s: dict):
    """alpha, sigma and (fractional) time steps, [steps + 1] each; between time steps, log(alpha) is interpolated."""
    half = lambda log_alpha: log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))  # log(alpha / sigma)
    known = 0.5 * np.log(process.alpha_bar.astype(np.float32).astype(np.float64))
    known = known[half(known) > -5.1]  # noisier time steps hardly determine x0
    n = len(known)
    at = np.arange(1, n + 1) / n
    if s["spacing"] == "log_snr":
        wanted = -0.5 * np.logaddexp(0, -2 * np.linspace(*half(known[[-1, 0]]), s["steps"] + 1))
        t = np.interp(wanted, known[::-1], at[::-1])
    else:
        power = 2 if s["spacing"] == "time_quadratic" else 1
        t = np.linspace(1, n ** (-1 / power), s["steps"] + 1) ** power
    log_alpha = np.interp(t, at, known)
    return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha)), process.timesteps * (t - 1 / n)


def multistep_weights(h: float, before: list, order: int):
    """Weights of the newest predictions of x0; `before` are the widths of the earlier steps, newest first."""
    phi1 = np.expm1(-h)
    weights = np.array([-phi1, 0.0, 0.0])
    if order > 1:
        r0 = before[0] / h
        first = np.array([1.0, -1.0, 0.0]) / r0
    if order == 2:
        weights -= 0.5 * phi1 * first
    if order == 3:
        r1 = before[1] / h
        second = (first - np.array([0.0, 1.0, -1.0]) / r1) / (r0 + r1)
        phi2 = phi1 / h + 1
        weights += phi2 * (first + r0 * second) - (phi2 / h - 0.5) * second
    return weights


def ode(predict, x, noise, process, s, clip):
    """Euler's or Heun's method for flow matching and EDM, with EDM's churn."""
    times, steps, x = process.times(s["steps"]).tolist(), s["steps"], process.start * x
    slope = lambda x, t: process.slope(predict(x, t), x, t)
    for i, (t, after) in enumerate(zip(times[:-1], times[1:])):
        if s["churn"]:
            within = s["churn_low"] <= t <= s["churn_high"]
            raised = t * (1 + within * min(s["churn"] / steps, math.sqrt(2) - 1))
            x, t = x + s["churn_scale"] * math.sqrt(raised**2 - t**2) * noise(i), raised
        first = slope(x, t)
        there = x + (after - t) * first
        if s["method"] == "heun" and i < steps - 1:  # the last step is Euler's
            there = x + (after - t) * (first + slope(there, after)) / 2
        x = there
    return x


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm_solver": dpm_solver, "heun": ode, "euler": ode}

# --- Images ---------------------------------------------------------------------------------------------


def generate(model, n: int, labels=None, seed: int = 0, batch_size: int = 64, **settings) -> np.ndarray:
    """Draw images 0..n-1 of a seed, uint8 [n, H, W, C].

    Args:
      model: from `modeling.from_pretrained`, on any device.
      labels: a class, by number or name, or several to cycle through; None means all of a conditional model.
      settings: replace those of config.json's `sampling`, such as steps=20 or guidance=1.5.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    labels, device = class_numbers(model.config["classes"], labels), next(model.parameters()).device
    images = []
    for start in range(0, n, batch_size):
        numbers = range(start, min(start + batch_size, n))
        draws = [np.random.default_rng((seed, i)) for i in numbers]
        noise = functools.partial(draw_noise, draws, noise_shape(model), device)
        chosen = None if labels is None else torch.tensor([labels[i % len(labels)] for i in numbers], device=device)
        images.append(from_noise(model, noise(), noise, chosen, **settings))
    return np.concatenate(images)


def draw_noise(draws, shape: tuple, device, step=0):
    """Noise for a batch, from a generator for each image."""
    return torch.from_numpy(np.stack([draw.standard_normal(shape, np.float32) for draw in draws])).to(device)


def from_noise(model, x, noise, labels=None, **settings) -> np.ndarray:
    """Turn standard normal noise [B, *noise_shape] into images, uint8 [B, H, W, C].

    Args:
      noise: step number -> noise of x's shape; deterministic samplers never call it.
      labels: class numbers [B], for a conditional model.
    """
    s, wavelet = checked(model.config, settings), model.config["model"]["wavelet_scale"]
    process = PROCESSES[model.config["diffusion"]["process"]](model.config["diffusion"])
    if wavelet and labels is None and model.config["model"]["num_classes"]:
        raise ValueError("labels is None; a wavelet model with classes has no token for that: give class numbers")
    high = torch.ones(1, x.shape[1], 1, 1, device=x.device)
    if wavelet:
        high[:, : x.shape[1] // 4] = 3  # the approximation
    clip = lambda x0: torch.minimum(x0.clamp(min=-1), high)

    def predict(x, t):
        scaled, time = process.network_inputs(x, t)
        time = torch.full((len(x),), time, device=x.device)
        out, along = model(scaled, time, labels), np.float32(process.progress(t))
        low, high = np.float32(s["guidance_from"]), np.float32(s["guidance_to"])
        if not s["guidance"] or not ((along > low or low == 0) and (along < high or high == 1)):
            return out
        return (1 + s["guidance"]) * out - s["guidance"] * model(scaled, time, None)

    with torch.no_grad():
        x0 = SAMPLERS[s["method"]](predict, x, noise, process, s, clip)
    image = from_haar(x0) if wavelet else (x0.clamp(-1, 1) + 1) / 2
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def checked(config: dict, settings: dict) -> dict:
    """The sampling settings, with changes."""
    unknown = settings.keys() - config["sampling"].keys()
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; there are {sorted(config['sampling'])}")
    s, diffusion = config["sampling"] | settings, config["diffusion"]
    fitting = PROCESSES[diffusion["process"]].samplers
    if s["method"] not in fitting:
        raise ValueError(f"method is {s['method']!r}; the process {diffusion['process']} has {', '.join(fitting)}")
    most = diffusion["timesteps"] if diffusion["process"] == "ddpm" else math.inf
    if not 1 <= s["steps"] <= most:
        raise ValueError(f"steps is {s['steps']}; it must be 1 to {most}")
    if s["guidance"] and s["weak"] != "unlabelled":
        raise ValueError(f"weak is {s['weak']!r}; with guidance, it must be 'unlabelled' here")
    if s["guidance"] and not config["guidable"]:
        raise ValueError("guidance needs a network that was also trained without labels")
    return s


def class_numbers(classes: list, labels) -> list | None:
    """Numbers of the classes to cycle through."""
    labels = [labels] if isinstance(labels, int | str) else labels
    if not classes:
        if labels:
            raise ValueError("the network has no classes; leave labels out")
        return None
    number = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    unknown = [label for label in labels or () if str(label) not in number]
    if unknown:
        raise ValueError(f"unknown labels {unknown}; the classes are {classes}")
    return [number[str(label)] for label in labels] if labels else list(range(len(classes)))


def from_haar(x):
    """Haar coefficients [B, 4C, h, w] to pixels in 0..1, [B, C, 2h, 2w]."""
    a, b, c, d = x.chunk(4, dim=1)
    a = (a + 1) / 2
    pixels = torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], dim=2) / 2
    return torch.nn.functional.pixel_shuffle(pixels.flatten(1, 2), 2)


def noise_shape(model) -> tuple:
    """Channels, rows and columns of the starting noise."""
    size, channels = model.config["data"]["image_size"], model.config["data"]["channels"]
    return (4 * channels, size // 2, size // 2) if model.config["model"]["wavelet_scale"] else (channels, size, size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16, help="number of images")
    parser.add_argument("--out", default="grid.png", help="file of the grid of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", default="", help="class names or numbers to cycle through; default: all")
    parser.add_argument("--method", choices=SAMPLERS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    settings = {
        name: getattr(args, name) for name in ("method", "steps", "guidance") if getattr(args, name) is not None
    }
    model = modeling.from_pretrained(HERE).to(args.device)
    try:
        images = generate(model, args.n, args.labels.split(",") if args.labels else None, args.seed, **settings)
    except ValueError as error:
        parser.error(str(error))
    columns = math.ceil(math.sqrt(args.n))
    scale = -(-64 // images.shape[1])  # small images are enlarged to at least 64 pixels
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    padded = np.pad(images, ((0, -args.n % columns), (0, 0), (0, 0), (0, 0)))
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in padded.reshape(-1, columns, *images.shape[1:])])
    Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(args.out)
    print(f"{args.n} images in {args.out}")


if __name__ == "__main__":
    main()
