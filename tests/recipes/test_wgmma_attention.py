"""Our kernel for Hopper's tensor cores: its operands' layout, what it refuses, its softmax where scores are unkind."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable

import pytest
import torch

import recipes
from recipes import Recipe, wgmma_attention
from recipes.float8_heads import for_wgmma, to_float8, to_float8_by_norm
from recipes.kernels import cuda_kernel
from recipes.kernels.cuda_kernel import CudaKernel
from utils.errors import UserError

CUDA = torch.device("cuda")
DIM = 128
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def parts(tokens: int, keys: int, heads: int = 2, batch: int = 1, loud: float = 1.0) -> Parts:
    """Query, key and value [batch, tokens, heads, 128] float32, the first two of norm `loud` * sqrt(128) a row."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, n, heads, DIM, generator=random) for n in (tokens, keys, keys))
    return *(loud * torch.nn.functional.rms_norm(x, (DIM,)) for x in (q, k)), v


def attend(given: Parts, in_float8: bool = False, device: torch.device = CUDA) -> torch.Tensor:
    q, k, v = (x.to(device) for x in given)
    (q8, dq), (k8, dk) = to_float8_by_norm(q), to_float8_by_norm(k)
    v8, dv = to_float8(v, per_head=not in_float8)
    out = wgmma_attention.wgmma_attention(q8, k8, for_wgmma(v8), torch.stack([dq, dk, dv]), in_float8)
    return out.float() * (dv[:, None, :, None] if in_float8 else 1)


def exact(given: Parts) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in given)
    return ((q @ k.transpose(2, 3) / DIM**0.5).softmax(-1) @ v).transpose(1, 2).float()


