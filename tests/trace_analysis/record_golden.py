"""Record the traces that the golden tests read: `PYTHONPATH=. python tests/trace_analysis/record_golden.py FOLDER`.

Meant for one NVIDIA GPU with 80 GB and the checkpoint random/flux-dev. The pipeline is loaded once at full size for the
first two traces, which stay outside the repository, then cut to one double and one single block. Each trace is
written as soon as it is there; what fails says so and leaves the others alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmark.measure import trace
from recipes import Recipe, attention, float8, fused_qkv, scheduler_sync
from utils import checkpoints, ranges
from utils.timing import synchronize

LARGEST = 300_000  # bytes of a gzipped trace that goes into the repository
_NOT_ARROWS = frozenset("sft")  # phases of the arrows that viewers draw: they repeat the correlation ids
_SLEEP_S = 0.03


@dataclass
class Recorder:
    """A pipeline, and where traces of its calls go.

    Height and width in pixels. `embeds`: prompt embeddings for calls that skip the text encoders, made at first use.
    """

    pipe: DiffusionPipeline
    folder: Path
    height: int
    width: int
    tokens: int
    embeds: dict[str, torch.Tensor] | None = None

    def call(self, steps: int, only_loop: bool, callback: Callable | None) -> None:
        """One call of the pipeline; `only_loop`: from embeddings to latents, without text encoders and VAE."""
        text: dict[str, Any] = {"prompt": "a red circle"}
        if only_loop:
            if self.embeds is None:
                prompt, pooled, _ = self.pipe.encode_prompt("a red circle", None, max_sequence_length=self.tokens)
                self.embeds = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
            text = self.embeds
        self.pipe(
            **text,
            height=self.height,
            width=self.width,
            num_inference_steps=steps,
            guidance_scale=3.5,
            max_sequence_length=self.tokens,
            generator=torch.Generator().manual_seed(0),
            output_type="latent" if only_loop else "pil",
            callback_on_step_end=callback,
        )

    def record(
        self,
        name: str,
        steps: int = 2,
        stacks: bool = False,
        only_loop: bool = False,
        callback: Callable | None = None,
        cut: bool = True,
    ) -> None:
        """Warm up, then write a trace of one call to `name`.json.gz, cut to LARGEST unless told otherwise."""
        device = self.pipe.device
        self.call(steps, only_loop, None)
        synchronize(device)
        path = self.folder / f"{name}.json.gz"
        with ranges.annotate(self.pipe):
            trace(lambda: self.call(steps, only_loop, callback), path, stacks, device)
        if cut:
            shrink(path)


def shrink(path: Path) -> None:
    """Take out of a trace what its analysis doesn't read, then the shortest Python functions until it is small enough.

    The key "cut" in the file says what went.
    """
    with gzip.open(path, "rt") as file:
        found = json.load(file)
    events = [event for event in found["traceEvents"] if event.get("ph") not in _NOT_ARROWS]
    for event in events:
        event.get("args", {}).pop("kernel_file", None)  # a path in this machine's cache
    shortest = 0.0
    while True:
        kept = [e for e in events if e.get("cat") != "python_function" or e.get("dur", 0) >= shortest]
        found["traceEvents"] = kept
        found["cut"] = {"python_functions_below_us": shortest, "events_dropped": len(events) - len(kept)}
        for private in ("traceName", "trace_name", "host_name", "hostname"):
            found.pop(private, None)
        data = gzip.compress(json.dumps(found, separators=(",", ":")).encode(), mtime=0)
        if len(data) <= LARGEST or shortest > 1000:
            break
        shortest = shortest * 2 or 2.0  # microseconds
    path.write_bytes(data)


def cut_depth(pipe: DiffusionPipeline) -> None:
    """One double and one single block, one layer of each text encoder; the VAE stays whole."""
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    pipe.transformer.single_transformer_blocks = pipe.transformer.single_transformer_blocks[:1]
    pipe.text_encoder_2.encoder.block = pipe.text_encoder_2.encoder.block[:1]
    clip = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    clip.encoder.layers = clip.encoder.layers[:1]


@contextmanager
def graphed(transformer: torch.nn.Module) -> Iterator[None]:
    """The transformer's calls are captured into one CUDA graph at the first, and replayed from then on."""
    original = transformer.forward
    state: dict[str, Any] = {}

    def forward(**arguments: Any) -> Any:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        if not state:
            static = {name: value.clone() for name, value in tensors.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    original(**{**arguments, **static})
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = original(**{**arguments, **static})
            state.update(graph=graph, inputs=static, output=output)
        for name, value in tensors.items():
            state["inputs"][name].copy_(value)
        state["graph"].replay()
        return tuple(tensor.clone() for tensor in state["output"])

    transformer.forward = forward
    try:
        yield
    finally:
        transformer.forward = original


def planted(recompiled: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable:
    """A callback that sleeps after step 0, calls `.item()` after step 1 and recompiles after step 2.

    What comes after step i lies in the range of step i + 1.
    """

    def callback(pipe: DiffusionPipeline, step: int, timestep: Any, values: dict) -> dict:
        if step == 0:
            time.sleep(_SLEEP_S)
        if step == 1:
            values["latents"].sum().item()
        if step == 2 and recompiled is not None:
            recompiled(values["latents"])
        return values

    return callback


def compile_blocks(pipe: DiffusionPipeline) -> None:
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


def scale(value: torch.Tensor) -> torch.Tensor:
    return value * 2 + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", default="random/flux-dev")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=140, help="begin no further trace after this long")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    started, failed = time.perf_counter(), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def attempt(name: str, body: Callable[[], None], gpu: bool = False) -> None:
        if gpu and device.type == "cpu":
            print(f"{name}: needs a GPU, left out", flush=True)
            return
        if time.perf_counter() - started > arguments.seconds:
            failed.append(name)
            print(f"{name}: no time left", flush=True)
            return
        try:
            body()
            path = arguments.folder / f"{name}.json.gz"
            size = f"{path.stat().st_size} bytes" if path.exists() else "no file of its own"
            print(f"{name}: {size}, at {time.perf_counter() - started:.1f} s", flush=True)
        except Exception:
            failed.append(name)
            traceback.print_exc()

    pipe = checkpoints.load(arguments.checkpoint, torch.bfloat16, device, progress=False)
    pipe.set_progress_bar_config(disable=True)
    print(f"loaded at {time.perf_counter() - started:.1f} s", flush=True)
    tokens = checkpoints.defaults(arguments.checkpoint).max_sequence_length
    recorder = Recorder(pipe, arguments.folder, arguments.height, arguments.width, tokens)

    def sync(removed: bool) -> None:
        scheduler_sync.OPTIMIZATION.apply(pipe, Recipe(scheduler_sync_removal=removed))

    sync(removed=True)
    with tempfile.TemporaryDirectory() as throwaway:  # the first profile of a process pays for CUPTI's start
        Recorder(pipe, Path(throwaway), 64, 64, 64).record("first", steps=1, only_loop=True, cut=False)
    attempt("full-eager", lambda: recorder.record("full-eager", cut=False))

    def full_graph() -> None:
        with graphed(pipe.transformer):
            recorder.record("full-graph", only_loop=True, cut=False)

    attempt("full-graph", full_graph, gpu=True)
    cut_depth(pipe)
    recorder.embeds = None
    attempt("eager", lambda: recorder.record("eager"))

    def eager_sync() -> None:
        sync(removed=False)
        try:
            recorder.record("eager-sync")
            recorder.record("eager-sync-stacks", stacks=True, only_loop=True)
        finally:
            sync(removed=True)

    attempt("eager-sync", eager_sync)
    attempt(
        "planted-stacks",
        lambda: recorder.record("planted-stacks", 3, stacks=True, only_loop=True, callback=planted(None)),
    )

    def graph() -> None:
        with graphed(pipe.transformer):
            recorder.record("graph", only_loop=True)

    attempt("graph", graph, gpu=True)

    def compiled() -> None:
        compile_blocks(pipe)
        recorder.record("compiled")

    attempt("compiled", compiled)

    def compiled_graph() -> None:
        with graphed(pipe.transformer):
            recorder.record("compiled-graph", only_loop=True)

    attempt("compiled-graph", compiled_graph, gpu=True)

    def with_recompile() -> None:
        recompiled = torch.compile(scale, dynamic=False)
        recompiled(torch.ones(4, device=device))
        recorder.record("planted", 4, only_loop=True, callback=planted(recompiled))

    attempt("planted", with_recompile)

    def float8_compiled() -> None:
        recipe = Recipe(dtype="bfloat16", fused_qkv=True, attention="cudnn", quantization="float8_per_row")
        torch._dynamo.reset()
        for optimization in (attention, fused_qkv, float8):
            optimization.OPTIMIZATION.apply(pipe, recipe)
        compile_blocks(pipe)
        recorder.record("float8-compiled", only_loop=True)

    attempt("float8-compiled", float8_compiled, gpu=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
