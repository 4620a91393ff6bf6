"""execution=aoti: packages built once, found again, never half there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import recipes
from export.package import PackageStore, signature
from recipes import Recipe
from utils import checkpoints
from utils.compile_clock import CompileClock
from utils.errors import UserError
from utils.image_metrics import difference
from utils.request import Request

AOTI = Recipe(execution="aoti")


def packages(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_signature_tells_apart_what_a_package_is_specialised_to() -> None:
    x = torch.zeros(2, 3)
    calls: list[tuple[tuple, dict[str, Any]]] = [
        ((x,), {}),
        ((), {"x": x}),
        ((x[:1],), {}),
        ((x.double(),), {}),
        ((x, None), {}),
        ((x,), {"return_dict": True}),
        ((x,), {"return_dict": False}),
        ((x.to("meta"),), {}),
    ]
    assert len({signature(*call) for call in calls}) == len(calls)
    assert signature((torch.ones(2, 3),), {}) == signature((x,), {})


def test_package_belongs_to_recipe_weights_shapes_inputs_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PackageStore(tmp_path)
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    paths = {
        store.path("part", small, AOTI, "inputs"),
        store.path("other", small, AOTI, "inputs"),
        store.path("part", large, AOTI, "inputs"),
        store.path("part", small.double(), AOTI, "inputs"),
        store.path("part", small.float(), replace(AOTI, max_autotune=True), "inputs"),
        store.path("part", small, AOTI, "other inputs"),
    }
    assert len(paths) == 6
    assert store.path("part", torch.nn.Linear(2, 2), AOTI, "inputs") in paths, "other weights of the same shapes fit"
    monkeypatch.setattr("export.package.sources", lambda: "other kernels")
    assert store.path("part", small, AOTI, "inputs") not in paths


def test_nothing_there_and_nothing_to_be_built(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    pipe = tiny()
    recipes.apply(pipe, AOTI, PackageStore(tmp_path, build=False))
    with pytest.raises(UserError, match="run once without --use-cached-model to build it") as raised:
        draw(pipe)
    assert "\n" not in str(raised.value)
    assert packages(tmp_path) == set()


def test_command_line_with_an_empty_cache(main: Callable, tmp_path: Path) -> None:
    size = ("--steps", 1, "--height", 64, "--width", 64, "--output", tmp_path / "a.png")
    cache = ("--cache-dir", tmp_path / "cache", "--use-cached-model")
    recipe = "fp32,execution=aoti"
    done = main("gen_image", "--checkpoint", "tiny", "--recipe", recipe, *size, *cache)
    assert "no package transformer-" in done.error()
    assert done.code == 1
    assert not (tmp_path / "a.png").exists()


def test_build_that_fails_leaves_no_package_and_the_module_as_it_was(
    tiny: Callable, draw: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny()
    before = pipe.transformer.forward
    recipes.apply(pipe, AOTI, PackageStore(tmp_path))
    around, seen = partial(pipe.transformer.forward), []  # as a CUDA graph is put around it
    pipe.transformer.forward = around

    def fail(exported: Any, package_path: str, inductor_configs: dict) -> None:
        seen.append(pipe.transformer.forward == before)
        Path(package_path).write_bytes(b"half a package")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        draw(pipe)
    assert seen == [True], "export saw the module's own forward"
    assert pipe.transformer.forward is around
    assert packages(tmp_path) == set()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def built(tiny: Callable, draw: Callable, store: Path) -> tuple[DiffusionPipeline, CompileClock]:
    """A pipeline that built its packages in `store` by drawing once."""
    pipe = tiny()
    applied = recipes.apply(pipe, AOTI, PackageStore(store))
    assert applied["execution"] == (
        "torch.export + AOTInductor, transformer and VAE decoder; emulate_precision_casts=True"
    )
    with CompileClock() as clock:
        draw(pipe)
    return pipe, clock


@pytest.mark.slow
def test_close_to_eager(tiny: Callable, draw: Callable, built: tuple, store: Path) -> None:
    pipe, clock = built
    assert clock.compilations == 2
    assert clock.seconds > 1
    assert {name.partition("-")[0] for name in packages(store)} == {"transformer", "vae_decoder"}
    for path in store.iterdir():
        assert path.stat().st_size < 8e6, "a package holds no weights: those have 30 MB"
    for seed in range(2):
        np.testing.assert_allclose(draw(pipe, seed=seed, steps=2), draw(tiny(), seed=seed, steps=2), atol=1e-3)


@pytest.mark.slow
def test_bfloat16_draws_the_image_that_eager_draws(tiny: Callable, tmp_path: Path) -> None:
    """Over all steps: a timestep embedding rounded otherwise than eager's turned this image into another one."""
    known = checkpoints.TINY
    request = Request(known.prompt, known.height, known.width, known.steps, known.guidance, known.max_sequence_length)
    eager, packaged = tiny(torch.bfloat16), tiny(torch.bfloat16)
    recipes.apply(eager, Recipe(dtype="bfloat16"))
    recipes.apply(packaged, Recipe(dtype="bfloat16", execution="aoti"), PackageStore(tmp_path))
    (reference,), (image,) = request.run(eager), request.run(packaged)
    assert difference(image, reference)["psnr_db"] > 35


@pytest.mark.slow
def test_weights_are_bound_not_copied(draw: Callable, built: tuple) -> None:
    pipe, _ = built
    before = draw(pipe)
    weight = pipe.transformer.proj_out.weight
    kept = weight.detach().clone()
    weight.data.zero_()
    changed = draw(pipe)
    weight.data.copy_(kept)
    assert np.abs(changed - before).max() > 1e-3
    np.testing.assert_allclose(draw(pipe), before, atol=1e-6)


@pytest.mark.slow
def test_second_pipeline_builds_nothing(tiny: Callable, draw: Callable, built: tuple, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    pipe = tiny()
    recipes.apply(pipe, AOTI, PackageStore(store, build=False))
    with CompileClock() as clock:
        image = draw(pipe)
    assert clock.compilations == 0
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == before
    np.testing.assert_allclose(image, draw(built[0]), atol=1e-6)


@pytest.mark.slow
def test_batch_of_two_gets_its_own_packages(tiny: Callable, draw: Callable, built: tuple, store: Path) -> None:
    pipe, _ = built
    before = packages(store)
    images = draw(pipe, batch=2)
    assert len(packages(store) - before) == 2
    np.testing.assert_allclose(images, draw(tiny(), batch=2), atol=1e-3)


@pytest.mark.slow
def test_float8_in_a_package(tiny: Callable, predict: Callable, error_of: Callable, tmp_path: Path) -> None:
    """A package's float8 is as far from plain bfloat16 as eager float8: other roundings, the same quantization."""
    recipe = Recipe(dtype="bfloat16", fused_qkv=True, quantization="float8_per_row")
    plain, eager, packaged = (tiny(torch.bfloat16) for _ in range(3))
    recipes.apply(eager, recipe)
    recipes.apply(packaged, replace(recipe, execution="aoti"), PackageStore(tmp_path))
    reference, output = predict(eager), predict(packaged)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("transformer-")
    quantization_error = error_of(reference, predict(plain))
    assert 0.5 * quantization_error < error_of(output, predict(plain)) < 2 * quantization_error
    assert error_of(output, reference) < 2 * quantization_error
