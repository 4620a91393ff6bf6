"""Regional packages on a GPU under CUDA graphs, with attention in float8: what torch.compile of the same recipe gives.

How far two ways to run one recipe may be apart is measured: the recipe's own error, eager, against float32. That is
rounding to bfloat16 and to float8, which each way does for itself.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import recipes
from export import regions
from export.runtime import library_of
from export.store import PackageStore
from export.verify import verify
from recipes import Recipe
from utils import environment
from utils.compile_clock import CompileClock
from utils.cuda_graph import Graphed
from utils.errors import UserError
from utils.relative_error import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CUDA = torch.device("cuda")
BF16 = Recipe(dtype="bfloat16", scheduler_sync_removal=True, execution="aoti", fused_qkv=True, cuda_graph=True)
FLOAT8 = replace(BF16, quantization="float8_per_row")
RECIPES = {
    "bf16-triton_fp8": replace(BF16, attention="triton_fp8"),
    "bf16-cudnn": replace(BF16, attention="cudnn"),
    "float8-triton_fp8": replace(FLOAT8, attention="triton_fp8"),
    "float8-triton_fp8-kernels": replace(FLOAT8, attention="triton_fp8", fused_kernels=True),
    "bf16-cudnn_fp8": replace(BF16, attention="cudnn_fp8"),
    "float8-cudnn_fp8": replace(FLOAT8, attention="cudnn_fp8"),
    "float8-cudnn_fp8-kernels": replace(FLOAT8, attention="cudnn_fp8", fused_kernels=True),
    "float8-wgmma_fp8-kernels": replace(FLOAT8, attention="wgmma_fp8", fused_kernels=True),
    "float8-wgmma_fp8-epilogues": replace(FLOAT8, attention="wgmma_fp8", fused_kernels=True, gemm_epilogues=True),
}
RECIPES["float8-wgmma_fp8-int8"] = replace(RECIPES["float8-wgmma_fp8-epilogues"], int8_adaln=True)
OF_EACH_ATTENTION = ("bf16-cudnn", "float8-triton_fp8", "float8-cudnn_fp8", "float8-wgmma_fp8-int8")


@dataclass(frozen=True)
class Pair:
    """One recipe from packages and by torch.compile, both under CUDA graphs; and eager, and plain float32."""

    recipe: Recipe
    packaged: DiffusionPipeline
    compiled: DiffusionPipeline
    eager: DiffusionPipeline
    plain: DiffusionPipeline


@pytest.fixture(scope="module", params=RECIPES)
def pair(request: pytest.FixtureRequest, tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    recipe = RECIPES[request.param]
    if (refusal := recipes.refusal(recipe, CUDA)) is not None:
        pytest.skip(refusal)
    packaged, compiled, eager = (tiny(torch.bfloat16, CUDA) for _ in range(3))
    recipes.apply(packaged, recipe, PackageStore(tmp_path_factory.mktemp(request.param)))
    recipes.apply(compiled, replace(recipe, execution="compile"))
    recipes.apply(eager, replace(recipe, execution="eager", cuda_graph=False))
    return Pair(recipe, packaged, compiled, eager, tiny(torch.float32, CUDA))


@pytest.fixture
def assert_equal_to_compiled(predict: Callable, error_of: Callable) -> Callable[..., None]:
    """assert_equal_to_compiled(pair, batch, side, seed)"""

    def check(pair: Pair, *size: int) -> None:
        reference = predict(pair.plain, *size)
        rounding = error_of(predict(pair.eager, *size), reference)
        packaged, compiled = predict(pair.packaged, *size), predict(pair.compiled, *size)
        assert 1e-3 < rounding < 0.3
        # Two results whose errors have nothing to do with each other are 1.41 times one of them apart.
        assert error_of(packaged, compiled) < 1.5 * rounding
        assert error_of(packaged, reference) < 1.3 * rounding
        for image in range(len(packaged)):
            assert error_of(packaged[image], compiled[image]) < 2 * rounding

    return check


def test_equal_to_torch_compile(pair: Pair, assert_equal_to_compiled: Callable) -> None:
    assert_equal_to_compiled(pair, 1, 4, 0)
    for seed in (1, 2):
        with CompileClock() as clock:
            assert_equal_to_compiled(pair, 1, 4, seed)
        assert clock.compilations == 0
    assert isinstance(pair.packaged.transformer.forward, Graphed)
    assert len(pair.packaged.transformer.forward.graphs.values) == 1


def test_models_and_identity(pair: Pair, predict: Callable) -> None:
    predict(pair.packaged)
    library = library_of(pair.packaged)
    entry, *_ = library.store.entries()
    identity = entry.manifest.identity
    uses_cudnn = pair.recipe.attention == "cudnn_fp8"
    assert identity.cudnn_frontend == (environment.version("nvidia-cudnn-frontend") if uses_cudnn else None)
    assert identity.triton == environment.version("triton")
    assert identity.arch == "sm_{}{} {}".format(*torch.cuda.get_device_capability(), platform.machine())
    errors = verify(entry, library)
    assert {error.model.rsplit("-", 1)[0] for error in errors} == {"before", "double_block", "single_block", "after"}
    assert all(error.ok for error in errors), errors


def test_output_outlives_the_next_replay(pair: Pair, predict: Callable) -> None:
    given: list[torch.Tensor] = []
    hook = pair.packaged.transformer.register_forward_hook(lambda module, args, out: given.append(out[0]))
    try:
        predict(pair.packaged, 1, 4, 0)
        kept = given[0].clone()
        other = predict(pair.packaged, 1, 4, 1)
        again = predict(pair.packaged, 1, 4, 0)
    finally:
        hook.remove()
    assert torch.equal(given[0], kept)
    assert not torch.equal(other, kept.float()), "other inputs give another output"
    assert torch.equal(again, kept.float()), "the same inputs give the same bits"


def test_replays_without_waiting(pair: Pair, predict: Callable, waiting_is_an_error: Callable) -> None:
    predict(pair.packaged)
    calls: list[tuple[tuple, dict]] = []
    hook = pair.packaged.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        predict(pair.packaged)
    finally:
        hook.remove()
    ((args, kwargs),) = calls
    with waiting_is_an_error(), torch.no_grad():
        pair.packaged.transformer(*args, **kwargs)


@pytest.mark.parametrize("size", [(2, 4), (1, 6), (2, 6)], ids=["batch-2", "other-resolution", "both"])
def test_batches_and_resolutions(pair: Pair, assert_equal_to_compiled: Callable, size: tuple[int, int]) -> None:
    if pair.recipe not in [RECIPES[name] for name in OF_EACH_ATTENTION]:
        pytest.skip("every package takes the compiler half a minute: one recipe of each attention")
    assert_equal_to_compiled(pair, *size, 0)
    graphs = len(pair.packaged.transformer.forward.graphs.values)
    assert_equal_to_compiled(pair, *size, 1)
    assert_equal_to_compiled(pair, 1, 4, 0)
    assert len(pair.packaged.transformer.forward.graphs.values) <= graphs + 1, "a graph for each size, and no other"


@pytest.mark.parametrize("name", RECIPES)
def test_a_range_of_sizes(name: str, tiny: Callable, predict: Callable, error_of: Callable, tmp_path: Path) -> None:
    """Right at a size that wasn't ordered, with a graph of its own; or refused while it is built, in one line."""
    recipe = RECIPES[name]
    if (refusal := recipes.refusal(recipe, CUDA)) is not None:
        pytest.skip(refusal)
    building, packaged, eager = (tiny(torch.bfloat16, CUDA) for _ in range(3))
    plain = tiny(torch.float32, CUDA)
    recipes.apply(building, replace(recipe, cuda_graph=False), PackageStore(tmp_path))
    library = library_of(building)
    with library.recording() as calls:
        for side in (4, 8):
            predict(building, 1, side)
    said = ""
    try:
        entry, _ = library.build(calls.values(), dynamic=True)
    except UserError as error:
        said = str(error)
    if said:
        assert recipe.attention == "triton_fp8", "our own kernel is compiled for one number of keys"
        assert "can't be compiled for 16 to 64 image tokens" in said
        assert len(said.splitlines()) == 1
        return
    errors = verify(entry, library)
    assert all(error.ok for error in errors), errors
    recipes.apply(packaged, recipe, PackageStore(tmp_path, build=False))
    recipes.apply(eager, replace(recipe, execution="eager", cuda_graph=False))
    for side in (5, 6, 7):
        reference = predict(plain, 1, side)
        rounding = error_of(predict(eager, 1, side), reference)
        assert error_of(predict(packaged, 1, side), reference) < 1.3 * rounding


