"""What can't be trusted is named, and left blank."""

from __future__ import annotations

import pytest

from trace_analysis import markdown, tables


def names(report) -> list[str]:
    return [finding.name for finding in report.findings]


def test_nothing_is_wrong_with_a_good_trace(two_steps) -> None:
    assert two_steps.analyse().report.findings == ()


def test_clock_skew(two_steps) -> None:
    two_steps.kernel("gemm", 250, 248.5, 5)
    report = two_steps.analyse().report
    assert names(report) == ["clock_skew"]
    assert "1 kernels begin before their launch, by up to 1.500 us" in report.findings[0].message
    assert report.gaps is None
    assert report.syncs is None
    assert report.kinds is not None
    text = markdown.document("x", tables.report_tables(report))
    assert text.count("left blank: clock skew") == 3


def test_missing_device_properties(two_steps) -> None:
    two_steps.properties["deviceProperties"] = []
    report = two_steps.analyse().report
    assert names(report) == ["no_device_properties"]
    assert report.rates.gpu is None


@pytest.mark.parametrize(("lost", "blank"), [(1, False), (10, True)])
def test_kernels_without_launch(two_steps, lost: int, blank: bool) -> None:
    for i in range(200):
        two_steps.kernel("gemm", 140 + i / 4, 400 + i, 1)
    for i in range(lost):
        two_steps.run("lost", 700 + i, 1, 10**6 + i)
    report = two_steps.analyse().report
    assert names(report) == ["no_launch"]
    assert f"{lost} of {207 + lost} kernels" in report.findings[0].message
    assert (report.kinds is None) == (report.rates is None) == blank
    assert all((step.device is None) == blank for step in report.steps)


@pytest.mark.parametrize("capture", [False, True])
def test_launches_without_kernel(two_steps, capture: bool) -> None:
    for i in range(5):
        two_steps.call("cudaLaunchKernel", 150 + i, 1)
    if capture:
        two_steps.call("cudaStreamBeginCapture_v10000", 149, 1)
    report = two_steps.analyse().report
    assert names(report) == ([] if capture else ["dropped_kernels"])
    assert (report.kinds is None) != capture


def test_graph_launches_without_kernels(two_steps) -> None:
    two_steps.call("cudaGraphLaunch", 150, 5)
    report = two_steps.analyse().report
    assert names(report) == ["graph_without_kernels"]
    assert report.kinds is report.rates is report.gaps is None
    assert all(step.device is None for step in report.steps)


def test_overlapping_steps(two_steps) -> None:
    two_steps.step(150, 100)
    report = two_steps.analyse().report
    assert names(report) == ["overlapping_steps"]
    assert "2 ranges" in report.findings[0].message
    assert report.rates is None
    assert all(step.device is None for step in report.steps)
    assert report.median_step is not None


def test_several_devices(two_steps) -> None:
    correlation = two_steps.call("cudaLaunchKernel", 150, 1)
    two_steps.run("gemm", 160, 10, correlation, device=1)
    report = two_steps.analyse().report
    assert "several_devices" in names(report)
    assert report.steps[0].device.kernels == 4


def test_unreadable_events_leave_the_rates_blank(two_steps) -> None:
    two_steps.host("a", 110, -1)
    report = two_steps.analyse().report
    assert names(report) == ["unreadable_events"]
    assert report.rates is report.gaps is None


def test_a_function_of_the_host_has_no_kernel(two_steps) -> None:
    before = two_steps.analyse().report
    for i in range(5):
        two_steps.call("cudaLaunchHostFunc", 150 + i, 1)
    report = two_steps.analyse().report
    assert report.findings == ()
    assert [s.device.kernel_launches for s in report.steps] == [s.device.kernel_launches for s in before.steps]
