"""CUDA graphs by kind of call: their bookkeeping anywhere, capture and replay on a GPU."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from utils.cuda_graph import Arguments, Graphed, Graphs, LeastRecentlyUsed
from utils.errors import UserError
from utils.files import ROOT


def key(*args: object, **kwargs: object) -> object:
    return Arguments.of(args, kwargs).key


def test_same_kind_of_call_has_the_same_key() -> None:
    first = key(torch.zeros(2, 3), [torch.zeros(1), 5], scale=2.0, flags={"a": None})
    second = key(torch.ones(2, 3), [torch.ones(1), 5], scale=2.0, flags={"a": None})
    assert first == second
    assert hash(first) == hash(second)
    assert key(torch.zeros(6).view(2, 3)) == key(torch.zeros(2, 3))
    assert key(x=float("nan")) == key(x=float("nan"))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.zeros(3, 2), 1), {}),
        ((torch.zeros(3, 2).t(), 1), {}),
        ((torch.zeros(2, 3, dtype=torch.bfloat16), 1), {}),
        ((torch.zeros(2, 3, device="meta"), 1), {}),
        ((torch.zeros(1, 3).expand(2, 3), 1), {}),
        ((torch.zeros(2, 3), 2), {}),
        ((torch.zeros(2, 3), 1.0), {}),
        ((torch.zeros(2, 3), True), {}),
        ((torch.zeros(2, 3), None), {}),
        ((torch.zeros(2, 3), torch.float32), {}),
        ((torch.zeros(2, 3), "1"), {}),
        ((torch.zeros(2, 3), (1,)), {}),
        ((torch.zeros(2, 3), torch.zeros(())), {}),
        ((torch.zeros(2, 3),), {"n": 1}),
        ((torch.zeros(2, 3),), {"m": 1}),
        ((1, torch.zeros(2, 3)), {}),
    ],
)
def test_other_kinds_of_call_have_other_keys(args: tuple, kwargs: dict) -> None:
    assert key(*args, **kwargs) != key(torch.zeros(2, 3), 1)
    assert key(*args, **kwargs) == key(*args, **kwargs)


def test_names_of_arguments_count() -> None:
    assert key(a=torch.zeros(1), b=None) != key(a=None, b=torch.zeros(1))
    assert key(a=1) != key(b=1)


def test_nested_arguments_are_put_together_with_other_tensors() -> None:
    old, new = torch.zeros(2), torch.ones(2)
    call = Arguments.of((old, {"x": [old, 3, None]}), {"flag": True, "pair": (old, "a")})
    assert len(call.tensors) == 3
    args, kwargs = call.put_together([new] * 3)
    assert args[0] is new
    assert args[1]["x"][0] is new
    assert args[1]["x"][1:] == [3, None]
    assert kwargs["flag"] is True
    assert kwargs["pair"][0] is new
    assert kwargs["pair"][1] == "a"


def test_unhashable_argument_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="unhashable type: 'set'") as raised:
        key(torch.zeros(1), {1, 2})
    assert "\n" not in str(raised.value)


def test_least_recently_used_makes_way() -> None:
    made: list[str] = []
    kept: LeastRecentlyUsed[str] = LeastRecentlyUsed(2)

    def get(name: str) -> str:
        return kept.get(name, lambda: made.append(name) or name.upper())

    assert [get(name) for name in "abacab"] == ["A", "B", "A", "C", "A", "B"]
    assert made == ["a", "b", "c", "b"], "b made way for c, which was asked for before a"
    assert list(kept.values) == ["a", "b"]


def test_nothing_is_kept_of_what_could_not_be_made() -> None:
    kept: LeastRecentlyUsed[int] = LeastRecentlyUsed(1)
    kept.get("a", lambda: 1)

    def fail() -> int:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        kept.get("b", fail)
    assert dict(kept.values) == {"a": 1}
    with pytest.raises(ValueError, match="at least 1"):
        LeastRecentlyUsed(0)


@pytest.mark.parametrize(("args", "found"), [((torch.zeros(1),), "cpu"), ((), "no tensor"), ((1, "a"), "no tensor")])
def test_call_without_a_cuda_device_is_refused(args: tuple, found: str) -> None:
    with pytest.raises(UserError, match=f"one CUDA device, found {found}"):
        Graphed(lambda *_: None, Graphs(1))(*args)


@pytest.mark.gpu
def test_outputs_are_safe_from_later_replays() -> None:
    graphed = Graphed(lambda x: {"double": x * 2, "same": x}, Graphs(2))
    inputs = [torch.full((4,), float(i), device="cuda") for i in range(4)]
    outputs = [graphed(x) for x in inputs]
    for i, output in enumerate(outputs):
        assert output["double"].tolist() == [2.0 * i] * 4
        assert output["same"].tolist() == [float(i)] * 4
    assert [x.tolist() for x in inputs] == [[float(i)] * 4 for i in range(4)]
    assert len(graphed.graphs.values) == 1


@pytest.mark.gpu
def test_warm_up_goes_before_capture_with_its_arguments() -> None:
    seen: list[tuple[str, int]] = []

    def function(x: torch.Tensor, n: int) -> torch.Tensor:
        seen.append(("function", n))
        return x * n

    graphed = Graphed(function, Graphs(2), warm_up=lambda x, n: seen.append(("warm-up", n)))
    assert graphed(torch.ones(1, device="cuda"), 3).item() == 3
    assert graphed(torch.full((1,), 2.0, device="cuda"), 3).item() == 6
    assert seen == [("warm-up", 3), ("warm-up", 3), ("function", 3)]


@pytest.mark.gpu
def test_every_kind_of_call_is_right_in_any_order() -> None:
    weight = torch.randn(8, 8, device="cuda")

    def function(x: torch.Tensor, pair: tuple[torch.Tensor, float], add: bool = False) -> tuple[torch.Tensor, ...]:
        y = x.to(weight.dtype) @ weight * pair[1]
        return y + pair[0] if add else y - pair[0], y

    graphed = Graphed(function, Graphs(3))  # fewer than there are kinds: they make way for each other
    one = torch.randn(1, device="cuda")
    calls = [
        ((torch.randn(2, 8, device="cuda"), (one, 1.0)), {}),
        ((torch.randn(2, 8, device="cuda"), (one, 2.0)), {}),
        ((torch.randn(2, 8, device="cuda"), (one, 2.0)), {"add": True}),
        ((torch.randn(5, 8, device="cuda"), (one.expand(8), 2.0)), {}),
        ((torch.randn(8, 2, device="cuda").t(), (one, 1.0)), {}),
        ((torch.randn(2, 8, device="cuda").double(), (one, 1.0)), {}),
    ]
    for index in [0, 1, 2, 3, 4, 5, 0, 5, 3, 1, 1, 4, 2, 0]:
        args, kwargs = calls[index]
        for got, expected in zip(graphed(*args, **kwargs), function(*args, **kwargs), strict=True):
            torch.testing.assert_close(got, expected)
    captured = graphed.graphs.values.values()
    assert len(captured) == 3
    assert len({one.graph.pool() for one in captured}) == 1


@pytest.mark.gpu
def test_what_no_graph_can_hold_is_refused_in_one_line() -> None:
    """In a process of its own, whose random numbers a capture that failed takes with it."""
    program = """
