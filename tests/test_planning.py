"""`netgloss plan`: its arithmetic, and the command on the network that ships with netgloss."""

from __future__ import annotations

import dataclasses

import pytest

from netgloss.cli import main
from netgloss.cli.plan import duration, size
from netgloss.workflows.plan import Job, Machine, Rates, plan

RATES = Rates(
    forward=100.0,
    flops=1e9,
    decode=50.0,
    write=1e8,
    read=2e8,
    image_bytes=10_000,
    compression=0.5,
    rows_per_image=49,
    features=1000,
    fit_rows=10_000.0,
    evaluate=20.0,
    base_memory=500_000_000,
)


def test_the_slowest_of_three_limits_the_capture() -> None:
    """By hand: 1000 images at min(100 forward, 4 x 50 decode, 1e8 / 1e4 written) = 100 images/s."""
    here = plan(RATES, Job(1000), Machine("here", cores=4))
    assert (here.limit, here.seconds["capture"]) == ("the network", 10.0)
    gpu = plan(RATES, Job(1000), Machine("gpu", flops=1e12, cores=4))
    assert (gpu.limit, gpu.seconds["capture"]) == ("decoding", 5.0)
    slow = plan(RATES, Job(1000), Machine("slow", processes=8, flops=1e13, cores=40, disk=1e6))
    assert (slow.limit, slow.seconds["capture"]) == ("writing", 10.0)
    assert here.disk == 1000 * 10_000 * 0.5


def test_more_processes_and_nodes_share_the_work() -> None:
    one = plan(RATES, Job(10**6), Machine("1", flops=1e12, cores=8))
    many = plan(RATES, Job(10**6), Machine("64", 8, 8, flops=1e12, cores=8))
    assert one.seconds["capture"] == pytest.approx(64 * many.seconds["capture"])
    assert many.seconds["fit, statistics"] == one.seconds["fit, statistics"]  # every process passes over its rows
    assert many.seconds["evaluate"] < one.seconds["evaluate"]
    assert many.memory == one.memory  # of each process


def test_small_data_is_read_once_and_kept() -> None:
    job = Job(1000, seeds=1, steps=10, batch_size=100)
    found = plan(RATES, job, Machine("here"))
    assert found.seconds["fit, steps"] == pytest.approx(1000 / 10_000 + 800 * 10_000 / 2e8)
    assert found.memory == 500_000_000 + 600 * 1000 + 2 * 800 * 10_000
    assert plan(RATES, dataclasses.replace(job, seeds=3), Machine("here")).seconds["fit, steps"] == pytest.approx(
        3 * found.seconds["fit, steps"]
    )


def test_times_and_sizes_are_told_in_fitting_units() -> None:
    assert [duration(s) for s in (5, 90, 600, 3 * 3600, 10 * 86400)] == ["5 s", "90 s", "10 min", "3 h", "10 days"]
    assert [size(n) for n in (5e6, 2.5e9, 3e12)] == ["5 MB", "2.5 GB", "3 TB"]


def test_the_command_measures_and_says_that_no_gpu_was(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model", "critters", "--layer", "block5", "--num-images", "1000", "--num-concepts", "8",
          "--batch-size", "64"])  # fmt: skip
    said = capsys.readouterr().out
    for part in ("GFLOP an image", "1,000 images", "8 nodes of 8 GPUs", "nothing was measured on a GPU", "limited by"):
        assert part in said


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--gpu-tflops", "0"], ["--disk-gb-s", "nan"], ["--num-images", "0"], ["--seeds", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(["plan", "--model", "critters", "--layer", "block5", *flags])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
