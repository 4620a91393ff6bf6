"""The VAE's attention as GEMMs against diffusers' own, on the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline

import recipes
from export.build import Call, compile_call
from export.manifest import Range
from export.regions import DECODER
from recipes import Recipe, RecipeError, vae_attention
from recipes.vae_attention import OPTIMIZATION, GEMMAttention

GEMM = Recipe(dtype="bfloat16", vae_attention="gemm")


def latents(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decode(vae: AutoencoderKL, z: torch.Tensor) -> torch.Tensor:
    return vae.decode(z.to(vae.device, vae.dtype)).sample.float().cpu()


@pytest.fixture
def changed(tiny: Callable) -> Callable[..., DiffusionPipeline]:
    """changed(dtype): a pipeline with this attention, on the CPU, where a recipe would refuse it."""

    def load(dtype: torch.dtype) -> DiffusionPipeline:
        pipe = tiny(dtype)
        assert OPTIMIZATION.apply(pipe, GEMM) == "1 attention of the VAE's decoder"
        return pipe

    return load


@pytest.mark.parametrize("size", [(2, 6, 4), (1, 5, 3), (1, 1, 1), (1, 40, 24)])
def test_decodes_as_before(tiny: Callable, changed: Callable, error_of: Callable, size: tuple[int, int, int]) -> None:
    expected = decode(tiny().vae, latents(*size))
    assert error_of(decode(changed(torch.float32).vae, latents(*size)), expected) < 1e-5
    before, now = (error_of(decode(p(torch.bfloat16).vae, latents(*size)), expected) for p in (tiny, changed))
    assert now < 1.1 * before


@pytest.mark.parametrize("size", [1, 9, 25])
def test_large_scores_are_exact(error_of: Callable, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only probabilities and output are rounded to bfloat16. Scores would come to 0.006 to 0.035; in parts of rows."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 130, 512, generator=random) for _ in range(3))
    query, key, value = (x.bfloat16() for x in (query * size**0.5, key * size**0.5, value))
    exact = F.scaled_dot_product_attention(*(x.double() for x in (query, key, value)))
    for scores in (2**26, 130 * 40):
        monkeypatch.setattr(vae_attention, "_SCORES", scores)
        assert error_of(vae_attention.attend(query, key, value).double(), exact) < 0.7 * 2**-8


def test_the_op(error_of: Callable) -> None:
    a, b = torch.randn(5, 16).bfloat16(), torch.randn(16, 3).bfloat16()
    torch.library.opcheck(vae_attention.mm_float32, (a, b))
    assert vae_attention.mm_float32(a, b).dtype == torch.float32
    assert error_of(vae_attention.mm_float32(a, b).double(), a.double() @ b.double()) < 1e-6


def test_with_fused_projections(tiny: Callable, changed: Callable, error_of: Callable) -> None:
    pipe = tiny()
    recipes.apply(pipe, Recipe(fused_qkv=True))
    OPTIMIZATION.apply(pipe, GEMM)
    (attention,) = (module for module in pipe.vae.decoder.modules() if hasattr(module, "to_qkv"))
    assert isinstance(attention.processor, GEMMAttention)
    z = latents(2, 6, 4)
    assert error_of(decode(pipe.vae, z), decode(changed(torch.float32).vae, z)) < 1e-5


def test_keeps_channels_last(changed: Callable) -> None:
    vae = changed(torch.bfloat16).vae.to(memory_format=torch.channels_last)
    block = vae.decoder.mid_block.attentions[0]
    x = torch.randn(2, block.to_q.in_features, 6, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_no_graph_break(changed: Callable) -> None:
    """diffusers warns of arguments that a processor doesn't name, which would break the graph."""
    decoder = changed(torch.float32).vae.decoder
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(latents(1, 4, 6)), decoder(latents(1, 4, 6)))


@pytest.mark.slow
def test_a_package_for_a_range_of_sizes(
    changed: Callable, error_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    decoder = changed(torch.float32).vae.decoder
    ranges = {"latent_height": Range(5, 10), "latent_width": Range(9, 16)}  # Inductor leaves no more open on a CPU
    call = Call(DECODER, decoder, {"sample": latents(1, 8, 12)}, ranges)
    library = next(str(file) for file in compile_call(call, {}, embed_weights=True) if str(file).endswith(".so"))
    compiled = torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)
    for size in ((8, 12), (5, 9), (10, 16)):
        sample = latents(1, *size)
        with torch.no_grad():
            assert error_of(compiled.run([sample])[0], decoder(sample)) < 1e-4


def test_refused_without_a_gpu(tiny: Callable) -> None:
    with pytest.raises(RecipeError, match="vae_attention=gemm needs a cuda device, this is cpu"):
        recipes.apply(tiny(), GEMM)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{}, {"execution": "compile"}, {"execution": "compile", "cuda_graph": True}])
def test_applied_and_compiled(tiny: Callable, error_of: Callable, more: dict) -> None:
    device = torch.device("cuda")
    pipe, plain, exact = (tiny(dtype, device) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    recipes.apply(pipe, Recipe(dtype="bfloat16", fused_qkv=True, vae_attention="gemm", **more))
    for size in ((1, 8, 8), (2, 12, 8)):
        expected = decode(exact.vae, latents(*size))
        assert error_of(decode(pipe.vae, latents(*size)), expected) < 1.1 * error_of(
            decode(plain.vae, latents(*size)), expected
        )
