"""Tars and parquet files as inputs: their images are those of a folder, and nothing in them does harm."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from archives import contents, write_parquet, write_tar
from conftest import every_row, without
from PIL import Image

from brixel_cli.data.inputs import Inputs, Item, find_inputs
from brixel_cli.data.references import default_output, with_braces
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.errors import BrixelError, UsageError

POOLS: list[object] = []


def reasons(*references: str, **options) -> dict[str, str]:
    return {item.name: item.reason for item in find_inputs(references, 1, **options).items}


def pixels(found: Inputs, item: Item) -> np.ndarray:
    with found.decoded(item) as image:
        return np.asarray(image)


def png(width: int = 40, height: int = 30, colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path: Path, photographs: Path) -> list[Path]:
    """The eight photographs in two tars, and what stands beside them in a data set."""
    (tmp_path / "tars").mkdir()
    files = list(contents(photographs).items())
    return [
        write_tar(
            tmp_path / "tars" / f"photos-{number:03}.tar",
            {"__config__/meta.json": b"{}", **dict(files[number * 4 : number * 4 + 4]), f"{number * 4}.cls": b"7"},
        )
        for number in range(2)
    ]


def test_the_images_of_tars_are_those_of_a_folder(tars: list[Path], photographs: Path, extract_options, listener):
    """Also by rows: names, sizes and features."""
    reference = str(tars[0].parent / "photos-{000..001}.tar")
    found = find_inputs([reference], 1)
    assert [item.name for item in found.items] == [f"photos-{n // 4:03}.tar/{n}.png" for n in range(8)]
    assert found.root == tars[0].parent
    for item, path in zip(found.items, sorted(photographs.iterdir()), strict=True):
        assert (item.height, item.width, item.file_size) == (160, 200, path.stat().st_size)
        assert (pixels(found, item) == np.asarray(Image.open(path))).all()
    folder = tars[0].parent / "of_tars.h5"
    extract(extract_options(inputs=[reference], output=folder), listener)
    extract(extract_options(), listener)
    of_tars, of_folder = every_row(folder), every_row(extract_options().output)
    assert [name.partition("/")[2] for name in of_tars] == list(of_folder)
    assert list(of_tars.values()) == list(of_folder.values())


def test_an_interrupted_run_over_tars_is_continued(tars: list[Path], extract_options, listener, monkeypatch):
    options = extract_options(inputs=list(map(str, tars)), batch_size=1)
    stop = iter([None, None, None, KeyboardInterrupt])
    whole = FeatureExtractor.maps

    def interrupted(self, images):
        if next(stop, None):
            raise KeyboardInterrupt
        return whole(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractor, "maps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(options, listener)
    done = extract(options, listener)
    assert 1 <= done.num_before <= 3
    assert done.num_before + done.num_computed == 8
    tars[0].write_bytes(tars[0].read_bytes().replace(b"{}", b"[]", 1))
    with pytest.raises(UsageError, match="4 images have changed since: photos-000.tar/0.png"):
        extract(options, listener)


def test_a_tar_of_webdataset_has_the_names_and_images_that_webdataset_reads(tmp_path: Path, photographs: Path):
    webdataset = pytest.importorskip("webdataset", reason="needs the package webdataset")
    files = contents(photographs)
    with webdataset.ShardWriter(f"file:{tmp_path}/photos-%03d.tar", maxcount=3, verbose=0) as writer:
        for name, data in files.items():
            key = f"sub/{Path(name).stem}"
            writer.write({"__key__": key, "left.png": data, "right.png": png(), "cls": 3, "json": {"a": 1}})
    found = find_inputs([f"{tmp_path}/photos-{{000..002}}.tar"], 1)
    samples = list(webdataset.WebDataset(f"{tmp_path}/photos-{{000..002}}.tar", shardshuffle=False))
    expected = {
        f"{Path(sample['__url__']).name}/{sample['__key__']}.{field}": sample[field]
        for sample in samples
        for field in sample
        if field.endswith("png")
    }
    assert [item.name for item in found.items] == list(expected)
    assert len(expected) == 16
    for item in found.items:
        data = found.fetcher.contents(item.path, item.part, item.file_size)
        assert data == expected[item.name]


def test_bad_members_are_named_and_the_others_are_taken(tmp_path: Path):
    whole = png()
    path = write_tar(
        tmp_path / "a.tar",
        {
            "good.png": whole,
            "../../out.png": whole,
            "/root.png": whole,
            "text.png": b"no image",
            "half.png": whole[:40],
            "good.png ": b"not taken: no extension of an image",
            ".hidden.png": whole,
            "empty.png": b"",
            "n" * 2000 + ".png": whole,
            "\x1b[2J.png": whole,
        },
    )
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.FIFOTYPE, "pipe.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("good.png")
        info.size = len(whole)
        tar.addfile(info, io.BytesIO(whole))
    found = reasons(str(path))
    (long,) = [name for name in found if name.startswith("a.tar/nnn")]
    assert len(long) < 100
    assert found.pop(long) == "its name is too long: 2,004 bytes, over 1,024"
    assert found.pop("a.tar/half.png")  # Pillow's words
    assert found == {
        "a.tar/good.png": "",
        "a.tar/__/__/out.png": "its name leads out of its folder",
        "a.tar/root.png": "",
        "a.tar/text.png": "not an image of a format that brixel reads",
        "a.tar/empty.png": "empty: 0 bytes",
        "a.tar/\x1b[2J.png": "",
        "a.tar/link.png": "a link, pipe or device, not a file",
        "a.tar/pipe.png": "a link, pipe or device, not a file",
        "a.tar/good.png#2": "an earlier image has the same name",
    }


def test_a_damaged_tar_gives_what_comes_before_the_damage(tmp_path: Path):
    data = write_tar(tmp_path / "a.tar", {f"{n}.png": png(40 + n) for n in range(4)}).read_bytes()
    # Every member has a header of 512 bytes and one block of 512 for its 80 bytes.
    (tmp_path / "a.tar").write_bytes(data[:2048] + b"x" * 512 + data[2560:])
    found = reasons(str(tmp_path / "a.tar"))
    damage = "the tar is damaged from byte 2,048 on: no header of an entry"
    assert found == {"a.tar/0.png": "", "a.tar/1.png": "", "a.tar/#2048": damage}
    (tmp_path / "a.tar").write_bytes(data[: 3 * 1024 + 512 + 30])
    found = reasons(str(tmp_path / "a.tar"))
    assert found["a.tar/2.png"] == ""
    assert found["a.tar/3.png"].startswith("cut off: 30 of ")
    assert found["a.tar/#3072"].startswith("the tar is damaged from byte 3,072 on: ")


def test_what_is_no_tar_or_has_no_image_says_so(tmp_path: Path, tars: list[Path]):
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "folder.tar").mkdir()
    write_tar(tmp_path / "none.tar", {"a.txt": b"x"})
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tars[0], "x.tar")
    (tmp_path / "list.txt").write_text("text.tar\nempty.tar\nnone.tar\na.tar.gz\ngone.tar\nfolder.tar\n")
    assert reasons(str(tmp_path / "list.txt")) == {
        "text.tar": "not a tar",
        "empty.tar": "empty: 0 bytes",
        "none.tar": "no images in it",
        "a.tar.gz": "a compressed tar: decompress it, for images do not get smaller",
        "gone.tar": "No such file or directory",
        "folder.tar": "a folder",
    }


def test_a_missing_tar_of_a_range_is_a_row_that_failed(tars: list[Path]):
    found = reasons(str(tars[0].parent / "photos-{000..002}.tar"))
    assert len(found) == 9
    assert found["photos-002.tar"] == "No such file or directory"


def test_a_header_cannot_ask_for_more_memory_than_a_header_has(tmp_path: Path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (tmp_path / "bomb.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert reasons(str(tmp_path / "bomb.tar")) == {"bomb.tar": "not a tar"}


def test_a_tar_that_became_shorter_fails_row_by_row(tars: list[Path]):
    found = find_inputs([str(tars[0])], 1)
    tars[0].write_bytes(tars[0].read_bytes()[:2000])
    with pytest.raises(BrixelError, match="cut off: "):
        pixels(found, found.items[-1])


def test_no_damage_to_a_tar_raises_anything_but_our_own_error(tmp_path: Path, tars: list[Path]):
    whole, rng = tars[0].read_bytes(), np.random.default_rng(0)
    path = tmp_path / "damaged.tar"
    for number in range(60):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: rng.integers(len(data))]
        for at in rng.integers(0, 1024 if number % 2 else len(data), 20):
            data[at % max(len(data), 1) : at % max(len(data), 1) + 1] = bytes([rng.integers(256)])
        path.write_bytes(data)
        found = find_inputs([str(path)], 1)
        for item in found.items:
            if not item.reason:
                try:
                    pixels(found, item)
                except BrixelError:
                    continue


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..10}", ["a-8", "a-9", "a-10"]),
        ("a-{2..1}", ["a-2", "a-1"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("a{}{b}", ["a{}{b}"]),
    ],
)
def test_braces_stand_for_names(text: str, names: list[str]):
    assert with_braces(text) == names


def test_braces_have_limits_and_a_file_of_that_name_comes_first(tmp_path: Path):
    for text in ("a{0..1000000}", "{0..9999}{0..9999}"):
        with pytest.raises(UsageError, match="the braces stand for more than 1,000,000 names"):
            with_braces(text)
    (tmp_path / "a{0..2}.png").write_bytes(png())
    assert list(reasons(str(tmp_path / "a{0..2}.png"))) == ["a{0..2}.png"]


def test_tars_in_a_folder_are_passed_over_and_named(tars: list[Path], photographs: Path):
    folder = tars[0].parent
    message = r"but 2 tars or parquet files, which are passed over unless they are named: --input '.*tars/\*.tar'"
    with pytest.raises(UsageError, match=message):
        find_inputs([str(folder)], 1)
    shutil.copy(photographs / "0.png", folder)
    assert find_inputs([str(folder)], 1).passed_over == tars
    assert find_inputs([str(folder), str(tars[1])], 1).passed_over == tars[:1]


def test_the_output_of_tars_lies_beside_them(tars: list[Path]):
    folder = tars[0].parent
    assert default_output([str(folder / "photos-{000..063}.tar")], ".h5") == folder / "photos.h5"
    assert default_output([str(folder / "{000..063}.tar")], ".h5") == folder / "tars.h5"
    assert default_output([str(tars[0])], ".h5") == folder / "photos-000.h5"


# Parquet


@pytest.fixture
def parquet(tmp_path: Path, photographs: Path) -> Path:
    """The eight photographs in three row groups."""
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    images = [{"bytes": data, "path": name} for name, data in contents(photographs).items()]
    return write_parquet(tmp_path / "train.parquet", images)


def test_the_images_of_parquet_are_those_of_a_folder(parquet: Path, extract_options, listener):
    options = extract_options(inputs=[str(parquet)], output=parquet.with_suffix(".h5"), batch_size=3)
    extract(options, listener)
    extract(extract_options(batch_size=3), listener)
    found, of_folder = every_row(options.output), every_row(extract_options().output)
    assert list(found) == [f"train.parquet/{name}" for name in of_folder]
    assert list(found.values()) == list(of_folder.values())
    assert extract(options, listener).num_before == 8


def test_rows_of_parquet_are_read_in_any_order(parquet: Path, photographs: Path):
    found, files = find_inputs([str(parquet)], 1), list(contents(photographs).values())
    order = [0, 2, 1, 7, 6, 3, 4, 5, 0]
    assert [found.items[row].part for row in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]
    assert [found.fetcher.contents(found.items[row].path, found.items[row].part, 0) for row in order] == [
        files[row] for row in order
    ]
    with found.fetched_ahead([found.items[row] for row in order[:-1]]):
        for row in order[:-1]:
            item = found.items[row]
            assert found.fetcher.contents(item.path, item.part, 0) == files[row]


def test_rows_of_parquet_without_an_image_are_named(tmp_path: Path):
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    lacking = "the row has no bytes of an image; a path to another file is not followed"
    images = [
        {"bytes": png(), "path": None},
        {"bytes": None, "path": "/etc/passwd"},
        None,
        {"bytes": png(), "path": "/home/somebody/cat.png"},
        {"bytes": png(), "path": "C:\\photos\\dog.png"},
        {"bytes": png(), "path": "../cat.png"},
        {"bytes": b"no image", "path": "text.png"},
    ]
    assert reasons(str(write_parquet(tmp_path / "a.parquet", images))) == {
        "a.parquet/0": "",
        "a.parquet/passwd": lacking,
        "a.parquet/2": lacking,
        "a.parquet/cat.png": "",
        "a.parquet/dog.png": "",
        "a.parquet/__/cat.png": "its name leads out of its folder",
        "a.parquet/text.png": "not an image of a format that brixel reads",
    }


def test_the_column_of_images_is_found_or_named(tmp_path: Path):
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    image = {"bytes": png(), "path": None}
    path = str(write_parquet(tmp_path / "a.parquet", [image], thumb=[{"bytes": png(20, 20), "path": None}]))
    assert [item.width for item in find_inputs([path], 1).items] == [40]  # `image` comes before others
    assert [item.width for item in find_inputs([path], 1, column="thumb").items] == [20]
    with pytest.raises(UsageError, match=r"a.parquet: --column label: no column of images; there are image, thumb\."):
        find_inputs([path], 1, column="label")
    path = str(write_parquet(tmp_path / "b.parquet", [None], image=[png()]))
    assert reasons(path) == {"b.parquet/0": ""}  # plain bytes
    path = str(write_parquet(tmp_path / "c.parquet", [None], image=[3], left=[image], right=[image]))
    with pytest.raises(UsageError, match="Several columns of images: name one with --column, of left, right"):
        find_inputs([path], 1)
    path = str(write_parquet(tmp_path / "d.parquet", [None], image=["text"]))
    with pytest.raises(UsageError, match="No column of images among label, image: it has fields bytes and path"):
        find_inputs([path], 1)


def test_damaged_parquet_is_named(parquet: Path, tmp_path: Path):
    data = bytearray(parquet.read_bytes())
    at = data.index(b"\x89PNG", data.index(b"\x89PNG") + 1)
    data[at - 40 : at] = bytes(40)  # lengths of a page of the first row group
    (tmp_path / "damaged.parquet").write_bytes(data)
    (tmp_path / "text.parquet").write_text("no parquet")
    found = find_inputs([str(tmp_path / "damaged.parquet"), str(tmp_path / "text.parquet")], 1)
    by_name = {item.name: item.reason for item in found.items}
    assert by_name.pop("text.parquet").startswith("not a parquet file that can be read: ")
    assert [name for name, reason in by_name.items() if not reason][-5:] == [
        f"damaged.parquet/{n}.png" for n in range(3, 8)
    ]
    assert any(reason for reason in by_name.values())


def test_a_row_group_that_does_not_fit_into_memory_is_not_decoded(parquet: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("brixel_cli.data.parquet.main_memory", lambda: 1000)
    found = reasons(str(parquet))
    assert list(found) == [f"train.parquet/#row_group_{number}" for number in range(3)]
    reason = r"Row group 2 needs about .* of memory, and 1000 B are free\. Write the file with smaller row groups\."
    assert re.fullmatch(reason, found["train.parquet/#row_group_2"])


def test_rows_that_share_one_image_are_decoded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """24 rows name an image of 4 MiB, which the file holds once: it, a row and its copy are 3 times 4 MiB."""
    pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    image = png() + bytes(4 << 20)
    table = pa.table({"image": [{"bytes": image, "path": f"{number}.png"} for number in range(24)]})
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 24)
    assert (tmp_path / "a.parquet").stat().st_size < 5 << 20
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        assert set(reasons(str(tmp_path / "a.parquet")).values()) == {""}
    finally:
        pa.set_memory_pool(usual)
        POOLS.append(pool)  # what was taken from it may live on
    assert 4 << 20 < pool.max_memory() < 16 << 20


def test_parquet_needs_its_extra(parquet: Path, monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, "pyarrow")
    with pytest.raises(
        UsageError, match=r"A parquet file needs pyarrow, not installed: pip install 'brixel\[parquet\]'"
    ):
        find_inputs([str(parquet)], 1)
