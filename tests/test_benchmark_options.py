"""Options that commands share, devices, sizes and budgets, and what does not go together in a benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from brixel_cli.config.base import check_device, parse_bytes, parse_sizes
from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.config.files import load_recipe
from brixel_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("112", [(112, 112)]),
        ("96x128", [(96, 128)]),
        ("84, 112,168", [(84, 84), (112, 112), (168, 168)]),
        # 128 * 4^(k/4): 128, 181.02, 256, 362.04, 512; to multiples of 16.
        ("128..512", [(128, 128), (176, 176), (256, 256), (368, 368), (512, 512)]),
        ("112..112x1", None),
        ("32..48", [(32, 32), (48, 48)]),  # of 32, 35.4, 39.2, 43.4, 48 two are left
    ],
)
def test_sizes(text: str, sizes: list[tuple[int, int]] | None) -> None:
    if sizes is None:
        with pytest.raises(UsageError):
            parse_sizes(text, 16)
    else:
        assert parse_sizes(text, 16) == sizes


def test_sizes_given_one_by_one_are_left_as_they_are() -> None:
    assert parse_sizes("100", 16) == [(100, 100)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("big", "--res takes a side in pixels, such as 112, or HEIGHTxWIDTH, such as 288x384; not big."),
        ("0", "--res takes a side in pixels, such as 112, or HEIGHTxWIDTH, such as 288x384; not 0."),
        ("512..128", "--res 512..128: a range runs from a smaller side to a larger one: 128..512."),
    ],
)
def test_wrong_sizes_are_found_before_any_work(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        BenchmarkOptions(sizes=text)


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4_000_000_000), ("1.5 GiB", 1_610_612_736), ("512mb", 512_000_000), ("100", 100)]
)
def test_budgets(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "4 gigs", "GB", "-4GB", "0GB"])
def test_wrong_budgets(text: str) -> None:
    with pytest.raises(
        UsageError, match=re.escape(f"--budget must be a size such as 4GB, 512MiB or 800MB, not {text}.")
    ):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_images": 0}, "--max-images must be at least 1, not 0."),
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0."),
        ({"batch_size": 10**20}, "--batch-size must be at most 1,000,000, not 1e+20."),
        (
            {"sizes": "1" * 5000},
            f"--res takes a side in pixels, such as 112, or HEIGHTxWIDTH, such as 288x384; not {'1' * 40}....",
        ),
        ({"budget": "1" * 5000}, f"--budget must be a size such as 4GB, 512MiB or 800MB, not {'1' * 40}...."),
        ({"seconds": 0.0}, "--seconds must be above 0, not 0."),
        ({"models": "a", "checkpoint": "b"}, "--models names recipes and run folders, --checkpoint one student"),
    ],
)
def test_what_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        BenchmarkOptions(**options)  # type: ignore[arg-type]


def test_the_command_line_says_what_differs_from_the_defaults() -> None:
    assert BenchmarkOptions().command == "brixel benchmark"
    options = BenchmarkOptions(
        highres=True, sizes="84,112", images=Path("my photos"), compiled=True, seconds=5.0, baselines=("a.py:f", "b:g")
    )
    assert options.command == (
        "brixel benchmark --compare-highres --res 84,112 --images 'my photos' --compile --seconds 5 "
        "--baseline a.py:f --baseline b:g"
    )


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:1"])
def test_devices(device: str) -> None:
    assert load_recipe("demo", [f"run.device={device}"]).run.device == device
    check_device(device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:one", "CPU", ""])
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(UsageError, match="--device: a device is auto, cpu, cuda, cuda:1"):
        check_device(device)
    with pytest.raises(UsageError, match="run.device: a device is auto"):
        load_recipe("demo", [f"run.device='{device}'"])
