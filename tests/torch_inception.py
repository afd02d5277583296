"""FID's Inception network in PyTorch, from pixels to features, as the usual tool computes them."""

import numpy as np
import torch
from torch.nn import functional as F


def features(state_dict, images) -> torch.Tensor:
    """images: uint8 [n, H, W, 3] -> float32 [n, 2048]."""
    weights = {name: torch.tensor(np.asarray(value)) for name, value in state_dict.items()}

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var = weights[f"{name}.bn.running_mean"], weights[f"{name}.bn.running_var"]
        return F.relu(F.batch_norm(x, mean, var, weights[f"{name}.bn.weight"], weights[f"{name}.bn.bias"], eps=1e-3))

    def chain(x, name, *paddings, first=1):
        for i, padding in enumerate(paddings, first):
            x = conv(x, f"{name}_{i}", padding=padding)
        return x

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    x = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2).float() / 255
    x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five, three = chain(x, f"{name}.branch5x5", 0, 2), chain(x, f"{name}.branch3x3dbl", 0, 1, 1)
        x = torch.cat([conv(x, f"{name}.branch1x1"), five, three, conv(average(x), f"{name}.branch_pool")], 1)
    name = "Mixed_6a"
    double = conv(chain(x, f"{name}.branch3x3dbl", 0, 1), f"{name}.branch3x3dbl_3", 2)
    x = torch.cat([conv(x, f"{name}.branch3x3", 2), double, F.max_pool2d(x, 3, 2)], 1)
    row, column = (0, 3), (3, 0)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        single = chain(x, f"{name}.branch7x7", 0, row, column)
        double = chain(x, f"{name}.branch7x7dbl", 0, column, row, column, row)
        x = torch.cat([conv(x, f"{name}.branch1x1"), single, double, conv(average(x), f"{name}.branch_pool")], 1)
    name = "Mixed_7a"
    three = conv(conv(x, f"{name}.branch3x3_1"), f"{name}.branch3x3_2", 2)
    seven = conv(chain(x, f"{name}.branch7x7x3", 0, row, column), f"{name}.branch7x7x3_4", 2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    for name, pool in (("Mixed_7b", average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        one = conv(x, f"{name}.branch3x3_1")
        two = chain(x, f"{name}.branch3x3dbl", 0, 1)
        parts = [conv(x, f"{name}.branch1x1")]
        for y, layer in ((one, "branch3x3_2"), (two, "branch3x3dbl_3")):
            parts += [conv(y, f"{name}.{layer}a", padding=(0, 1)), conv(y, f"{name}.{layer}b", padding=(1, 0))]
        x = torch.cat([*parts, conv(pool(x), f"{name}.branch_pool")], 1)
    return x.mean((2, 3))
