"""Sample images with PyTorch: python sample.py --n=16 --out=samples.png [--steps=50 --labels=3,7 --guidance=1.5]

The sampler and its settings are those of config.json unless flags change them. In Python, `generate` takes the starting
noise. This file needs torch, safetensors, numpy and pillow, and `modeling.py` beside it.
"""

import argparse
import math
import pathlib

import modeling
import numpy as np
import torch
from PIL import Image

HERE = pathlib.Path(__file__).parent


def wide(values, x):
    """[B] as [B, 1, 1, 1], to multiply images."""
    return torch.as_tensor(values, dtype=torch.float32, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


# --- Processes: what the network is told, and what its output means -----------------------------------


class Ddpm:
    """Discrete diffusion: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise, t = 0..T-1."""

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

    def told(self, x, t):
        return x, t

    def progress(self, t):
        return 1 - t / max(self.timesteps - 1, 1)

    def predictions(self, output, x, t: int, clip):
        """x0, clipped, and the noise, from the output at time step t."""
        root, rest = math.sqrt(self.alpha_bar[t]), math.sqrt(1 - self.alpha_bar[t])
        if self.objective == "noise":
            return clip((x - rest * output) / root), output
        x0 = clip(root * x - rest * output if self.objective == "v" else output)
        return x0, (x - root * x0) / rest


class Flow:
    """Flow matching: x_t = t x0 + (1 - t) noise, t = 0 (noise) to 1 (data)."""

    half_log_snr = (-5.0, 7.0)

    def __init__(self, c: dict):
        self.start, self.scale, self.predicts = c["flow"]["noise_scale"], c["time_scale"], c["objective"]

    def told(self, x, t):
        return x, self.scale * t

    def progress(self, t):
        return t

    def x0(self, output, x, t):
        return output if self.predicts == "x0" else x + wide(1 - t, x) * output

    def slope(self, output, x, t):
        return (output - x) / wide((1 - t).clamp(0.05), x) if self.predicts == "x0" else output

    def times(self, steps: int):
        return np.linspace(0, 1, steps + 1)

    def alpha_sigma_t(self, half_log_snr):
        t = 1 / (1 + np.exp(-half_log_snr) / self.start)
        return t, (1 - t) * self.start, t


class Edm:
    """EDM (Karras et al. 2022): x = x0 + sigma noise, with a preconditioned network; the time is sigma."""

    def __init__(self, c: dict):
        self.c, self.scale, self.start = c["edm"], c["time_scale"], c["edm"]["sigma_max"]
        self.half_log_snr = -math.log(self.start), -math.log(self.c["sigma_min"])
        self.ends = [self.c[name] ** (1 / self.c["rho"]) for name in ("sigma_max", "sigma_min")]

    def told(self, x, s):
        return x / wide((s**2 + self.c["sigma_data"] ** 2).sqrt(), x), self.scale * s.log() / 4

    def progress(self, s):
        return (self.ends[0] - s ** (1 / self.c["rho"])) / (self.ends[0] - self.ends[1])

    def x0(self, output, x, s):
        data = self.c["sigma_data"]
        total = (s**2 + data**2).sqrt()
        return wide(data**2 / total**2, x) * x + wide(s * data / total, x) * output

    def slope(self, output, x, s):
        return (x - self.x0(output, x, s)) / wide(s, x)

    def times(self, steps: int):
        return np.append(np.linspace(*self.ends, steps) ** self.c["rho"], 0.0)

    def alpha_sigma_t(self, half_log_snr):
        sigma = np.exp(-half_log_snr)
        return np.ones_like(sigma), sigma, sigma


PROCESSES = {"ddpm": Ddpm, "flow": Flow, "edm": Edm}

# --- Samplers: (predict, x, noise(i), process, settings, clip) -> x0 ------------------------------------


def each(x, t):
    """The time t for every image, as a tensor [B]."""
    return torch.full((len(x),), float(t), device=x.device)


def ddim(predict, x, noise, process, s, clip):
    """DDIM (Song et al. 2021); with eta = 1 over all steps, DDPM."""
    n, steps = process.timesteps, s["steps"]
    i = np.arange(steps + 1, dtype=np.float32)  # linspace(-1, n - 1) in float32 and from both ends, as PyTorch has it
    width = np.float32(n) / np.float32(steps)
    times = np.where(i < (steps + 1) // 2, width * i - 1, n - 1 - width * (steps - i)).astype(int)[::-1]
    for i, (t, after) in enumerate(zip(times[:-1], times[1:])):
        a, a_next = process.alpha_bar[t], process.alpha_bar[after] if after >= 0 else 1.0
        sigma = s["eta"] * math.sqrt((1 - a / a_next) * (1 - a_next) / (1 - a))
        x0, eps = process.predictions(predict(x, each(x, t)), x, t, clip)
        x = math.sqrt(a_next) * x0 + math.sqrt(max(1 - a_next - sigma**2, 0)) * eps + (sigma * noise(i) if sigma else 0)
    return x


def ddpm(predict, x, noise, process, s, clip):
    """Ancestral sampling over all time steps (Ho et al. 2020, algorithm 2)."""
    bar, betas = process.alpha_bar, process.betas
    for i, t in enumerate(range(process.timesteps - 1, -1, -1)):
        x0, _ = process.predictions(predict(x, each(x, t)), x, t, clip)
        before = bar[t - 1] if t else 1.0
        mean = (
            betas[t] * math.sqrt(before) / (1 - bar[t]) * x0 + (1 - before) * math.sqrt(1 - betas[t]) / (1 - bar[t]) * x
        )
        variance = betas[t] * (1 - before) / (1 - bar[t])
        x = mean + (math.sqrt(max(variance, 1e-20)) * noise(i) if t else 0)
    return x


def dpm_solver(predict, x, noise, process, s, clip):
    """DPM-Solver++ multistep (Lu et al. 2022), of order 1, 2 or 3."""
    half = lambda log_alpha: log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))
    if isinstance(process, Ddpm):
        known = 0.5 * np.log(process.alpha_bar.astype(np.float32).astype(np.float64))
        known = known[half(known) > -5.1]
        n = len(known)
        at = np.arange(1, n + 1) / n
        if s["spacing"] == "log_snr":
            wanted = -0.5 * np.logaddexp(0, -2 * np.linspace(*half(known[[-1, 0]]), s["steps"] + 1))
            t = np.interp(wanted, known[::-1], at[::-1])
        else:
            power = 2 if s["spacing"] == "time_quadratic" else 1
            t = np.linspace(1, n ** (-1 / power), s["steps"] + 1) ** power
        log_alpha = np.interp(t, at, known)
        alpha, sigma, t = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha)), process.timesteps * (t - 1 / n)
        levels = half(log_alpha)
    else:
        levels = np.linspace(*process.half_log_snr, s["steps"] + 1)
        alpha, sigma, t = process.alpha_sigma_t(levels)
        x = float(sigma[0]) * x
    earlier = []  # predictions of x0, newest first
    for i in range(s["steps"]):
        out, now = predict(x, each(x, t[i])), each(x, t[i])
        if isinstance(process, Ddpm):
            scaled = dict(noise=(x - sigma[i] * out) / alpha[i], v=alpha[i] * x - sigma[i] * out, x0=out)
            x0 = scaled[process.objective]
        else:
            x0 = process.x0(out, x, now)
        earlier = [clip(x0), *earlier[:2]]
        h = levels[i + 1] - levels[i]
        weights = multistep_weights(h, [levels[j] - levels[j - 1] for j in (i, i - 1) if j > 0], min(s["order"], i + 1))
        x = float(sigma[i + 1] / sigma[i]) * x
        x = x + sum(float(alpha[i + 1] * w) * m for w, m in zip(weights, earlier))
    return x


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
    times, steps, x = process.times(s["steps"]), s["steps"], process.start * x
    for i, (t, after) in enumerate(zip(times[:-1], times[1:])):
        if s["churn"]:
            within = s["churn_low"] <= t <= s["churn_high"]
            raised = t * (1 + within * min(s["churn"] / steps, math.sqrt(2) - 1))
            x, t = x + s["churn_scale"] * math.sqrt(raised**2 - t**2) * noise(i), raised
        slope = lambda x, t: process.slope(predict(x, each(x, t)), x, each(x, t))
        first = slope(x, t)
        there = x + (after - t) * first
        if s["method"] == "heun" and i < steps - 1:  # the last step is Euler's
            there = x + (after - t) * (first + slope(there, after)) / 2
        x = there
    return x


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm_solver": dpm_solver, "heun": ode, "euler": ode}


