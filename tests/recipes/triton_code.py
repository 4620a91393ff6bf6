"""Reads the Triton kernels that Inductor writes."""

from __future__ import annotations

import re

_KERNEL = re.compile(r"^def (triton_\w+)\(.*\):\n((?:    .*\n|\n)+)", re.MULTILINE)
_ACCESS = re.compile(r"tl\.(load|store)\((\w+)")
# A reduction over a row waits for all warps that share the row, as a barrier does.
_WAITS = re.compile(r"debug_barrier\(|tl\.sum\(|tl\.reduce\(|\.max2\(|\.min2\(|\.prod\(|\.any\(|\.welford\(")


def reading_back(code: str) -> list[str]:
    """The kernels in `code` that load from memory which they stored to, with nothing between that waits for the stores.

    Triton may have another warp load than the one that stored (triton-lang/triton issue 10924), and PyTorch 2.11 to
    2.13 put no barrier there (pytorch/pytorch issue 190517): such a kernel now and then reads what was there before.

    Raises:
        ValueError: there is no kernel.
    """
    kernels = _KERNEL.findall(code)
    if not kernels:
        raise ValueError("no Triton kernel in this code, or none that is recognised")
    found = []
    for name, body in kernels:
        stored: set[str] = set()
        for line in body.splitlines():
            if _WAITS.search(line):
                stored.clear()
            for what, pointer in _ACCESS.findall(line):
                if what == "store":
                    stored.add(pointer)
                elif pointer in stored:
                    found.append(f"{name} reads {pointer}")
    return found
