"""LoRA on a running pipeline: diffusers' own result, nothing compiled or moved, and gone without a trace.

The LoRAs are made by peft and saved by diffusers; what is expected is an eager pipeline with the same one fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import recipes
from export import lora_file
from export.lora import Adapter
from export.store import PackageStore
from recipes import Recipe, float8
from recipes.dtype import torch_dtype
from recipes.fused_kernels import rearrange
from recipes.gemm_epilogues import arrange
from recipes.int8_adaln import takes_int8
from recipes.weights import Weight, weights
from utils.compile_clock import CompileClock
from utils.errors import UsageError, UserError
from utils.relative_error import relative_error

BF16 = Recipe(dtype="bfloat16")
FUSED = replace(BF16, fused_qkv=True)
FLOAT8 = replace(FUSED, quantization="float8_per_row")
RECIPES = {
    "float32": Recipe(),
    "bfloat16": BF16,
    "fused_qkv": FUSED,
    "float8": FLOAT8,
    "float8-per-tensor": replace(FUSED, quantization="float8_per_tensor"),
    "hoisted": Recipe(modulation="hoisted", hoisted_embeddings=True),
}
ON_A_GPU = {
    "graph-offloaded": replace(FUSED, cuda_graph=True, modulation="offloaded"),
    "graph-kernels": replace(FLOAT8, cuda_graph=True, fused_kernels=True),
    "graph-epilogues": replace(FLOAT8, cuda_graph=True, fused_kernels=True, attention="wgmma_fp8", gemm_epilogues=True),
}
WITH_INT8 = replace(ON_A_GPU["graph-epilogues"], int8_adaln=True)
ON_A_GPU["graph-int8"] = WITH_INT8
ALL = pytest.mark.parametrize(
    "recipe",
    [
        *(pytest.param(recipe, id=name) for name, recipe in RECIPES.items()),
        *(pytest.param(recipe, id=name, marks=pytest.mark.gpu) for name, recipe in ON_A_GPU.items()),
    ],
)

# Not the key projections: of a fused one, some rows are touched and others not.
LAYERS = [
    *("to_q", "to_v", "add_q_proj", "to_out.0", "to_add_out", "proj_mlp", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("norm1.linear", "norm.linear", "norm_out.linear", "x_embedder", "context_embedder"),
    "time_text_embed.timestep_embedder.linear_1",
]
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(layers, seed, **LoraConfig's options): the file of a LoRA of random factors, made by peft."""

    def make(layers: list[str] = LAYERS, seed: int = 0, metadata: bool = True, **options: Any) -> Path:
        transformer = tiny().transformer
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}, target_modules=layers)
        transformer.add_adapter(config)
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path_factory.mktemp("lora")
        FluxPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata=config.to_dict() if metadata else None,
        )
        (path,) = folder.iterdir()
        return path

    return make


@pytest.fixture(scope="module")
def style(made: Made) -> Path:
    return made(rank_pattern={"ff.net.2": 2, "to_q": 8}, alpha_pattern={"to_v": 1.5, r"norm\d?.linear": 16})


@pytest.fixture(scope="module")
def fused(tiny: Callable) -> Callable[..., DiffusionPipeline]:
    """fused(recipe, file, scale): a pipeline with diffusers' own fused LoRA, and then the recipe."""

    def make(recipe: Recipe, file: Path, scale: float = 1.0) -> DiffusionPipeline:
        pipe = tiny(torch_dtype(recipe), device(recipe))
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
        recipes.apply(pipe, recipe)
        return pipe

    return make


@pytest.fixture(scope="module")
def running(tiny: Callable) -> Callable[..., DiffusionPipeline]:
    """running(recipe): a pipeline to which a recipe was applied."""

    def make(recipe: Recipe, *more: Any) -> DiffusionPipeline:
        pipe = tiny(torch_dtype(recipe), device(recipe))
        recipes.apply(pipe, recipe, *more)
        return pipe

    return make


def device(recipe: Recipe) -> torch.device:
    return torch.device("cuda" if recipe.cuda_graph else "cpu")


