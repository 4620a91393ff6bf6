"""The command that builds a package which a pipeline's call lacks.

The regions see the call's sizes but in part, and nothing of some where prompt and position ids are hoisted out of the
step. So they are read where all are known: at the transformer's call, before anything is hoisted.
"""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from export import build, regions, text_encoders
from export.regions import Inputs, Region
from recipes import hoisting, ladder
from utils.request import MULTIPLE, Request

if TYPE_CHECKING:
    from export.runtime import Library


@dataclass(frozen=True)
class Sizes:
    """A pipeline's call to come. resolution: HEIGHTxWIDTH in pixels; image_size: the same of the image to edit, as far
    as it makes tokens."""

    resolution: str
    text_tokens: int
    batch: int
    image_size: str | None

    @classmethod
    def of(cls, request: Request) -> Sizes:
        image = request.open_image() if request.image is not None else None
        sides = None if image is None else (side // MULTIPLE * MULTIPLE for side in reversed(image.size))
        size = None if sides is None else "x".join(map(str, sides))
        return cls(f"{request.height}x{request.width}", request.max_sequence_length, request.batch, size)


@dataclass(frozen=True)
class TransformerCall:
    """What the sizes of a pipeline's call are read from. A latent is `pixels` pixels a side, a token 2 x 2 latents.

    img_ids [image tokens, 3]: of each token a mark, row and column; the mark is 0 but for the image that Kontext edits.
    """

    batch: int
    image_tokens: int
    text_tokens: int
    img_ids: torch.Tensor
    pixels: int

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any], pixels: int) -> TransformerCall | None:
        """None of a call by hand, with what is hoisted already."""
        named = hoisting.by_name(args, kwargs)
        text, ids = named.get("encoder_hidden_states"), named.get("img_ids")
        if text is None or ids is None:
            return None
        batch, image_tokens = named["hidden_states"].shape[:2]
        return cls(batch, image_tokens, text.shape[1], ids, pixels)

    @property
    def resolution(self) -> str:
        """HEIGHTxWIDTH in pixels of what is drawn."""
        return self._extent(self.img_ids[self.img_ids[:, 0] == 0])

    @property
    def image_size(self) -> str | None:
        """HEIGHTxWIDTH in pixels of the image to edit, as far as it makes tokens; None without one."""
        marked = self.img_ids[self.img_ids[:, 0] != 0]
        return self._extent(marked) if len(marked) else None

    def _extent(self, ids: torch.Tensor) -> str:
        return "x".join(str((last + 1) * 2 * self.pixels) for last in ids[:, 1:].amax(dim=0).int().tolist())


def build_command(library: Library, region: Region, inputs: Inputs, folder: str | None = None) -> str:
    """`python -m export build ...` for what a region's call needs, into `folder` or where its packages lie; in capitals
    the sizes that aren't known."""
    options = {
        "--checkpoint": library.checkpoint,
        "--recipe": ladder.command_line_name(library.recipe),
        "--resolutions": "HEIGHTxWIDTH",
        "--text-lengths": "TOKENS",
        "--batch": "1",
        "--out": folder or str(library.store.folder),
        **({"--device": "cpu"} if torch.cuda.is_available() and library.pipe.device.type == "cpu" else {}),
        **_sizes(library, region, inputs),
    }
    return f"python -m export build {shlex.join(itertools.chain(*options.items()))}"


def in_words(library: Library, region: Region, inputs: Inputs) -> str:
    """What a package would have to do for a region's call: "draws 64x96, batch 1, 64 text tokens"; of sizes that aren't
    known, what the region is called with."""
    if region.component in text_encoders.COMPONENTS:
        return f"encodes {inputs['hidden_states'].shape[1]} text tokens (region {region.name})"
    sizes = _sizes(library, region, inputs)
    if "--resolutions" not in sizes:
        first = [f"{name} {spec.short}" for name, spec in build.input_specs(inputs).items()][:2]
        return f"has the region {region.name} for {', '.join(first)}"
    words = [sizes["--resolutions"], f"batch {sizes['--batch']}"]
    if "--text-lengths" in sizes:
        words.append(f"{sizes['--text-lengths']} text tokens")
    if "--image-size" in sizes:
        words.append(f"an image of {sizes['--image-size']} to edit")
    return f"draws {', '.join(words)} (region {region.name})"


def _sizes(library: Library, region: Region, inputs: Inputs) -> dict[str, str]:
    """The options of `build` that say for which sizes, as far as they are known.

    They aren't of a region that is called by hand, and not as the transformer's last call would have it; nor of text
    encoders, which run before it, but where the call to come was announced.
    """
    last, coming, pixels = library.last_call, library.coming, library.pipe.vae_scale_factor
    call: Sizes | TransformerCall | None
    if region.component in text_encoders.COMPONENTS:
        call, batch = coming, 1 if coming is None else coming.batch
        resolution = None if coming is None else coming.resolution
    elif region is regions.DECODER:
        batch, _, height, width = inputs["sample"].shape
        resolution = f"{height * pixels}x{width * pixels}"
        call = next((one for one in (last, coming) if one and one.resolution == resolution), None)
    else:
        batch, tokens = inputs["hidden_states"].shape[:2]
        call = last if last and (last.batch, last.image_tokens) == (batch, tokens) else None
        resolution = None if call is None else call.resolution
    found = {} if resolution is None else {"--resolutions": resolution}
    found["--batch"] = str(batch)
    if call is not None:
        found["--text-lengths"] = str(call.text_tokens)
        if call.image_size not in (None, resolution):
            found["--image-size"] = str(call.image_size)
    if region.component == text_encoders.T5_LAYER.component:
        found["--text-lengths"] = str(inputs["hidden_states"].shape[1])
    return found