def test_layout_of_the_values() -> None:
    tokens, heads = 37, 3
    value = torch.arange(2 * tokens * heads * DIM).remainder(251).to(torch.uint8).view(2, tokens, heads, DIM)
    out = for_wgmma(value.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert out.shape == (2, heads, DIM, 48)
    assert out.is_contiguous()
    for channel in range(DIM):
        i, quad, odd = channel // 8, channel % 8 // 2, channel % 2
        for place in range(48):
            group, of_thread, pair, second = place // 16, place % 16 // 4, place % 4 // 2, place % 2
            token = 16 * group + 8 * pair + 2 * of_thread + second
            expected = value[:, token, :, 32 * quad + 2 * i + odd] if token < tokens else torch.zeros(2, heads)
            assert torch.equal(out[:, :, channel, place], expected.to(torch.uint8))


def test_refuses_what_it_would_read_wrongly() -> None:
    float8 = torch.float8_e4m3fn
    x = torch.zeros(1, 5, 2, DIM, dtype=float8)
    value, descales = for_wgmma(x), torch.ones(3, 1, 2)
    op = wgmma_attention.wgmma_attention
    short = torch.zeros(1, 5, 2, 64, dtype=float8)
    with pytest.raises(ValueError, match="takes heads of 128 values, not of 64"):
        op(short, short, value, descales, True)
    uneven = torch.zeros(1, 5, 2, DIM + 8, dtype=float8)[..., :DIM]
    with pytest.raises(ValueError, match=r"reads 16 bytes at once: key has strides \(1360, 272, 136, 1\)"):
        op(x, uneven, value, descales, True)
    with pytest.raises(ValueError, match=r"values as for_wgmma lays them out, not \(1, 5, 2, 128\)"):
        op(x, x, x, descales, True)
    beside, scale = wgmma_attention.wgmma_attention_beside, torch.ones(1, 5, 1)
    with pytest.raises(ValueError, match=r"rows are to be 256 values in float8 and others, not \(1, 5, 128\)"):
        beside(x, x, value, descales, torch.zeros(1, 5, 128, dtype=float8), scale)
    with pytest.raises(ValueError, match=r"writes 16 bytes at once: rows have strides \(1320, 264, 1\)"):
        beside(x, x, value, descales, torch.zeros(1, 5, 264, dtype=float8), scale)
    with pytest.raises(ValueError, match=r"a row's scale is float32, \[batch, tokens, 1\], contiguous"):
        beside(x, x, value, descales, torch.zeros(1, 5, 272, dtype=float8), scale.bfloat16())


def test_says_what_it_is_compiled_by(monkeypatch: pytest.MonkeyPatch, pretend_gpu: Callable) -> None:
    pretend_gpu((9, 0), "an H100")
    assert recipes.refusal(Recipe(attention="wgmma_fp8"), CUDA) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    refusal = recipes.refusal(Recipe(attention="wgmma_fp8"), CUDA)
    assert refusal is not None
    assert "needs its kernel: it is compiled by the package cuda-bindings, which comes with PyTorch's" in refusal
    pretend_gpu((10, 0), "a B200")
    refusal = recipes.refusal(Recipe(attention="wgmma_fp8"), CUDA)
    assert refusal == "attention=wgmma_fp8 needs compute capability 9.0 to below 10.0, a B200 has 10.0"


gpu = pytest.mark.gpu


@pytest.fixture
def _here() -> None:
    if (refusal := recipes.refusal(Recipe(attention="wgmma_fp8"), CUDA)) is not None:
        pytest.skip(refusal)


SIZES = [(1, 1), (77, 77), (128, 128), (129, 127), (1, 300), (300, 1), (500, 1000), (300, 2600), (4544, 4544)]


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("tokens", "keys"), SIZES)
def test_any_number_of_tokens(tokens: int, keys: int, error_of: Callable) -> None:
    given = parts(tokens, keys, batch=2)
    expected = exact(given).to(CUDA)
    # Rounding query, key and value, 2.6 % each, and probabilities, 3.3, comes to 5.8 %; the result's own makes it 6.4.
    assert error_of(attend(given), expected) < 0.065
    assert error_of(attend(given, in_float8=True), expected) < 0.075


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize(
    ("loud", "allowed"), [(0.1, 0.06), (1.0, 0.06), (2.0, 0.06), (3.0, 0.06), (8.0, 0.06), (30.0, 0.6), (1000.0, 0.6)]
)
def test_scores_that_outgrow_the_first_block(loud: float, allowed: float, rising: bool, error_of: Callable) -> None:
    """The kernel begins with the last keys: here they have the smallest scores, or the largest, and probabilities may
    be infinite till the rows' largest was looked for. From 8 on the softmax is nearly a maximum, which a score's own
    rounding decides now and then otherwise, from 30 on often: means of values still, and most of them the right ones.
    """
    q, k, v = parts(260, 1000, loud=loud)
    direction = torch.nn.functional.rms_norm(torch.randn(DIM, generator=torch.Generator().manual_seed(1)), (DIM,))
    towards = torch.linspace(-1, 1, 1000)[None, :, None, None]
    towards = -towards if rising else towards
    k = loud * torch.nn.functional.rms_norm(k / 4 + towards * direction, (DIM,))
    q = loud * torch.nn.functional.rms_norm(q / 4 + direction, (DIM,))
    q8, k8 = (to_float8_by_norm(x) for x in (q, k))
    rounded = tuple(x.float() * descale[:, None, :, None] for x, descale in (q8, k8))
    expected = exact((*rounded, v)).to(CUDA)
    for in_float8 in (False, True):
        out = attend((q, k, v), in_float8=in_float8)
        assert out.isfinite().all()
        assert error_of(out, expected) < allowed


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("loud", [25.0, 40.0, 60.0, 1000.0])
def test_scores_beyond_float16(loud: float, error_of: Callable) -> None:
    """In powers of two the largest are ten thousand to millions: a maximum. Each query is its own key, and found."""
    keys = loud * torch.nn.functional.rms_norm(torch.eye(DIM)[:100], (DIM,))[None, :, None].repeat(1, 1, 2, 1)
    value = torch.randn(1, 100, 2, DIM, generator=torch.Generator().manual_seed(0))
    assert error_of(attend((keys, keys, value)), value.to(CUDA)) < 0.03


@gpu
@pytest.mark.usefixtures("_here")
def test_scores_that_are_all_alike(error_of: Callable) -> None:
    """The mean of the values, which are mostly positive: sums that grow and grow, of which little may be cut off."""
    q, k, v = parts(200, 5000)
    given = (torch.zeros_like(q), k, 1 + v)
    expected = given[2].mean(1, keepdim=True).expand(-1, 200, -1, -1).to(CUDA)
    assert error_of(attend(given), expected) < 0.005


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("share", [0.6, 0.8])
def test_what_a_key_that_dominates_leaves_to_others(share: float, error_of: Callable) -> None:
    """It weighs 300 and 2000 times as much as the others do on average; there are 2000 of them, all positive."""
    q, k, v = parts(200, 2000)
    direction = torch.ones(DIM) * (-1) ** torch.arange(DIM)
    q = torch.nn.functional.rms_norm(q / 2 + direction, (DIM,))
    k[:, 300], v = share * direction, 1 + v / 4
    v[:, 300] = 2
    # Mostly the rounding of that one probability: 0.018 as exactly as float8 can have it.
    assert error_of(attend((q, k, v)), exact((q, k, v)).to(CUDA)) < 0.025