def generate(model, x, noise, labels=None, **settings):
    """Turn standard normal noise into images, uint8 [B, H, W, C].

    Args:
      model: from `modeling.from_pretrained`.
      x: starting noise, float32 of `noise_shape`.
      noise: step number -> standard normal noise of x's shape; samplers that are deterministic never call it.
      labels: class numbers [B], for a conditional model.
      settings: replace those of config.json's `sampling`, such as steps=20.
    """
    s, wavelet = model.config["sampling"] | settings, model.config["model"]["wavelet_scale"]
    process = PROCESSES[model.config["diffusion"]["process"]](model.config["diffusion"])
    channels = model.config["data"]["channels"]
    high = torch.ones(1, x.shape[1], 1, 1, device=x.device)
    if wavelet:
        high[:, :channels] = 3  # the approximation
    clip = lambda x0: torch.minimum(x0.clamp(min=-1), high)

    def predict(x, t):
        out = model(*process.told(x, t), labels)
        if not s["guidance"]:
            return out
        along = process.progress(t)
        acts = ((along > s["guidance_from"]) | (s["guidance_from"] == 0)) & (along < s["guidance_to"])
        always = (s["guidance_from"], s["guidance_to"]) == (0, 1)
        w = s["guidance"] if always else wide(s["guidance"] * acts, x)
        return (1 + w) * out - w * model(*process.told(x, t), None)

    with torch.no_grad():
        x0 = SAMPLERS[s["method"]](predict, x, noise, process, s, clip)
    image = from_haar(x0, channels) if wavelet else (x0.clamp(-1, 1) + 1) / 2
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def from_haar(x, channels: int):
    """Haar coefficients [B, 4C, h, w] to pixels in 0..1, [B, C, 2h, 2w]."""
    a, b, c, d = ((x[:, :channels] + 1) / 2, *x[:, channels:].split(channels, dim=1))
    rows = [
        torch.stack(pair, dim=-1).flatten(-2)
        for pair in ((a + b + c + d, a + b - c - d), (a - b + c - d, a - b - c + d))
    ]
    return torch.stack(rows, dim=-2).flatten(-3, -2) / 2