import torch
from utils.cuda_graph import Graphed, Graphs
from utils.errors import UserError
from utils.files import ROOT
try:
    Graphed(lambda x: x * x.sum().item(), Graphs(1))(torch.ones(2, device="cuda"))
except UserError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = run.stdout.splitlines()
    assert re.fullmatch(r"cuda_graph: a call can't be captured \(.*capturing.*\): use cuda_graph=false", line)


@pytest.mark.gpu
@pytest.mark.parametrize("by_call", [False, True], ids=["said", "by-a-packages-call"])
def test_memory_that_runs_out_in_a_capture_is_no_call_that_cannot_be_captured(by_call: bool) -> None:
    """In a process of its own, as above."""
    program = """
import sys
import torch
from utils.cuda_graph import Graphed, Graphs
from utils.errors import OutOfMemoryError, advising
def function(x):
    try:
        return x + torch.empty(2**45, device="cuda")
    except torch.OutOfMemoryError:
        if sys.argv[1] == "False":
            raise
    raise RuntimeError("aoti_torch_empty_strided() API call failed at a.cpp, line 7")
try:
    with advising("here", lambda: "use less"):
        Graphed(function, Graphs(1), warm_up=lambda x: None)(torch.ones(2, device="cuda"))
except OutOfMemoryError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(by_call)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"out of memory here \(peak \d+\.\d GiB on .+\): use less\n", run.stdout)


@pytest.mark.gpu
def test_graphs_share_their_memory() -> None:
    """Six graphs with 64 MiB of intermediates each take little more than one."""

    def function(x: torch.Tensor, n: int) -> torch.Tensor:
        return (x.expand(2**24, 1) + n).sum()

    def reserved_after(kinds: int) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphed = Graphed(function, Graphs(8))
        for n in range(kinds):
            graphed(x, n)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    x = torch.ones(1, device="cuda")
    Graphed(function, Graphs(1))(x, 0)  # what the first capture of a process sets up
    one, six = reserved_after(1), reserved_after(6)
    assert one >= 2**26
    assert six < one + 2**26


@pytest.mark.gpu
def test_replay_waits_for_nothing(waiting_is_an_error: Callable) -> None:
    graphed = Graphed(lambda x, y: x @ y, Graphs(2))
    x, y = torch.ones(16, 16, device="cuda"), torch.ones(16, 16, device="cuda").t()
    graphed(x, y)
    with waiting_is_an_error():
        results = [graphed(x, y) for _ in range(3)]
    assert all(float(result[0, 0]) == 16 for result in results)


@pytest.mark.gpu
def test_in_and_out_of_inference_mode() -> None:
    graphed = Graphed(lambda x: x + 1, Graphs(2))
    with torch.inference_mode():
        inside = graphed(torch.zeros(2, device="cuda"))
    outside = graphed(torch.ones(2, device="cuda", requires_grad=True))
    assert inside.tolist() == [1, 1]
    assert outside.tolist() == [2, 2]
    assert not outside.requires_grad