def test_draws_the_image_that_torch_compile_draws(pair: Pair, draw: Callable) -> None:
    """Four steps of the whole pipeline, latents in and out of the graph at each."""
    given = {"steps": 4, "output_type": "latent", "max_sequence_length": 8}  # the blocks' sizes are those of before
    packaged, compiled, eager, plain = (
        torch.as_tensor(draw(pipe, **given)).float() for pipe in (pair.packaged, pair.compiled, pair.eager, pair.plain)
    )
    rounding = relative_error(eager, plain)
    assert relative_error(packaged, compiled) < 2 * rounding, "steps carry on what differs"


@pytest.mark.parametrize(
    "less",
    [
        pytest.param({}, id="whole"),
        pytest.param({"vae_attention": "native"}, id="native-attention"),
        pytest.param({"fused_group_norm": False}, id="native-group-norm"),
        pytest.param({"cuda_graph": False}, id="no-graph"),
        pytest.param({"modulation": "per_step", "hoisted_embeddings": False}, id="nothing-hoisted"),
        pytest.param({"compiled_text_encoders": False}, id="text-encoders-without-graphs"),
    ],
)
def test_decoder_of_the_whole_recipe(
    tiny: Callable, draw: Callable, error_of: Callable, tmp_path: Path, less: dict
) -> None:
    """Latents that it wasn't captured with, before and after the transformer's packages ran in the same memory pool."""
    packaged, rounded, exact = (tiny(dtype, CUDA) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    recipes.apply(packaged, replace(recipes.named()["aoti"], **less), PackageStore(tmp_path))
    weights = {name: tensor.clone() for name, tensor in packaged.vae.decoder.state_dict().items()}

    def decoded(pipe: DiffusionPipeline, seed: int) -> torch.Tensor:
        latents = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return pipe.vae.decode(latents.to(CUDA, pipe.vae.dtype), return_dict=False)[0].float()

    def errors(seeds: range) -> list[float]:
        """Times plain bfloat16's."""
        return [
            error_of(decoded(packaged, seed), decoded(exact, seed))
            / error_of(decoded(rounded, seed), decoded(exact, seed))
            for seed in seeds
        ]

    alone = errors(range(3))
    assert max(alone) < 1.25, alone
    draw(packaged, steps=2)
    now = packaged.vae.decoder.state_dict()
    assert [name for name, tensor in weights.items() if not torch.equal(now[name], tensor)] == []
    after = errors(range(6))
    assert max(after) < 1.25, after


def test_decoder_of_a_range_of_sizes(tiny: Callable, error_of: Callable, tmp_path: Path) -> None:
    """The whole recipe's, over so many pixels that its GroupNorm's blocks take one tile each at the smallest size, and
    eight at the largest."""
    recipe = recipes.named()["aoti"]
    building, packaged, rounded = (tiny(torch.bfloat16, CUDA) for _ in range(3))
    exact = tiny(torch.float32, CUDA)
    recipes.apply(building, replace(recipe, cuda_graph=False), PackageStore(tmp_path))
    library = library_of(building)
    (decoder,) = [region for region in library.packaged if region.region is regions.DECODER]
    empty = [torch.zeros((1, 16, side, side), device=CUDA, dtype=torch.bfloat16) for side in (16, 64)]
    entry, _ = library.build([(decoder, decoder.region.arguments((x,), {})) for x in empty], dynamic=True)
    assert len([model for model in entry.manifest.models.values() if model.ranges]) == 1
    recipes.apply(packaged, recipe, PackageStore(tmp_path, build=False))
    for height, width in ((17, 63), (40, 23), (63, 64)):
        latents = torch.randn((1, 16, height, width), generator=torch.Generator().manual_seed(height)).to(CUDA)
        with torch.no_grad():
            images = [
                pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].float()
                for pipe in (packaged, rounded, exact)
            ]
        assert error_of(images[0], images[2]) < 1.25 * error_of(images[1], images[2])
