"""What in a trace can't be trusted, and which parts of the report are left blank for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trace_analysis.device import GRAPH_LAUNCH, KERNEL_LAUNCH, Device, calls_named
from trace_analysis.load import GPU, NONE, Trace
from trace_analysis.steps import DENOISING_LOOP, host_ranges

# Parts of a report that a finding can make unreliable.
STEPS, GAPS, SYNCS, RATES, KERNELS = "steps", "gaps", "syncs", "rates", "kernels"
_CAPTURE = re.compile(r"cu(da)?Stream(Begin|End)Capture")


@dataclass(frozen=True)
class Finding:
    """name: stable, for programs; message: one line; unreliable: the parts of the report that are left blank."""

    name: str
    message: str
    unreliable: tuple[str, ...] = ()


def findings(trace: Trace, device: Device | None, steps: np.ndarray, marker: str) -> tuple[Finding, ...]:
    """All that is wrong with a trace; `steps`: the events of the range `marker`."""
    checks: list[Callable[[], Finding | None]] = [
        lambda: _incomplete(trace),
        lambda: _skipped(trace),
        lambda: _no_ranges(trace, steps, marker),
        lambda: _overlapping(trace, steps, marker),
    ]
    if device is not None:
        checks += [
            lambda: _clock_skew(trace, device),
            lambda: _without_launch(trace, device),
            lambda: _without_kernel(trace),
            lambda: _empty_graphs(trace),
            lambda: _properties(trace, device),
            lambda: _other_devices(device),
        ]
    return tuple(found for check in checks if (found := check()) is not None)


def _incomplete(trace: Trace) -> Finding | None:
    if trace.incomplete is None:
        return None
    message = f"the file is incomplete, {trace.incomplete}; the report is of these {len(trace)} events with a duration"
    # Kineto writes the host's events before the GPU's: the last steps' kernels are what is missing.
    gpu = trace.has_gpu or bool(trace.properties.get("deviceProperties"))
    return Finding("incomplete", message, (STEPS, GAPS, SYNCS, RATES, KERNELS) if gpu else ())


def _skipped(trace: Trace) -> Finding | None:
    if not trace.skipped:
        return None
    message = f"{trace.skipped} events with a duration can't be read (no name, or a time out of range) and are left out"
    return Finding("unreadable_events", message, (STEPS, GAPS, SYNCS, RATES))


def _no_ranges(trace: Trace, steps: np.ndarray, marker: str) -> Finding | None:
    if len(steps):
        return None
    another = "--step-marker names another"
    if len(host_ranges(trace, DENOISING_LOOP)):
        another = f"its denoising loop is one range: --step-marker {DENOISING_LOOP}"
    return Finding("no_steps", f"no range {marker}: no single steps are reported ({another})")


def _overlapping(trace: Trace, steps: np.ndarray, marker: str) -> Finding | None:
    overlaps = int((trace.start[steps[1:]] < np.maximum.accumulate(trace.end[steps])[:-1]).sum()) if len(steps) else 0
    if not overlaps:
        return None
    message = f"{overlaps} ranges {marker} begin before the one before has ended"
    return Finding("overlapping_steps", message, (STEPS, GAPS, SYNCS, RATES))


def _clock_skew(trace: Trace, device: Device) -> Finding | None:
    """A kernel can't begin before the call that launches it."""
    known = device.launch != NONE
    early = trace.start[device.launch[known]] - trace.start[device.event[known]]
    if not len(early) or early.max() <= 0:
        return None
    count, worst = int((early > 0).sum()), int(early.max())
    message = f"clock skew: {count} kernels begin before their launch, by up to {worst / 1000:.3f} us"
    return Finding("clock_skew", message, (GAPS, SYNCS))


def _without_launch(trace: Trace, device: Device) -> Finding | None:
    missing = int((device.launch == NONE).sum())
    if not missing:
        return None
    # A few at the beginning were launched before the profiler began; many mean dropped records.
    message = f"{missing} of {len(device.launch)} kernels and copies have no launch in the trace: no step holds them"
    return Finding("no_launch", message, (STEPS, GAPS, RATES, KERNELS) if missing > len(device.launch) // 100 else ())


def _without_kernel(trace: Trace) -> Finding | None:
    """Every launch runs a kernel, unless it is recorded into a CUDA graph."""
    launches = calls_named(trace, KERNEL_LAUNCH)
    launches = launches[trace.correlation[launches] != NONE]
    empty = _without_work(trace, launches)
    if not empty or len(calls_named(trace, _CAPTURE)):
        return None
    message = f"{empty} of {len(launches)} kernel launches have no kernel in the trace: records were dropped"
    return Finding("dropped_kernels", message, (STEPS, GAPS, RATES, KERNELS) if empty > len(launches) // 100 else ())


def _empty_graphs(trace: Trace) -> Finding | None:
    launches = calls_named(trace, GRAPH_LAUNCH)
    empty = _without_work(trace, launches)
    if not empty:
        return None
    message = f"{empty} of {len(launches)} CUDA graph launches have no kernels in the trace: records were dropped"
    return Finding("graph_without_kernels", message, (STEPS, GAPS, RATES, KERNELS))


def _without_work(trace: Trace, launches: np.ndarray) -> int:
    """How many of these calls left nothing on any GPU."""
    return int((~np.isin(trace.correlation[launches], trace.correlation[trace.of(GPU)])).sum())


def _properties(trace: Trace, device: Device) -> Finding | None:
    properties = trace.properties.get("deviceProperties")
    entries = [entry for entry in properties if isinstance(entry, dict)] if isinstance(properties, list) else []
    if any(entry.get("id") == device.number and isinstance(entry.get("name"), str) for entry in entries):
        return None
    return Finding("no_device_properties", "the trace doesn't say which GPU it is of: no rates against its peak")


def _other_devices(device: Device) -> Finding | None:
    if not device.others:
        return None
    others = ", ".join(map(str, device.others))
    return Finding("several_devices", f"only the busiest GPU, {device.number}, is reported; {others} left out")