@gpu
@pytest.mark.usefixtures("_here")
def test_beside_other_columns(error_of: Callable) -> None:
    """Within wider rows, each of another scale: the same as in bfloat16 but for rounding; nothing else is touched."""
    q, k, v = (x.to(CUDA) for x in parts(129, 129, batch=2))
    (q8, dq), (k8, dk), (v8, dv) = to_float8_by_norm(q), to_float8_by_norm(k), to_float8(v, per_head=False)
    given = (q8, k8, for_wgmma(v8), torch.stack([dq, dk, dv]))
    expected = wgmma_attention.wgmma_attention(*given, False).float().flatten(2)
    scale = (v.abs().amax() / 448 * torch.linspace(1, 20, 2 * 129, device=CUDA)).view(2, 129, 1)
    rows = torch.full((2, 129, 2 * DIM + 64), 77, dtype=torch.uint8, device=CUDA).view(torch.float8_e4m3fn)
    wgmma_attention.wgmma_attention_beside(*given, rows, scale)
    assert error_of(rows[..., : 2 * DIM].float() * scale, expected) < 0.035
    assert (rows[..., 2 * DIM :].view(torch.uint8) == 77).all()


@gpu
@pytest.mark.usefixtures("_here")
def test_same_bits_every_time() -> None:
    given = parts(700, 900, heads=24)
    first = attend(given, in_float8=True)
    for _ in range(5):
        assert torch.equal(attend(given, in_float8=True), first)


@gpu
@pytest.mark.usefixtures("_here")
def test_counters_are_a_streams_own() -> None:
    own = cuda_kernel.counters(CUDA)
    assert cuda_kernel.counters(CUDA) is own
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        of_graph = cuda_kernel.counters(CUDA)
    with torch.cuda.stream(side):
        others = cuda_kernel.counters(CUDA)
    assert len({x.data_ptr() for x in (own, of_graph, others)}) == 3, "one that a graph makes is nobody else's"
    assert not others.any()


@gpu
@pytest.mark.usefixtures("_here")
def test_a_kernel_that_does_not_compile() -> None:
    broken = CudaKernel("wgmma_attention.cu", "wgmma_attention", "sm_90a", 0, (("STAGES", 7),))
    with pytest.raises(UserError, match=r"wgmma_attention\.cu doesn't compile: wgmma_attention\.cu\(") as error:
        cuda_kernel.machine_code(broken)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("tiles", "depth", "parts"),
    [
        *(
            (816, 34, 5),
            (864, 36, 5),
            (1632, 68, 5),
            (3456, 36, 5),
            (3264, 34, 4),
            (768, 32, 1),
            (132, 36, 1),
            (72, 3, 1),
        ),
        *((72, 8, 1), (16, 8, 2), (1, 36, 5)),
    ],
)
def test_tiles_that_are_left_are_shared_by_keys(tiles: int, depth: int, parts: int) -> None:
    assert wgmma_attention.shared_by(tiles, 132, depth) == parts
    assert ctypes.sizeof(wgmma_attention._Arguments) == 80, "as the kernel has it"


@gpu
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("many", [2, 3, 4, 5])
def test_shared_tiles_are_as_those_that_are_not(many: int, monkeypatch: pytest.MonkeyPatch, error_of: Callable) -> None:
    """On any GPU: a head's rising scores, 2600 keys, 24 heads of 300 rows; in rows beside others too."""
    q, k, v = (x.to(CUDA) for x in parts(300, 2600, heads=24, loud=2.0))
    k = k * torch.linspace(2, 0.1, 2600, device=CUDA)[None, :, None, None]
    (q8, dq), (k8, dk), (v8, dv) = to_float8_by_norm(q), to_float8_by_norm(k), to_float8(v, per_head=False)
    given = (q8, k8, for_wgmma(v8), torch.stack([dq, dk, dv]))
    scale = torch.full((1, 300, 1), v.abs().amax().item() / 448, device=CUDA)
    found = []
    for n in (1, many, many):
        monkeypatch.setattr(wgmma_attention, "shared_by", lambda tiles, blocks, depth, n=n: n)
        rows = torch.zeros(1, 300, 24 * DIM, device=CUDA).to(torch.float8_e4m3fn)
        wgmma_attention.wgmma_attention_beside(*given, rows, scale)
        found.append((wgmma_attention.wgmma_attention(*given, False).float(), rows.float()))
        assert not cuda_kernel.counters(CUDA).any(), "left as they were"
    (one, beside), (shared, shared_beside), again = found
    assert error_of(shared, one) < 0.01
    assert error_of(shared_beside, beside) < 0.03
    assert torch.equal(shared, again[0])
    assert torch.equal(shared_beside, again[1])