def stored(pipe: DiffusionPipeline) -> list[torch.Tensor]:
    """All that a transformer's weights lie in: its parameters, and of float8 ones the values and the scales."""
    quantization = (recipes.applied(pipe) or Recipe()).quantization
    of_linears = [tensor for weight in weights(pipe.transformer, quantization) for tensor in weight.stored]
    others = [parameter for parameter in pipe.transformer.parameters() if parameter.ndim != 2]
    return [tensor.detach() for tensor in (*of_linears, *others)]


def snapshot(pipe: DiffusionPipeline) -> list[tuple[int, bytes]]:
    """Where the weights lie and what they are, to the bit."""
    return [(x.data_ptr(), x.flatten().view(torch.uint8).cpu().numpy().tobytes()) for x in stored(pipe)]


def assert_close_to(pipe: DiffusionPipeline, expected: DiffusionPipeline) -> None:
    """Weight by weight, up to rounding: to bfloat16 diffusers rounds the LoRA's factors and their product, too."""
    recipe = recipes.applied(expected)
    assert recipe is not None
    for ours, theirs in zip(stored(pipe), stored(expected), strict=True):
        rounding = 2**-6 if theirs.dtype in (torch.float8_e4m3fn, torch.int8) else 2**-8
        error = relative_error(ours, theirs)
        assert error < (1e-6 if recipe.dtype == "float32" else rounding)


@ALL
def test_equals_diffusers_own_at_every_scale_and_leaves_no_trace(
    running: Callable, fused: Callable, predict: Callable, error_of: Callable, style: Path, recipe: Recipe
) -> None:
    pipe = running(recipe)
    before, plain = snapshot(pipe), predict(pipe)
    adapter = Adapter(pipe, "tiny")
    adapter.load(style, scale=0.7)
    for scale in (0.7, -0.3):
        adapter.scale(scale)
        expected = fused(recipe, style, scale)
        assert_close_to(pipe, expected)
        output, reference = predict(pipe), predict(expected)
        effect = error_of(reference, plain)
        assert effect > 0.1
        # What a rounding tips to the neighbour, float8 carries on as a twelfth of the value.
        allowed = 0.25 * effect if recipe.quantization != "none" else 0.1 * effect
        assert error_of(output, reference) < (1e-5 if recipe.dtype == "float32" else allowed)
    assert [address for address, _ in snapshot(pipe)] == [address for address, _ in before]
    adapter.remove()
    assert snapshot(pipe) == before
    torch.testing.assert_close(predict(pipe), plain, rtol=0, atol=0)


@pytest.mark.slow
def test_float8_per_tensor(running: Callable, fused: Callable, made: Made) -> None:
    recipe = replace(FUSED, quantization="float8_per_tensor")
    pipe, file = running(recipe), made(["to_q", "ff.net.2"])
    before, adapter = snapshot(pipe), Adapter(pipe, "tiny")
    adapter.load(file)
    assert snapshot(pipe) != before
    assert_close_to(pipe, fused(recipe, file))
    adapter.remove()
    assert snapshot(pipe) == before


