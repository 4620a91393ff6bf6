"""Why packages can't be built or run on a machine, in words.

A small package is compiled, loaded and run in a child process, because what is wrong may well kill it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import one_line
from utils.files import ROOT

_SECONDS = 300  # for the child: a compiler that takes longer for so little hangs
# The child tells of each step once it is done: the last one told is the last one that worked.
_STEPS = ("compiled", "loaded", "ran", "right")


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do if that is wrong (None: it is as it should be)."""

    subject: str
    found: str
    remedy: str | None = None

    def __str__(self) -> str:
        mark, rest = ("ok", "") if self.remedy is None else ("WRONG", f": {self.remedy}")
        return f"{mark:5} {self.subject}: {self.found}{rest}"


def examine(device: torch.device) -> list[Finding]:
    """All findings, the package's own last; without a package's for a CUDA device that isn't there."""
    findings = [_torch(device), *_compiler(), _headers()]
    there = device.type != "cuda" or torch.cuda.is_available()
    return [*findings, _package(device)] if there else findings


def _torch(device: torch.device) -> Finding:
    found = f"{torch.__version__}, built for CUDA {torch.version.cuda}" if torch.version.cuda else torch.__version__
    gpu = shutil.which("nvidia-smi") is not None
    if device.type != "cuda" and (torch.cuda.is_available() or not gpu):
        return Finding("PyTorch", f"{found}, on the CPU")
    if torch.cuda.is_available():
        return Finding("PyTorch", f"{found}, on {torch.cuda.get_device_name(device)}")
    machine = f"this machine {'seems to have a GPU' if gpu else 'has no nvidia-smi'} and this PyTorch"
    if torch.version.cuda is None:
        remedy = "install a build of PyTorch for a CUDA version that the driver supports (nvidia-smi shows it)"
        return Finding("PyTorch", f"{found}; {machine} has no CUDA", remedy)
    remedy = "see that nvidia-smi lists the GPU, that its driver supports this CUDA, and what CUDA_VISIBLE_DEVICES says"
    return Finding("PyTorch", f"{found}; {machine} sees none", remedy)


def _compiler() -> list[Finding]:
    """The C++ compiler that AOTInductor takes, and whether what it links finds the libstdc++ that PyTorch has."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(shlex.split(name)[0])
    if path is None:
        remedy = "apt-get install g++, or set CXX to a C++ compiler that is there"
        return [Finding("C++ compiler", f"{name} is not there", remedy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
            source.write_text('#include <stdexcept>\nextern "C" void probe() { throw std::runtime_error("thrown"); }\n')
            subprocess.run(
                [*shlex.split(name), "-shared", "-fPIC", "-O1", "-o", str(library), str(source)],
                capture_output=True,
                text=True,
                check=True,
                timeout=_SECONDS,
            )
            needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        message = one_line(RuntimeError(error.stderr))
        return [Finding("C++ compiler", f"{name} can't make a shared library ({message})", "mend it, or set CXX")]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("C++ compiler", f"{name} can't be tried ({one_line(error)})", "mend it, or set CXX")]
    if "libstdc++" not in needed and "libc++" not in needed:
        return [
            Finding("C++ compiler", path),
            Finding(
                "C++ library",
                f"{name} links libstdc++ statically, and every package crashes when it is loaded beside PyTorch's own",
                "set CXX to a g++ that links it dynamically (such as CXX=g++-13), or remove -static-libstdc++ from it",
            ),
        ]
    return [Finding("C++ compiler", path), Finding("C++ library", "linked dynamically")]


def _headers() -> Finding:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    remedy = None if header.exists() else "apt-get install python3-dev"
    return Finding("Python's C headers", "there" if remedy is None else f"{header} is not there", remedy)


def _package(device: torch.device) -> Finding:
    subject = "a package of the transformer's last layers"
    with tempfile.TemporaryDirectory() as folder:
        # A compiler's cache of its own: what another compiler has made would hide what this one does wrong.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, "-m", "export.doctor_child", folder, device.type]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, cwd=ROOT)
        except subprocess.TimeoutExpired:
            return Finding(subject, f"was not done after {_SECONDS} s", "see what the compiler is doing")
    done = [step for step in _STEPS if step in child.stdout.split()]
    if child.returncode == 0 and done[-1:] == ["right"]:
        return Finding(subject, "compiled, loaded, run, and right")
    failed = _STEPS[len(done)]
    what = {"compiled": "compile", "loaded": "load", "ran": "run", "right": "compare"}[failed]
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        how = f"the process died of {name} at the step {what!r}"
    else:
        how = f"the step {what!r} failed ({_error(child.stderr)})"
    remedies = {
        "compiled": "mend what the message names: the compiler, the CUDA toolkit, or else PyTorch",
        "loaded": "the compiler's C++ library or CUDA doesn't go with PyTorch's: set CXX to another g++",
        "ran": "the compiled code doesn't go with this machine or its driver: remove CXXFLAGS and try another g++",
        "right": "the compiled code is wrong here: try another g++, and report it to PyTorch",
    }
    return Finding(subject, how, remedies[failed])


def _error(stderr: str) -> str:
    """The line of a child's traceback that says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower() or "Error" in line.split(":")[0]]
    return (telling or lines or ["no message"])[-1][:600]
