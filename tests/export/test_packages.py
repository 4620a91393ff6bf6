"""execution=aoti: packages compute what the eager modules compute, from whatever weights the modules have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from PIL import Image
from torch import nn

import recipes
from export import order, regions, text_encoders
from export.lora import Adapter
from export.lora_file import Factors, LoRA
from export.order import Order
from export.regions import Region
from export.runtime import BoundModel, Library, PackagedRegion, library_of
from export.store import Entry, PackageStore
from export.verify import TOLERANCE, verify
from recipes import Recipe
from tests.export.conftest import inputs_of_after
from utils import checkpoints
from utils.compile_clock import CompileClock
from utils.errors import UserError
from utils.image_metrics import difference
from utils.request import Request

AOTI = Recipe(execution="aoti")


def test_key_tells_apart_what_a_model_is_specialised_to() -> None:
    x = torch.zeros(2, 3)
    calls: list[dict[str, Any]] = [
        {"x": x},
        {"y": x},
        {"x": x[:1]},
        {"x": x.double()},
        {"x": x.t().contiguous().t()},
        {"x": x.to("meta")},
        {"x": (x, x)},
        {"x": x, "y": x},
    ]
    assert len({regions.key(call) for call in calls}) == len(calls)
    assert regions.key({"x": torch.ones(2, 3)}) == regions.key({"x": x})
    one = torch.zeros(1, 4, 3)
    assert regions.key({"x": one[:, :2]}) == regions.key({"x": torch.zeros(1, 2, 3)}), "strides of one element"


@pytest.mark.parametrize("batch", [1, 2])
def test_every_single_block_gets_the_same_kind_of_input(tiny: Callable, predict: Callable, batch: int) -> None:
    pipe = tiny()
    recipes.apply(pipe, AOTI)
    library = library_of(pipe)
    with library.recording() as calls:
        predict(pipe, batch)
    assert [region.name for region, _ in calls] == ["before", "double_block", "single_block", "after"]
    text, image = (calls[_only(calls, "single_block")][1][n] for n in ("encoder_hidden_states", "hidden_states"))
    assert text.untyped_storage().data_ptr() == image.untyped_storage().data_ptr() or batch == 1


def _only(calls: dict, name: str) -> Any:
    (found,) = [key for key in calls if key[0].name == name]
    return found


def test_nothing_there_and_nothing_to_be_built(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    pipe = tiny()
    recipes.apply(pipe, AOTI, PackageStore(tmp_path, build=False))
    with pytest.raises(UserError, match=": apply the recipe with a PackageStore that may build, or build ") as raised:
        draw(pipe)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_lora_scale_is_refused(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    pipe = tiny()
    recipes.apply(pipe, AOTI, PackageStore(tmp_path))
    with pytest.raises(UserError, match=r"takes no scale: use a recipe with .* execution=eager or compile"):
        draw(pipe, joint_attention_kwargs={"scale": 0.5})


def test_build_that_fails_leaves_no_package_and_the_module_as_it_was(
    tiny: Callable, draw: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny()
    before = pipe.transformer.transformer_blocks[0].forward
    recipes.apply(pipe, AOTI, PackageStore(tmp_path))
    around = partial(pipe.transformer.transformer_blocks[0].forward)  # as a CUDA graph is put around it
    pipe.transformer.transformer_blocks[0].forward = around
    seen = []

    def fail(*arguments: Any, **options: Any) -> None:
        seen.append(pipe.transformer.transformer_blocks[0].forward == before)
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(UserError, match=r"\(RuntimeError: the disk is full\): `python -m export doctor` says whether "):
        draw(pipe)
    assert seen == [True], "export saw the module's own forward"
    assert pipe.transformer.transformer_blocks[0].forward is around
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert PackageStore(tmp_path).entries() == []


@pytest.fixture(scope="module")
def packaged(tiny: Callable, package: Entry) -> DiffusionPipeline:
    """A pipeline that runs from the package and may build nothing."""
    pipe = tiny()
    applied = recipes.apply(pipe, AOTI, PackageStore(package.path.parent, build=False))
    assert applied["execution"] == (
        "torch.export + AOTInductor, the transformer's blocks, what surrounds them, and the VAE's decoder; "
        "emulate_precision_casts=True"
    )
    return pipe


@pytest.mark.slow
def test_one_small_file_holds_every_region_once(package: Entry) -> None:
    assert package.beside.size == package.path.stat().st_size < 4e6, "a package holds no weights: those have 30 MB"
    found = sorted(model.region for model in package.manifest.models.values())
    assert found == ["after", "before", "double_block", "single_block", "vae_decoder"]
    assert package.manifest.built.checkpoint == "tiny"


@pytest.mark.slow
def test_close_to_eager_without_compiling(tiny: Callable, draw: Callable, packaged: DiffusionPipeline) -> None:
    with CompileClock() as clock:
        for seed in range(2):
            np.testing.assert_allclose(draw(packaged, seed=seed, steps=2), draw(tiny(), seed=seed, steps=2), atol=1e-3)
    assert clock.compilations == 0


@pytest.mark.slow
def test_callbacks_are_called_and_may_change_the_latents(
    tiny: Callable, draw: Callable, packaged: DiffusionPipeline
) -> None:
    def halve(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] / 2}

    got, expected = (draw(pipe, steps=2, callback_on_step_end=halve) for pipe in (packaged, tiny()))
    np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.mark.slow
def test_weights_are_bound_not_copied(draw: Callable, packaged: DiffusionPipeline) -> None:
    before = draw(packaged)
    weights = [packaged.transformer.proj_out.weight, packaged.transformer.single_transformer_blocks[3].proj_out.weight]
    for weight in weights:
        kept = weight.detach().clone()
        weight.data.zero_()
        changed = draw(packaged)
        weight.data.copy_(kept)
        assert np.abs(changed - before).max() > 1e-3
    np.testing.assert_allclose(draw(packaged), before, atol=1e-6)


@pytest.mark.slow
def test_weights_with_other_memory_are_bound_anew(tiny: Callable, draw: Callable, package: Entry) -> None:
    eager, packaged = tiny(), tiny()
    recipes.apply(packaged, AOTI, PackageStore(package.path.parent, build=False))
    before = draw(packaged)
    bound = [dict(region.bound) for region in library_of(packaged).packaged]
    packaged.to("cpu", torch.float32)
    assert [region.bound for region in library_of(packaged).packaged] == bound, "they stayed where they were"
    for pipe in (eager, packaged):
        pipe.transformer.to(torch.float8_e4m3fn).to(torch.float32)
    np.testing.assert_allclose(draw(packaged), draw(eager), atol=1e-4)
    assert np.abs(draw(packaged) - before).max() > 1e-3, "rounded weights draw another image"


def _zeros(linear: nn.Linear) -> torch.Tensor:
    return torch.zeros_like(linear.weight)


def _new_parameter(block: nn.Module) -> None:
    block.proj_out.weight = nn.Parameter(_zeros(block.proj_out))


def _new_data(block: nn.Module) -> None:
    block.proj_out.weight.data = _zeros(block.proj_out)


def _assigned(block: nn.Module) -> None:
    block.load_state_dict({name: torch.zeros_like(weight) for name, weight in block.state_dict().items()}, assign=True)


def _new_linear(block: nn.Module) -> None:
    block.proj_out = nn.Linear(block.proj_out.in_features, block.proj_out.out_features)
    nn.init.zeros_(block.proj_out.weight)


def _rounded(block: nn.Module) -> None:
    block.to(torch.float8_e5m2).to(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("swap", [_new_parameter, _new_data, _assigned, _new_linear, _rounded])
def test_weights_swapped_in_a_part_are_bound_anew(
    tiny: Callable, draw: Callable, package: Entry, swap: Callable[[nn.Module], None]
) -> None:
    """Between two calls of a running pipeline, whose steps have none of them."""
    eager, packaged = tiny(), tiny()
    recipes.apply(packaged, AOTI, PackageStore(package.path.parent, build=False))
    before = draw(packaged, steps=2)
    for pipe in (eager, packaged):
        torch.manual_seed(0)
        swap(pipe.transformer.single_transformer_blocks[1])
    np.testing.assert_allclose(draw(packaged, steps=2), draw(eager, steps=2), atol=1e-3)
    assert np.abs(draw(packaged, steps=2) - before).max() > 1e-2, "other weights draw another image"


@pytest.mark.slow
def test_parts_around_the_blocks_are_bound_anew(tiny: Callable, draw: Callable, package: Entry) -> None:
    """Also for a prompt that was encoded beforehand, whose embedding every call has in common."""
    eager, packaged = tiny(), tiny()
    recipes.apply(packaged, AOTI, PackageStore(package.path.parent, build=False))
    embeds, pooled, _ = eager.encode_prompt("a red circle", None, max_sequence_length=64)
    prompt = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "steps": 2}
    drawn = draw(packaged, **prompt)
    for name in ("x_embedder", "context_embedder", "proj_out"):
        for pipe in (eager, packaged):
            torch.manual_seed(0)
            old = getattr(pipe.transformer, name)
            setattr(pipe.transformer, name, nn.Linear(old.in_features, old.out_features))
        before, drawn = drawn, draw(packaged, **prompt)
        np.testing.assert_allclose(drawn, draw(eager, **prompt), atol=1e-3)
        assert np.abs(drawn - before).max() > 1e-2, "other weights draw another image"


@pytest.mark.slow
def test_what_no_package_can_do_is_refused_between_calls(tiny: Callable, draw: Callable, package: Entry) -> None:
    packaged = tiny()
    recipes.apply(packaged, AOTI, PackageStore(package.path.parent, build=False))
    before = draw(packaged)
    linear = packaged.transformer.single_transformer_blocks[1].proj_out
    hook = linear.register_forward_hook(lambda module, args, out: 0 * out)
    with pytest.raises(UserError, match=r"packages run no hooks .* single_block, and proj_out has some: remove them"):
        draw(packaged)
    hook.remove()
    np.testing.assert_allclose(draw(packaged), before, atol=1e-6)
    attention = packaged.transformer.transformer_blocks[1].attn
    own, attention.processor = attention.processor, FluxAttnProcessor()
    with pytest.raises(UserError, match="the double_block has got another processor: give it back its own, or"):
        draw(packaged)
    attention.processor = own
    np.testing.assert_allclose(draw(packaged), before, atol=1e-6)
    blocks = packaged.transformer.single_transformer_blocks
    own, blocks[0] = blocks[0], tiny().transformer.single_transformer_blocks[0]
    with pytest.raises(UserError, match="packages are bound to the blocks that there were: put these back, or"):
        draw(packaged)
    blocks[0] = own
    linear.weight = nn.Parameter(torch.zeros(1, 1))
    with pytest.raises(UserError, match=r"wants the weight proj_out.weight as float32\[.*, here it is float32\[1, 1\]"):
        draw(packaged)


def test_inputs_from_elsewhere_are_refused(after: PackagedRegion) -> None:
    inputs = {name: tensor.to("meta") for name, tensor in inputs_of_after().items()}
    with pytest.raises(UserError, match="packages here run on cpu: hidden_states comes on meta, move it there"):
        after(**inputs)


@pytest.mark.slow
def test_gradients_are_refused(packaged: DiffusionPipeline) -> None:
    latents = torch.zeros(1, 16, 8, 8, requires_grad=True)
    with pytest.raises(UserError, match="packages compute no gradients: use a recipe with execution=compile"):
        packaged.vae.decode(latents)


@pytest.mark.slow
def test_pipeline_without_a_vae(tiny: Callable, draw: Callable, package: Entry) -> None:
    plain, pipe = tiny(), tiny()
    pipe.vae = None
    applied = recipes.apply(pipe, AOTI, PackageStore(package.path.parent, build=False))
    assert "decoder" not in applied["execution"]
    got, expected = (draw(p, output_type="latent") for p in (pipe, plain))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_another_checkpoint_of_the_same_architecture(tiny: Callable, draw: Callable, package: Entry) -> None:
    eager, finetuned = tiny(), tiny()
    for pipe in (eager, finetuned):
        random = torch.Generator().manual_seed(0)
        for weight in (*pipe.transformer.parameters(), *pipe.vae.decoder.parameters()):
            weight.data.mul_(1 + 0.05 * torch.randn(weight.shape, generator=random))
    recipes.apply(finetuned, AOTI, PackageStore(package.path.parent, build=False))
    got, expected = draw(finetuned), draw(eager)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert np.abs(expected - draw(tiny())).max() > 1e-2, "other weights draw another image"


@pytest.mark.slow
def test_shape_that_no_package_has(draw: Callable, packaged: DiffusionPipeline, package: Entry) -> None:
    with pytest.raises(UserError) as raised:
        draw(packaged, width=96)
    (line,) = str(raised.value).splitlines()
    assert "draws 64x96, batch 1, 64 text tokens (region before): " in line
    assert f"{package.path.name} takes hidden_states float32[1, 16, 64], it comes float32[1, 24, 64]" in line
    assert (
        "python -m export build --checkpoint tiny --recipe fp32,execution=aoti --resolutions 64x96 --text-lengths 64 "
        f"--batch 1 --out {package.path.parent}"
    ) in line


@pytest.mark.slow
def test_several_shapes_in_one_package_chosen_by_the_inputs(tiny: Callable, tmp_path: Path) -> None:
    pipe = tiny()
    recipes.apply(pipe, AOTI, PackageStore(tmp_path))
    library = library_of(pipe)
    (after,) = [region for region in library.packaged if region.region is regions.AFTER]
    calls = [
        {"hidden_states": torch.randn(*size, 256), "temb": torch.randn(size[0], 256)} for size in ((1, 16), (2, 24))
    ]
    entry, _ = library.build([(after, call) for call in calls])
    assert len(entry.manifest.models) == 2
    library.store.build = False
    for call in calls:
        with after.unpackaged() as module:
            expected = module(**call)
        torch.testing.assert_close(after(**call), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match=r"takes hidden_states float32\[1, 16, 256\]"):
        after(hidden_states=torch.randn(2, 16, 256), temb=torch.randn(2, 256))


@pytest.mark.slow
def test_kontext_edits_as_eagerly(kontext: Path, tmp_path: Path, error_of: Callable) -> None:
    """An image of another size than what is drawn; its tokens count with those."""
    image, other = tmp_path / "in.png", tmp_path / "black.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (67, 50, 3), dtype=np.uint8)).save(image)
    Image.new("RGB", (50, 67)).save(other)
    request = Request("a red circle", 64, 96, 2, 0.0, 64, image=image)
    eager, packaged = (
        checkpoints.load(str(kontext), torch.float32, torch.device("cpu"), progress=False) for _ in range(2)
    )
    recipe = Recipe(execution="aoti", modulation="hoisted", hoisted_embeddings=True)
    recipes.apply(packaged, recipe, PackageStore(tmp_path))

    def latents(pipe: DiffusionPipeline, request: Request) -> torch.Tensor:
        return pipe(**request.arguments(pipe), output_type="latent").images

    expected = latents(eager, request)
    assert error_of(latents(packaged, request), expected) < TOLERANCE["float32"]
    assert error_of(latents(packaged, replace(request, image=other)), expected) > 0.01, "the image matters"
    (entry,) = PackageStore(tmp_path).entries()
    (double,) = [model for model in entry.manifest.models.values() if model.region == "double_block"]
    assert double.inputs["hidden_states"].shape == (1, 24 + 12, 256)


@pytest.mark.slow
def test_bfloat16_draws_the_image_that_eager_draws(tiny: Callable, tmp_path: Path) -> None:
    """Over all steps: a timestep embedding rounded otherwise than eager's turned this image into another one."""
    known = checkpoints.TINY
    request = Request(known.prompt, known.height, known.width, known.steps, known.guidance, known.max_sequence_length)
    eager, packaged = tiny(torch.bfloat16), tiny(torch.bfloat16)
    recipes.apply(eager, Recipe(dtype="bfloat16"))
    recipes.apply(packaged, Recipe(dtype="bfloat16", execution="aoti"), PackageStore(tmp_path))
    packaged.vae = eager.vae  # the decoder's package is tested in float32; it takes long to build
    (reference,), (image,) = request.run(eager), request.run(packaged)
    assert difference(image, reference)["psnr_db"] > 35
    (entry,) = PackageStore(tmp_path).entries()
    errors = verify(entry, library_of(packaged))
    assert all(error.ok for error in errors), errors
    assert max(error.value for error in errors) > 1e-5, "bfloat16 rounds otherwise somewhere"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("region", "inputs", "farther", "off"),
    [
        (regions.DECODER, {"sample": (1, 16, 8, 8)}, 1.1, 1.1),
        (text_encoders.T5_LAYER, {"hidden_states": (1, 8, 256), "position_bias": (1, 4, 8, 8)}, 2, 1.2),
    ],
    ids=lambda value: value.name if isinstance(value, Region) else "",
)
def test_what_rounds_otherwise_is_held_to_float32(
    tiny: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    region: Region,
    inputs: dict,
    farther: float,
    off: float,
) -> None:
    pipe = tiny(torch.bfloat16)
    recipe = Recipe(dtype="bfloat16", execution="aoti", compiled_text_encoders=True)
    recipes.apply(pipe, recipe, PackageStore(tmp_path))
    library = library_of(pipe)
    packaged = next(one for one in library.packaged if one.region is region)
    call = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in inputs.items()}
    with torch.no_grad():
        entry, _ = library.build([(packaged, call)])
    (error,) = verify(entry, library)
    assert error.ok
    assert error.over_eager is None
    monkeypatch.setitem(TOLERANCE, "bfloat16", error.value / 2)
    (error,) = verify(entry, library)
    assert error.value > error.tolerance
    assert 0.2 < error.over_eager < farther
    assert error.ok
    assert f"times eager's (at most {farther})" in str(error)

    def wrong(self: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with packaged.unpackaged() as module:
            return module(**inputs) * off

    monkeypatch.setattr("export.runtime.BoundModel.__call__", wrong)
    (error,) = verify(entry, library)
    assert error.over_eager > farther
    assert not error.ok


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
def test_every_output_of_a_model_is_verified(
    wrong: int, package: Entry, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = BoundModel.__call__

    def with_a_wrong_one(self: BoundModel, inputs: dict[str, Any]) -> Any:
        outputs = run(self, inputs)
        if not self.source[1].startswith(("double_block", "single_block")):
            return outputs
        text, image = outputs
        return (text, image * 1.01) if wrong else (text * 1.01, image)

    monkeypatch.setattr(BoundModel, "__call__", with_a_wrong_one)
    errors = {error.model.partition("-")[0]: error for error in verify(package, library)}
    assert [name for name, error in errors.items() if not error.ok] == ["double_block", "single_block"]
    assert errors["double_block"].value == pytest.approx(0.01, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["float8_per_row", "float8_per_tensor"])
def test_float8_in_a_package(
    tiny: Callable, predict: Callable, error_of: Callable, tmp_path: Path, quantization: str
) -> None:
    """A package's float8 is as far from plain bfloat16 as eager float8: other roundings, the same quantization."""
    recipe = Recipe(dtype="bfloat16", fused_qkv=True, quantization=quantization)
    plain, eager, packaged = (tiny(torch.bfloat16) for _ in range(3))
    recipes.apply(eager, recipe)
    recipes.apply(packaged, replace(recipe, execution="aoti"), PackageStore(tmp_path))
    reference, output = predict(eager), predict(packaged)
    (entry,) = PackageStore(tmp_path).entries()
    assert [model.region for model in entry.manifest.models.values()] == [
        *("before", "double_block", "single_block", "after")
    ]
    assert any(
        spec.dtype == "float8_e4m3fn" for model in entry.manifest.models.values() for spec in model.weights.values()
    )
    errors = verify(entry, library_of(packaged))
    assert all(error.ok for error in errors), errors
    quantization_error = error_of(reference, predict(plain))
    assert 0.5 * quantization_error < error_of(output, predict(plain)) < 2 * quantization_error
    assert error_of(output, reference) < 2 * quantization_error


@pytest.mark.slow
def test_weights_of_one_module_in_the_code_are_noticed(
    tiny: Callable, predict: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor makes a scale a tensor, of one element, part of the code, unless it is told not to."""
    compile_ = torch._inductor.aot_compile

    def folding(*arguments: Any, options: dict[str, Any]) -> Any:
        return compile_(*arguments, options={**options, "joint_graph_constant_folding": True})

    monkeypatch.setattr(torch._inductor, "aot_compile", folding)
    pipe = tiny(torch.bfloat16)
    recipe = Recipe(dtype="bfloat16", fused_qkv=True, quantization="float8_per_tensor", execution="aoti")
    recipes.apply(pipe, recipe, PackageStore(tmp_path))
    with pytest.raises(UserError, match="no package was written, for what was compiled computes something else"):
        predict(pipe)
    assert not PackageStore(tmp_path).entries()


@pytest.mark.slow
def test_one_package_for_sizes_and_texts(tiny: Callable, draw: Callable, tmp_path: Path) -> None:
    wanted = Order("tiny", AOTI, resolutions=((64, 64), (64, 96)), batches=(1,), text_lengths=(64, 32))
    ((entry, _),) = order.fill(wanted, tmp_path, torch.device("cpu"))
    models = Counter(model.region for model in entry.manifest.models.values())
    assert models == {"before": 4, "double_block": 4, "single_block": 4, "after": 2, "vae_decoder": 2}
    plain, packaged = tiny(), tiny()
    recipes.apply(packaged, AOTI, PackageStore(tmp_path, build=False))
    with CompileClock() as clock:
        for request in wanted.requests():
            given = {"width": request.width, "max_sequence_length": request.max_sequence_length, "steps": 2}
            np.testing.assert_allclose(draw(packaged, **given), draw(plain, **given), atol=1e-3)
    assert clock.compilations == 0
    with pytest.raises(UserError, match="draws 96x64, batch 1, 64 text tokens"):
        draw(packaged, height=96, width=64)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_whole_model_with_its_weights_inside(tiny: Callable, predict: Callable, tmp_path: Path, device: str) -> None:
    plain = Recipe(execution="aoti", compile_scope="whole")
    recipe = replace(plain, cuda_graph=device == "cuda")
    pipes = [tiny(device=torch.device(device)) for _ in range(4)]
    builder, pipe, *others = pipes
    for other in others:
        other.transformer.proj_out.weight.data.mul_(2)
    for one, applied in zip(pipes, (plain, recipe, plain, recipe), strict=True):
        recipes.apply(one, applied, PackageStore(tmp_path, build=False))

    def build(pipe: DiffusionPipeline) -> tuple[Entry, torch.Tensor]:
        library = library_of(pipe)
        with library.recording() as calls:
            expected = predict(pipe)
        return library.build(calls.values(), embed_weights=True)[0], expected

    entry, expected = build(builder)
    (model,) = entry.manifest.models.values()
    assert (model.region, model.bound) == ("transformer", ())
    assert entry.beside.size > 10e6
    with CompileClock() as clock:
        torch.testing.assert_close(predict(pipe), expected, atol=1e-4, rtol=1e-4)
    assert clock.compilations == 0
    factors = Factors(torch.zeros(4, 256), torch.zeros(256, 4), 1.0)
    with pytest.raises(UserError, match="weights inside, which a LoRA can't reach"):
        Adapter(pipe, "tiny").load(LoRA("file", {"single_transformer_blocks.0.attn.to_q": factors}))
    other_builder, other = others
    with pytest.raises(UserError, match=r"no package in .*holds weights with sha256"):
        predict(other)
    beside, expected_of_other = build(other_builder)
    assert beside.path.parent == entry.path.parent
    for one, what in ((other, expected_of_other), (pipe, expected)):
        projection = one.transformer.proj_out
        projection.weight = nn.Parameter(projection.weight.clone())  # so all packages are bound anew
        torch.testing.assert_close(predict(one), what, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_model_without_its_weights_can_not_be_had(after: PackagedRegion, package: Entry) -> None:

    (name,) = [name for name in package.manifest.models if name.startswith("after-")]
    with pytest.raises(KeyError):
        BoundModel(package, name, {}, torch.device("cpu"))
