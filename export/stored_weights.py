"""A checkpoint's weights, read from its files one at a time: nothing of them is held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from utils.errors import UserError, one_line

_FILE = "diffusion_pytorch_model.safetensors"


class StoredWeights:
    """The tensors of one model's folder in diffusers format, in a safetensors file or several with their index.

    bytes_read: of all tensors read so far, one that was read twice counting twice.

    Raises:
        UserError: neither is there, or the index is damaged; in `shape` and `read`, a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.bytes_read = folder, 0
        index = folder / f"{_FILE}.index.json"
        self._files: dict[str, str] = {}
        try:
            if index.exists():
                self._files = dict(json.loads(index.read_text())["weight_map"])
            else:
                with safe_open(folder / _FILE, "pt") as file:
                    self._files = dict.fromkeys(file.keys(), _FILE)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder} has no whole {_FILE}: {one_line(error)}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        with self._open(name) as file:
            return list(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU, with the dtype of the file."""
        with self._open(name) as file:
            tensor = file.get_tensor(name)
        self.bytes_read += tensor.nbytes
        return tensor

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self.folder / self._files[name]
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{name} can't be read from {path}: {one_line(error)}") from None