def noise_shape(model) -> tuple:
    """Channels, rows and columns of the starting noise."""
    size, channels = model.config["data"]["image_size"], model.config["data"]["channels"]
    return (4 * channels, size // 2, size // 2) if model.config["model"]["wavelet_scale"] else (channels, size, size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16, help="number of images")
    parser.add_argument("--out", default="samples.png", help="file of the grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", default="", help="class names or numbers to cycle through; default: all")
    parser.add_argument("--method", choices=SAMPLERS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = modeling.from_pretrained(HERE).to(args.device)
    classes, labels = model.config["classes"], None
    if classes:
        numbers = {str(i): i for i in range(len(classes))} | {name: i for i, name in enumerate(classes)}
        wanted = args.labels.split(",") if args.labels else list(classes)
        unknown = [name for name in wanted if name not in numbers]
        if unknown:
            parser.error(f"unknown labels {unknown}; the classes are {classes}")
        labels = torch.tensor([numbers[wanted[i % len(wanted)]] for i in range(args.n)], device=args.device)
    draw = torch.Generator(args.device).manual_seed(args.seed)
    noise = lambda *_: torch.randn(args.n, *noise_shape(model), generator=draw, device=args.device)
    chosen = {name: getattr(args, name) for name in ("method", "steps", "guidance")}
    images = generate(model, noise(), noise, labels, **{k: v for k, v in chosen.items() if v is not None})
    columns = math.ceil(math.sqrt(args.n))
    padded = np.pad(images, ((0, -args.n % columns), (0, 0), (0, 0), (0, 0)))
    rows = [np.concatenate(list(row), axis=1) for row in padded.reshape(-1, columns, *images.shape[1:])]
    grid = np.concatenate(rows)
    Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(args.out)
    print(f"{args.n} images in {args.out}")


if __name__ == "__main__":
    main()