@pytest.mark.parametrize(
    ("recipe", "int8"), [(FUSED, False), (FLOAT8, False), (FLOAT8, True)], ids=["bfloat16", "float8", "int8"]
)
def test_linears_as_the_fused_kernels_have_them(
    running: Callable, fused: Callable, style: Path, recipe: Recipe, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels need a GPU, their Linears don't: one for the single block's query, key, value and MLP."""
    if int8:  # a recipe with int8_adaln needs the kernels
        monkeypatch.setattr(float8, "takes_int8", lambda recipe, name: takes_int8(WITH_INT8, name))
    pipe, expected = running(recipe), fused(recipe, style)
    for transformer in (pipe.transformer, expected.transformer):
        rearrange(transformer, recipe)
        if recipe == FLOAT8:
            arrange(transformer)  # as gemm_epilogues has them: bounds of the weights beside these
    before, adapter = snapshot(pipe), Adapter(pipe, "tiny")
    assert sum(tensor.dtype == torch.int8 for tensor in stored(pipe)) == (2 * 4 + 4 if int8 else 0)
    adapter.load(style)
    loaded = snapshot(pipe)
    assert loaded != before
    assert_close_to(pipe, expected)
    if recipe == FLOAT8:
        with pytest.raises(UsageError, match=r"can't take .* with a row of weights of norm \d+, above 64"):
            adapter.scale(1e4)
        assert snapshot(pipe) == loaded
    adapter.remove()
    assert snapshot(pipe) == before


def test_another_lora_takes_its_place(running: Callable, fused: Callable, made: Made, style: Path) -> None:
    pipe, other = running(FUSED), made(["to_k", "to_v"], seed=1)
    before, adapter = snapshot(pipe), Adapter(pipe, "tiny")
    adapter.load(style)
    adapter.load(other, scale=2)
    assert_close_to(pipe, fused(FUSED, other, 2))
    adapter.remove()
    assert snapshot(pipe) == before


@pytest.mark.parametrize(
    ("metadata", "options"),
    [(True, {"use_rslora": True}), (True, {"lora_alpha": 1}), (False, {}), (False, {"rank_pattern": {"to_q": 2}})],
    ids=["rslora", "alpha", "without-metadata", "ranks-without-metadata"],
)
def test_scales_as_peft_does(running: Callable, fused: Callable, made: Made, metadata: bool, options: dict) -> None:
    pipe, file = running(Recipe()), made(["to_q", "proj_mlp"], metadata=metadata, **options)
    Adapter(pipe, "tiny").load(file.parent)  # the folder: its only file
    assert_close_to(pipe, fused(Recipe(), file))


def random(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 0.05 for shape in shapes]


def kohya() -> dict[str, torch.Tensor]:
    tensors = {}
    for name, out in (("img_attn_qkv", 768), ("txt_attn_proj", 256), ("img_mod_lin", 1536)):
        down, up = random((4, 256), (out, 4))
        key = f"lora_unet_double_blocks_1_{name}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    return tensors


def xlabs() -> dict[str, torch.Tensor]:
    key, (down, up, down_of_proj, up_of_proj) = (
        "double_blocks.0.processor",
        random((4, 256), (768, 4), (2, 256), (256, 2)),
    )
    return {
        f"{key}.qkv_lora1.down.weight": down,
        f"{key}.qkv_lora1.up.weight": up,
        f"{key}.proj_lora2.down.weight": down_of_proj,
        f"{key}.proj_lora2.up.weight": up_of_proj,
    }


def with_alphas() -> dict[str, torch.Tensor]:
    tensors = {}
    for i, alpha in enumerate((1.0, 3.0)):
        down, up = random((4, 256), (256, 4))
        key = f"transformer.transformer_blocks.{i}.attn.to_k"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return tensors


@pytest.mark.parametrize("tensors", [kohya, xlabs, with_alphas])
def test_other_formats(
    running: Callable, fused: Callable, tmp_path: Path, tensors: Callable[[], dict[str, torch.Tensor]]
) -> None:
    file = tmp_path / "other.safetensors"
    save_file(tensors(), file)
    pipe = running(Recipe())
    before = snapshot(pipe)
    Adapter(pipe, "tiny").load(file)
    assert snapshot(pipe) != before
    assert_close_to(pipe, fused(Recipe(), file))


PACKAGED = replace(FLOAT8, execution="aoti")
IN_A_GRAPH = replace(PACKAGED, cuda_graph=True, attention="triton_fp8")
EPILOGUES = replace(IN_A_GRAPH, fused_kernels=True, attention="wgmma_fp8", gemm_epilogues=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(replace(FUSED, execution="compile"), id="compile"),
        pytest.param(PACKAGED, id="aoti-float8"),
        pytest.param(IN_A_GRAPH, id="aoti-graph", marks=pytest.mark.gpu),
        pytest.param(replace(IN_A_GRAPH, fused_kernels=True), id="aoti-graph-kernels", marks=pytest.mark.gpu),
        pytest.param(EPILOGUES, id="aoti-graph-epilogues", marks=pytest.mark.gpu),
        pytest.param(replace(EPILOGUES, int8_adaln=True), id="aoti-graph-int8", marks=pytest.mark.gpu),
    ],
)
def test_nothing_is_compiled_anew(
    running: Callable,
    fused: Callable,
    predict: Callable,
    error_of: Callable,
    style: Path,
    tmp_path: Path,
    recipe: Recipe,
) -> None:
    pipe = running(recipe, PackageStore(tmp_path))
    with CompileClock() as first:
        plain = predict(pipe)
    assert first.compilations > 0
    before, adapter = snapshot(pipe), Adapter(pipe, "tiny")
    with CompileClock() as clock:
        adapter.load(style)
        loaded = predict(pipe)
        adapter.scale(0.5)
        halved = predict(pipe)
        adapter.remove()
        assert torch.equal(predict(pipe), plain)
    assert clock.compilations == 0
    assert snapshot(pipe) == before
    if recipe.cuda_graph:
        assert len(pipe.transformer.forward.graphs.values) == 1, "the one of before"
    eager = recipe.without("execution")
    for output, scale in ((loaded, 1.0), (halved, 0.5)):
        reference = predict(fused(eager, style, scale))
        # Two roundings of the same: compiled code's and the LoRA's; in float8 each can tip a value to its neighbour.
        assert error_of(output, reference) < 0.25 * error_of(reference, plain)


def test_what_is_hoisted_is_computed_anew(running: Callable, fused: Callable, draw: Callable, style: Path) -> None:
    """With the same embeddings as before, and in the middle of a loop."""
    pipe, plain = running(RECIPES["hoisted"]), running(Recipe())
    prompt, pooled, _ = plain.encode_prompt("a red circle", "a red circle", max_sequence_length=64)
    same = {"prompt": None, "prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "steps": 2}
    draw(pipe, **same)
    ours, theirs = Adapter(pipe, "tiny"), Adapter(plain, "tiny")
    for adapter in (ours, theirs):
        adapter.load(style)
    loaded = draw(pipe, **same)
    np.testing.assert_allclose(loaded, draw(fused(Recipe(), style), **same), atol=1e-3)

    def halve(adapter: Adapter) -> Callable:
        return lambda pipe, index, timestep, tensors: (adapter.scale(0.5), tensors)[1]

    halved = draw(pipe, **same, callback_on_step_end=halve(ours))
    assert np.abs(halved - loaded).max() > 0.01
    np.testing.assert_allclose(halved, draw(plain, **same, callback_on_step_end=halve(theirs)), atol=1e-3)


Q = "transformer.transformer_blocks.0.attn.to_q"


def pair(layer: str = Q, into: int = 256, out: int = 256, ranks: tuple[int, int] = (4, 4)) -> dict[str, torch.Tensor]:
    down, up = random((ranks[0], into), (out, ranks[1]))
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def without(tensors: dict[str, torch.Tensor], ending: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "another-width": (pair(into=3072, out=3072), r"another architecture: its .*to_q is \[3072, 3072\].*\[256, 256\]"),
    "another-depth": (pair(Q.replace("0", "18")), r"another architecture: there is no layer transformer_blocks\.18"),
    "no-layer": (pair("transformer.norm_in"), "there is no layer norm_in"),
    "unet": (pair("unet.down_blocks.0.attn.to_q"), "fits no layer of FLUX.1's transformer"),
    "norm": (pair() | {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(128)}, "no factor of a LoRA"),
    "rank": (pair(ranks=(4, 8)), r"the ranks of .*to_q differ: lora_A is \[4, 256\], lora_B \[256, 8\]"),
    "half": (without(pair(), "lora_B.weight"), "only lora_A for .*to_q"),
    "no-number": ({name: tensor * float("nan") for name, tensor in pair().items()}, "aren't finite"),
    "text-encoder": (
        pair() | pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
        "changes a text encoder .*only the transformer's LoRA is supported",
    ),
    "kohya-text-encoder": (
        kohya() | {"lora_te2_encoder_block_0.lora_down.weight": torch.ones(4, 256)},
        "changes a text encoder",
    ),
    "kohya-unknown": (
        kohya() | {"lora_unet_double_blocks_9_strange.lora_down.weight": torch.ones(4, 256)},
        "in no LoRA format of FLUX.1 that diffusers knows",
    ),
    "dora": (pair() | {f"{Q}.lora_magnitude_vector": torch.ones(256)}, "is a DoRA"),
    "kohya-dora": (kohya() | {"lora_unet_double_blocks_1_img_attn_qkv.dora_scale": torch.ones(768)}, "is a DoRA"),
    "bias": (pair() | {f"{Q}.lora_B.bias": torch.ones(256)}, "no factor of a LoRA"),
    "lokr": ({f"{Q}.lokr_w1": torch.ones(4, 4)}, "no factor of a LoRA"),
    "one-alpha": (pair() | pair(Q.replace("0", "1")) | {f"{Q}.alpha": torch.tensor(2.0)}, "an alpha for some layers"),
    "nothing": ({}, "holds no LoRA|no LoRA format"),
}


@pytest.fixture(scope="module")
def untouched(running: Callable, style: Path) -> Callable[[], tuple[Adapter, Callable[[], Any]]]:
    """untouched(): an adapter with a LoRA loaded, and the snapshot of its pipeline, to be compared after an error."""
    pipe = running(FUSED)
    adapter = Adapter(pipe, "tiny")
    adapter.load(style)
    return lambda: (adapter, lambda: snapshot(pipe))


@pytest.mark.parametrize(("tensors", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses_in_one_line_and_changes_nothing(
    untouched: Callable, tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    file = tmp_path / "bad.safetensors"
    save_file(tensors, file)
    adapter, now = untouched()
    before = now()
    with pytest.raises(UsageError, match=words) as raised:
        adapter.load(file)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)
    assert now() == before


def test_refuses_what_is_no_lora_file(untouched: Callable, made: Made, style: Path, tmp_path: Path) -> None:
    adapter, now = untouched()
    before = now()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(style.read_bytes()[:1000])
    lied = made(["to_q"], rank_pattern={"to_q": 2})
    config = lora_file.safe_open(lied, "pt").metadata()["lora_adapter_metadata"]
    save_file(load_file(lied), lied, metadata={"lora_adapter_metadata": config.replace('"to_q": 2', '"to_q": 3')})
    two = tmp_path / "two"
    for folder in (two, tmp_path / "none"):
        folder.mkdir()
    for name in ("a", "b"):
        save_file(pair(), two / f"{name}.safetensors")
    for source, words in (
        (damaged, "no whole safetensors file"),
        (lied, "the rank of .* is 2, and 3 by the file's configuration"),
        (tmp_path / "missing.safetensors", "no file or folder, and no hub id"),
        ("styles/missing.safetensors", "no file or folder, and no hub id"),
        (tmp_path / "none", "has no safetensors files"),
        (two, r"2 safetensors files: a\.safetensors, b\.safetensors; name one, as in .*two/a\.safetensors"),
    ):
        with pytest.raises(UsageError, match=words) as raised:
            adapter.load(source)
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="finite number, not nan"):
        adapter.load(style, scale=float("nan"))
    with pytest.raises(UsageError, match="finite number, not inf"):
        adapter.scale(float("inf"))
    assert now() == before


def test_half_way_through_an_error_nothing_has_changed(running: Callable, made: Made, style: Path) -> None:
    """The last weight isn't the checkpoint's, which is found out when the others are written."""
    pipe = running(FUSED)
    adapter = Adapter(pipe, "tiny")
    adapter.load(made(["to_k"], seed=1))
    pipe.transformer.norm_out.linear.weight.data[0, 0] += 1
    before = snapshot(pipe)
    with pytest.raises(UsageError, match=r"norm_out\.linear is not as in tiny: .*another checkpoint") as raised:
        adapter.load(style)
    assert "\n" not in str(raised.value)
    assert snapshot(pipe) == before
    adapter.remove()  # the first one is still known


WhileWriting = Callable[[str, Callable[[], Any]], None]


@pytest.fixture
def while_writing(monkeypatch: pytest.MonkeyPatch) -> WhileWriting:
    """while_writing(layer, happens): when half of its weight is written next, that happens, once."""
    write, waiting = Weight.write, {}

    def write_halves(weight: Weight, plain: torch.Tensor) -> None:
        happens = next((waiting.pop(layer) for layer in weight.layers if layer in waiting), None)
        if happens:
            weight.stored[0].detach()[:2].zero_()
            happens()
        write(weight, plain)

    monkeypatch.setattr(Weight, "write", write_halves)
    return waiting.__setitem__


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", [FUSED, FLOAT8], ids=["bfloat16", "float8"])
def test_ctrl_c_while_weights_are_written_changes_nothing(
    running: Callable, made: Made, style: Path, while_writing: WhileWriting, recipe: Recipe
) -> None:
    def assert_changes_nothing(change: Callable, *arguments: Any) -> None:
        before = snapshot(pipe)
        while_writing("transformer_blocks.1.attn.to_q", interrupt)
        with pytest.raises(KeyboardInterrupt):
            change(*arguments)
        assert snapshot(pipe) == before

    pipe = running(recipe)
    plain, adapter = snapshot(pipe), Adapter(pipe, "tiny")
    assert_changes_nothing(adapter.load, style)
    adapter.load(style)
    assert_changes_nothing(adapter.load, made(seed=1))
    assert_changes_nothing(adapter.scale, 0.5)
    assert_changes_nothing(adapter.remove)
    adapter.remove()
    assert snapshot(pipe) == plain


def test_ctrl_c_again_while_that_is_undone(running: Callable, style: Path, while_writing: WhileWriting) -> None:
    def interrupt_twice() -> None:
        while_writing("x_embedder", interrupt)
        interrupt()

    pipe = running(FUSED)
    plain, adapter = snapshot(pipe), Adapter(pipe, "tiny")
    while_writing("x_embedder", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        adapter.load(style)
    with pytest.raises(UsageError, match="part of a LoRA is left"):
        adapter.load(style)
    adapter.remove()
    assert snapshot(pipe) == plain


CHANGES: dict[str, Callable[[Adapter, Path], None]] = {
    "load": lambda adapter, file: adapter.load(file),
    "load-another": lambda adapter, file: adapter.load(file),
    "scale": lambda adapter, file: adapter.scale(0.5),
    "remove": lambda adapter, file: adapter.remove(),
}


@pytest.mark.parametrize(
    ("recipe", "shard", "lost"), [(FUSED, 1, 25), (RECIPES["hoisted"], 2, 3)], ids=["fused_qkv", "hoisted"]
)
@pytest.mark.parametrize("name", CHANGES)
def test_what_cant_be_undone_is_said_and_stays_refused_until_it_is_removed(
    running: Callable,
    fused: Callable,
    predict: Callable,
    made: Made,
    style: Path,
    tiny_copy: Path,
    while_writing: WhileWriting,
    recipe: Recipe,
    shard: int,
    lost: int,
    name: str,
) -> None:
    """A file goes away in the middle: the first one, when something else fails, or the second, which is read next."""

    def go_away() -> None:
        there.rename(away)
        if shard == 1:
            raise RuntimeError("no more")

    pipe, file = running(recipe), made(seed=1)
    there = tiny_copy / "transformer" / f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors"
    away = there.with_suffix(".away")
    plain, drawn, adapter = snapshot(pipe), predict(pipe), Adapter(pipe, str(tiny_copy))
    hooks = len(pipe.transformer._forward_pre_hooks)
    if name != "load":
        adapter.load(style)
    before = snapshot(pipe)
    while_writing("single_transformer_blocks.2.proj_mlp", go_away)
    failed = "no more" if shard == 1 else r"single_transformer_blocks\.2\.proj_out\.weight can't be read from .*"
    with pytest.raises(UserError, match=rf"^{failed}; part of a LoRA is left, as {lost} of the layers") as raised:
        CHANGES[name](adapter, file)
    half = snapshot(pipe)
    # Those of the file that were written; the other one has some, too, which could be restored.
    assert sum(a != b for a, b in zip(half, before, strict=True)) == lost
    assert "\n" not in str(raised.value)

    for refused in (lambda: adapter.load(file), lambda: adapter.scale(1), lambda: predict(pipe)):
        with pytest.raises(UsageError, match=r"^part of a LoRA is left, .*: before .*remove\(\).* once .* again$"):
            refused()
    with pytest.raises(UserError, match=r"can't be read from .*; part of a LoRA is left"):
        adapter.remove()
    assert snapshot(pipe) == half
    with pytest.raises(UsageError, match="part of a LoRA is left"):
        predict(pipe)

    away.rename(there)
    adapter.remove()
    assert snapshot(pipe) == plain
    assert torch.equal(predict(pipe), drawn)
    assert len(pipe.transformer._forward_pre_hooks) == hooks
    adapter.load(file)
    assert_close_to(pipe, fused(recipe, file))
    adapter.remove()
    assert snapshot(pipe) == plain


def test_checkpoints_without_files_or_with_damaged_ones(running: Callable, tiny_copy: Path, style: Path) -> None:
    pipe = running(Recipe())
    with pytest.raises(UsageError, match=r"random/flux-dev has no files to read weights from") as raised:
        Adapter(pipe, "random/flux-dev")
    assert "\n" not in str(raised.value)
    before, adapter = snapshot(pipe), Adapter(pipe, str(tiny_copy))
    (shard,) = (tiny_copy / "transformer").glob("*-00002-of-00002.safetensors")
    shard.write_bytes(shard.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"can't be read from .*00002-of-00002"):
        adapter.load(style)
    assert snapshot(pipe) == before
    (tiny_copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="has no whole diffusion_pytorch_model"):
        Adapter(pipe, str(tiny_copy))


def test_nothing_loaded(running: Callable) -> None:
    adapter = Adapter(running(Recipe()), "tiny")
    for call in (adapter.remove, lambda: adapter.scale(1.0)):
        with pytest.raises(UsageError, match="no LoRA is loaded"):
            call()


def test_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: Path) -> None:
    """owner/name/file, without a network; owner/name alone has to ask the Hub which files there are."""
    repository = tmp_path / "models--someone--styles"
    snapshot_folder = repository / "snapshots" / ("0" * 40)
    snapshot_folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot_folder / "style.safetensors").write_bytes(style.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert lora_file.read("someone/styles/style.safetensors").layers.keys() == lora_file.read(style).layers.keys()
    with pytest.raises(UserError, match="someone/styles is no file or folder, and could not be downloaded") as raised:
        lora_file.read("someone/styles")
    assert "\n" not in str(raised.value)


def test_command_line(main: Callable, style: Path, tmp_path: Path) -> None:
    def drawn(name: str, *lora: object, checkpoint: str = "tiny") -> bytes:
        size = ("--steps", 1, "--height", 64, "--width", 64, "--output", tmp_path / name)
        done = main("gen_image", "--checkpoint", checkpoint, "--recipe", "fp32", *size, *lora)
        assert done.code == 0, done.err
        return (tmp_path / name).read_bytes()

    images = [drawn(f"{i}.png", *lora) for i, lora in enumerate(([], ["--lora", style], ["--lora", f"{style}:0.5"]))]
    assert len(set(images)) == 3
    assert drawn("zero.png", "--lora", f"{style}:0") == images[0]
    assert drawn("one.png", "--lora", f"{style}:1.0") == images[1]
    for checkpoint, lora, words in (
        ("tiny", tmp_path / "none.safetensors", "is no file or folder, and no hub id"),
        ("tiny", f"{style}:x", "is no file or folder, and no hub id"),
        ("random/flux-dev", style, "random/flux-dev has no files to read weights from"),
    ):
        done = main("gen_image", "--checkpoint", checkpoint, "--recipe", "fp32", "--lora", lora)
        assert done.code == 2
        assert words in done.error()
