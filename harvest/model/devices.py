"""The devices a language model runs on: by name, spread over several by a device map, and the name of the hardware.

Device maps are accelerate's: `auto` fills the GPUs in order, then the CPU's memory, then the disk, so a model may be
larger than any of them. Layers that are not kept on a GPU are copied to it in each pass, which costs the transfer.
"""

import json
import platform
from dataclasses import dataclass
from typing import Any

import torch

from gsae.errors import UsageError
from gsae.harvest.hub import one_line

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Placement:
    """Where a model runs: on `device`, or spread by `device_map`, as it was given; spread: the same for accelerate."""

    device: torch.device
    device_map: str | None = None
    spread: str | dict[str, Any] | None = None


def place(device: str, device_map: str | None) -> Placement:
    """Return where a model runs. Raises UsageError if the device or the map cannot be used."""
    return Placement(check_device(device), device_map, None if device_map is None else parse_device_map(device_map))


def accelerator(device: torch.device) -> str:
    """Return the name of the hardware; matrix products round in the same way on hardware of equal name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def check_device(name: str) -> torch.device:
    """Return a device of torch, "auto" for a GPU if there is one. Raises UsageError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"Device {name!r} cannot be used: {one_line(error)}.") from None
    return device


def parse_device_map(text: str) -> str | dict[str, Any]:
    """Return one of accelerate's names, or the JSON object in `text`; raises UsageError for anything else."""
    if text in DEVICE_MAPS:
        return text
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict) or not given or not all(isinstance(d, (str, int)) for d in given.values()):
        known = ", ".join(DEVICE_MAPS)
        raise UsageError(f'Device map {text!r}: give {known}, or a JSON object of devices, such as {{"": "cuda:0"}}.')
    for device in set(given.values()) - {"disk"}:
        check_device(f"cuda:{device}" if isinstance(device, int) else device)
    return given


def compute_devices(model: Any) -> set[torch.device]:
    """Return the devices that a spread model computes on."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    found = {torch.device(d) for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None}
    return found or {parameter.device for parameter in model.parameters()}
