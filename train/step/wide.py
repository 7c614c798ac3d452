"""The float type of sums: float64, and float32 on devices that have no float64, such as Apple's GPU.

Sums in float32 lose digits of metrics, and nothing of the weights, which are float32 on every device.
"""

import torch

WITHOUT_FLOAT64 = ("mps",)


def wide(device: torch.device) -> torch.dtype:
    """Return the float type of sums on a device."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64
