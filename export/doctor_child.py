"""What `doctor` runs in a process of its own: `python -m export.doctor_child FOLDER DEVICE`, one word for each step.

The embedded model's last layers go the way that all packages go: compiled, written, checked, loaded, bound, and run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from export import build, order, regions
from export.build import Call
from export.manifest import TensorSpec
from export.regions import Inputs
from export.verify import random_inputs
from recipes.recipe import Recipe
from utils.errors import UserError
from utils.timing import synchronize


def main(folder: str, device_type: str) -> None:
    device = torch.device(device_type)
    pipe, library = order.pipeline("tiny", Recipe(execution="aoti"), Path(folder), device)
    (after,) = [packaged for packaged in library.packaged if packaged.region is regions.AFTER]
    inputs = _inputs(pipe.transformer.inner_dim, device)
    with after.unpackaged() as module:
        expected = module(**inputs)
        # By itself first: building a package reads its names, and so loads it. A crash there isn't the compiler's.
        build.compile_call(Call(after.region, module, inputs), library.options, embed_weights=False)
    print("compiled", flush=True)
    entry, _ = library.build([(after, inputs)], verified=False)  # step by step below, to tell which one fails
    (name,) = entry.manifest.models
    model = library.bound(after, entry, name, inputs)
    print("loaded", flush=True)
    output = model(inputs)
    synchronize(device)
    print("ran", flush=True)
    torch.testing.assert_close(output, expected, atol=1e-2, rtol=1e-2)
    print("right", flush=True)


def _inputs(width: int, device: torch.device) -> Inputs:
    shapes = {"hidden_states": (1, 16, width), "temb": (1, width)}
    strides = {name: regions.contiguous_strides(shape) for name, shape in shapes.items()}
    return random_inputs({name: TensorSpec(shapes[name], strides[name], "float32") for name in shapes}, device)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:  # it may advise of `doctor`, which this is
        raise error.__cause__ or error from None
