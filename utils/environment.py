"""What a measurement was made with: machine, versions, commit, and the device's state before and after."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from utils.files import ROOT

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao", "nvidia-cudnn-frontend", "kernels")
_GPU_STATE = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "throttle_reasons": "clocks_event_reasons.active",
}


def capture(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Everything that doesn't change during a run. `commit` is for a tree without git, or with another's."""
    cuda = device.type == "cuda"
    versions = {name: version(name) for name in _PACKAGES}
    power_limit, driver = _query_gpu(("power.limit", "driver_version"), device) if cuda else (None, None)
    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "power_limit_w": power_limit,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        **versions,
        "python": platform.python_version(),
        "os": platform.platform(terse=True),
        **_git(commit),
    }


def device_state(device: torch.device) -> dict[str, Any]:
    """Clocks, temperature, power and throttle reasons of the GPU now; the load average of a CPU."""
    if device.type == "cuda":
        return dict(zip(_GPU_STATE, _query_gpu(tuple(_GPU_STATE.values()), device), strict=True))
    return {"load_average": os.getloadavg()[0]}


def machine_slug(environment: dict[str, Any]) -> str:
    """`h100-sxm-700w-torch2.11`, `cpu-2c-torch2.13`: the folder of a machine's results."""
    torch_version = ".".join(environment["torch"].split(".")[:2])
    if environment["device_type"] == "cpu":
        return f"cpu-{environment['cores']}c-torch{torch_version}"
    name = environment["device"].removeprefix("NVIDIA ").lower()
    model = re.sub(r"[^a-z0-9]+", "-", name.replace("80gb hbm3", "sxm")).strip("-")
    watts = "" if environment["power_limit_w"] is None else f"-{environment['power_limit_w']:.0f}w"
    return f"{model}{watts}-torch{torch_version}"


def cpu_name() -> str:
    """The processor's name and the widest instruction set PyTorch uses on it."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(commit: str | None) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    found = git("rev-parse", "HEAD") if commit is None else None
    if found is None:
        return {"commit": commit, "clean": None}
    # Results are written into the tree while it is measured: they don't make it another program.
    changes = git("status", "--porcelain", "--", ".", ":!results", ":!README.md")
    return {"commit": found, "clean": changes == ""}


def _query_gpu(fields: Sequence[str], device: torch.device) -> list[float | str | None]:
    """Values from nvidia-smi, all of one moment, numbers where they are; None where they can't be had."""
    # By UUID: nvidia-smi's indices know nothing of CUDA_VISIBLE_DEVICES.
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return [None] * len(fields)
    return [_value(text) for text in line.split(", ")]


def _value(text: str) -> float | str | None:
    if text.startswith("["):  # [N/A], [Not Supported]
        return None
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else text
