"""Buckets and web servers as inputs: what is read is what a folder holds, and faults fail rows that are tried again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from archives import contents, write_parquet, write_tar
from conftest import Listener, every_row, without
from PIL import Image

from brixel_cli import FeatureFile
from brixel_cli.cli.extract import _advice
from brixel_cli.config.shard import Shard
from brixel_cli.data import fetching, remote
from brixel_cli.data.inputs import find_inputs
from brixel_cli.data.references import default_output
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.errors import UnreachedError, UsageError

s3fs = pytest.importorskip("s3fs", reason="needs the extra remote")
pytest.importorskip("moto", reason="needs the package moto")
from object_store import KEY, SECRET, ObjectStore, running  # noqa: E402


@pytest.fixture(scope="module")
def server(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """The eight photographs as objects, in a tar and in a parquet file."""
    folder, files = tmp_path_factory.mktemp("stored"), contents(photographs)
    started = running()
    store = next(started)
    for name, data in files.items():
        store.put(f"photos/{name}", data)
    store.put("photos/notes.md", b"no image")
    store.put("sets/photos.tar", write_tar(folder / "a.tar", files).read_bytes())
    images = [{"bytes": data, "path": name} for name, data in files.items()]
    store.put("sets/photos.parquet", write_parquet(folder / "a.parquet", images).read_bytes())
    yield store
    next(started, None)


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    for name, value in {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": server.endpoint,
                        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    server.requests.clear()
    yield server
    server.faults.clear()
    s3fs.S3FileSystem.clear_instance_cache()


def names(*references: str, **options) -> list[str]:
    return [item.name for item in find_inputs(references, 1, **options).items]


def fetched(reference: str) -> bytes:
    """The contents of the only image that a reference names."""
    found = find_inputs([reference], 1)
    (item,) = found.items
    assert not item.reason
    return found.fetcher.contents(item.path, item.part, item.file_size)


SOON = 1.5
"""Seconds of a time-out; a slow answer takes twice as long."""
EIGHT = [f"{number}.png" for number in range(8)]


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("s3://bucket/photos/*.png", EIGHT),
        ("s3://bucket/photos", EIGHT),
        ("s3://bucket/photos/{6..7}.png", EIGHT[6:]),
        ("s3://bucket/photos/7.png", EIGHT[7:]),
        ("s3://bucket/sets/photos.tar", [f"photos.tar/{name}" for name in EIGHT]),
        ("s3://bucket/sets/*.parquet", [f"photos.parquet/{name}" for name in EIGHT]),
    ],
)
def test_the_images_of_a_bucket_are_those_of_a_folder(
    store: ObjectStore, photographs: Path, reference: str, found: list[str]
):
    inputs = find_inputs([reference], 1)
    assert [item.name for item in inputs.items] == found
    for item in inputs.items:
        with inputs.decoded(item) as image:
            assert (np.asarray(image) == np.asarray(Image.open(photographs / Path(item.name).name))).all()
    assert str(inputs.root) in ("s3://bucket/photos/", "s3://bucket/sets/")


def test_a_web_server_gives_files_and_tars(store: ObjectStore, photographs: Path):
    address = f"{store.endpoint}/bucket"
    assert fetched(f"{address}/photos/3.png") == (photographs / "3.png").read_bytes()
    assert names(f"{address}/sets/photos.tar") == [f"photos.tar/{name}" for name in EIGHT]
    (item,) = find_inputs([f"{address}/photos/none.png"], 1).items
    assert (item.name, item.reason) == ("none.png", "not fetched: nothing of that name")


def test_a_web_server_cannot_send_brixel_to_a_host_that_was_not_named(store: ObjectStore, photographs: Path):
    address = f"{store.endpoint}/bucket/moved"
    assert fetched(f"{address}/-/photos/3.png") == (photographs / "3.png").read_bytes()
    store.requests.clear()
    reason = "not fetched: the server sends this request on to localhost, which --input does not name"
    for name in ("photos/3.png", "sets/photos.tar"):
        (item,) = find_inputs([f"{address}/localhost/{name}"], 1).items
        assert item.reason == reason
    with pytest.raises(UsageError, match=rf"cannot be read as a list of paths, one a line: {reason}\."):
        find_inputs([f"{address}/localhost/list.txt"], 1)
    with pytest.raises(UnreachedError, match=reason):
        remote.fetch(remote.Url(f"{address}/localhost/photos/3.png"), 0, 9)
    assert not store.requests


@pytest.mark.parametrize("reference", ["photos", "sets/photos.tar", "sets/photos.parquet"])
def test_a_run_over_a_bucket_gives_the_rows_of_a_folder(store: ObjectStore, extract_options, listener, reference: str):
    output = extract_options().output.with_name("remote.h5")
    options = extract_options(inputs=[f"s3://bucket/{reference}"], output=output, batch_size=3)
    extract(options, listener)
    extract(extract_options(batch_size=3), listener)
    found, expected = every_row(output), every_row(extract_options().output)
    assert [name.rpartition("/")[2] for name in found] == list(expected)
    assert list(found.values()) == list(expected.values())
    assert FeatureFile(output).description["root"] in ("s3://bucket/photos/", "s3://bucket/sets/")
    assert extract(options, listener).num_before == 8


def test_an_output_is_copied_to_a_bucket(
    store: ObjectStore, extract_options, listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    options = extract_options(inputs=["s3://bucket/photos"], output=Path("a.h5"), upload="s3://bucket/out/a.h5")
    assert extract(options, listener).uploaded == "s3://bucket/out/a.h5"
    copied = store.client.get_object(Bucket="bucket", Key="out/a.h5")["Body"].read()
    assert copied == Path("a.h5").read_bytes()
    assert SECRET.encode() not in copied + store.client.get_object(Bucket="bucket", Key="out/a.h5.done")["Body"].read()


def test_a_tar_is_streamed_by_a_few_large_requests(store: ObjectStore):
    found = find_inputs(["s3://bucket/sets/photos.tar"], 1)
    assert store.requests["sets/photos.tar"] == 1  # its 720 KB are less than a request
    with found.fetched_ahead(found.items):
        for item in found.items:
            found.fetcher.contents(item.path, item.part, item.file_size)
    assert store.requests["sets/photos.tar"] == 2


def test_images_come_before_they_are_asked_for_but_not_all_of_them(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    found = find_inputs(["s3://bucket/photos"], 1)
    before = sum(store.requests.values())
    largest = max(item.file_size for item in found.items)
    monkeypatch.setattr(fetching, "AHEAD_BYTES", 2 * largest)
    with found.fetched_ahead(found.items):
        first, *others = found.items
        found.fetcher.contents(first.path, first.part, first.file_size)
        deadline = time.monotonic() + 10
        while sum(store.requests.values()) - before < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert 3 <= sum(store.requests.values()) - before <= 4  # one was asked for, and two or three are ahead
        for item in others:
            assert len(found.fetcher.contents(item.path, item.part, item.file_size)) == item.file_size
    assert sum(store.requests.values()) - before == 8
    assert found.fetcher._bytes_ahead == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("slow", r"timed out \(2 attempts\)"),
        ("drop", r"(timed out|.*(onnection|endpoint).*) \(2 attempts\)"),
        ("cut", r".* \(2 attempts\)"),
        ("forbid", "permission denied"),
    ],
)
def test_a_fault_fails_the_row_with_the_reason_and_the_same_command_tries_it_again(
    store: ObjectStore, extract_options, listener: Listener, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
):
    monkeypatch.setattr(remote, "TIME_OUT", SOON if fault == "slow" else 20)
    store.faults["photos/3.png"] = f"{fault}>1"  # the first request is for its header
    options = extract_options(inputs=["s3://bucket/photos"])
    done = extract(options, listener)
    assert list(done.failures) == ["3.png"]
    assert __import__("re").fullmatch(f"not fetched: {reason}", done.failures["3.png"])
    assert _advice(done.failures) == "The same command tries the 1 again that were not fetched."
    store.faults.clear()
    done = extract(options, listener)
    assert (done.num_before, done.num_computed, done.failures) == (7, 1, {})
    assert "1 images that were not fetched are tried again" in listener.said
    extract(extract_options(output=options.output.with_name("folder.h5")), listener)
    assert list(every_row(options.output).values()) == list(every_row(options.output.with_name("folder.h5")).values())


def test_a_shard_with_rows_that_were_not_fetched_is_not_passed_over(
    store: ObjectStore, extract_options, listener: Listener
):
    store.faults["photos/3.png"] = "forbid>1"
    options = extract_options(inputs=["s3://bucket/photos"], shard=Shard(1, 2))
    assert list(extract(options, listener).failures) == ["3.png"]
    store.faults.clear()
    done = extract(options, listener)
    assert (done.num_before, done.num_computed, done.failures) == (3, 1, {})
    store.requests.clear()
    assert extract(options, listener).num_before == 4
    assert not store.requests


@pytest.mark.parametrize("fault", ["slow", "drop", "cut"])
@pytest.mark.parametrize("reference", ["photos/3.png", "sets/photos.tar"])
def test_a_fault_that_passes_is_overcome(
    store: ObjectStore, photographs: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reference: str
):
    monkeypatch.setattr(remote, "TIME_OUT", SOON if fault == "slow" else 20)
    found = find_inputs([f"s3://bucket/{reference}"], 1)
    item = found.items[-1]
    store.faults[reference] = f"{fault}<3"  # the first is over
    assert (
        found.fetcher.contents(item.path, item.part, item.file_size)
        == (photographs / Path(item.name).name).read_bytes()
    )
    assert store.requests[reference] >= 3


def test_a_server_that_does_not_answer_ends_the_planning_and_one_that_refuses_does_not(
    store: ObjectStore, extract_options, listener: Listener, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "TIME_OUT", SOON)
    store.faults["3.png"] = "slow"
    options = extract_options(inputs=["s3://bucket/photos"])
    message = r"not fetched: timed out \(2 attempts\): s3://bucket/photos/3.png. Give the same command again"
    with pytest.raises(UnreachedError, match=message):
        extract(options, listener)
    assert not options.output.exists()
    store.faults["3.png"] = "forbid"
    done = extract(options, listener)
    assert (done.num_computed, done.failures) == (7, {"3.png": "not fetched: permission denied"})


def test_a_parquet_file_that_does_not_come_fails_its_rows(store: ObjectStore, extract_options, listener: Listener):
    options = extract_options(inputs=["s3://bucket/sets/photos.parquet"], batch_size=8)
    store.requests.clear()
    find_inputs(options.inputs, 1)
    store.faults["photos.parquet"] = f"drop>{2 * store.requests['sets/photos.parquet']}"
    done = extract(options, listener)
    assert len(done.failures) == 8
    assert all(reason.startswith("not fetched: ") for reason in done.failures.values())
    store.faults.clear()
    assert extract(options, listener).num_computed == 8


def test_a_change_of_a_stored_image_is_noticed(store: ObjectStore, photographs: Path, extract_options, listener):
    data = (photographs / "0.png").read_bytes()
    for name in "ab":
        store.put(f"changing/{name}.png", data)
    options = extract_options(inputs=["s3://bucket/changing"])
    extract(options, listener)
    store.put("changing/b.png", (photographs / "1.png").read_bytes())
    with pytest.raises(UsageError, match="1 images have changed since: b.png"):
        extract(options, listener)


def test_no_credentials_are_written_or_shown(store: ObjectStore, extract_options, listener: Listener, monkeypatch):
    options = extract_options(inputs=["s3://bucket/photos"])
    store.faults["3.png"] = "drop>1"
    extract(options, listener)
    written = options.output.read_bytes() + "\n".join(listener.said + listener.warned).encode()
    assert KEY.encode() not in written
    assert SECRET.encode() not in written
    parameters = {"Bucket": "bucket", "Key": "photos/0.png"}
    signed = store.client.generate_presigned_url("get_object", parameters)
    assert "Signature" in signed
    found = find_inputs([signed], 1)
    assert [(item.name, item.reason) for item in found.items] == [("0.png", "")]
    assert "Signature" not in f"{found.root} {found.items}"
    with pytest.raises(UnreachedError) as caught:
        remote._patiently(lambda: (_ for _ in ()).throw(OSError(f"at http://x/y?sig=abc with {SECRET}")))
    assert str(caught.value) == "not fetched: OSError: at http://x/y?... with *** (2 attempts)"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nothing/there")
    s3fs.S3FileSystem.clear_instance_cache()
    (item,) = find_inputs(["s3://bucket/photos/0.png"], 1).items
    assert item.reason == "not fetched: no credentials"


def test_urls_in_lists_are_fetched_only_where_the_user_says_so(store: ObjectStore, tmp_path: Path):
    path = tmp_path / "list.txt"
    path.write_text("s3://bucket/photos/1.png\ns3://bucket/photos/0.png\n")
    found = find_inputs([str(path)], 1)
    reason = "a URL in a list, which is fetched only with --allow-urls"
    assert {item.reason for item in found.items} == {reason}
    assert sum(store.requests.values()) == 0
    assert names(str(path), allow_urls=True) == ["1.png", "0.png"]
    store.put("lists/a.txt", b"../photos/0.png\ns3://bucket/photos/1.png\ns3://other/2.png\nftp://x/y.png\n/etc/x.png")
    found = {item.name: item.reason for item in find_inputs(["s3://bucket/lists/a.txt"], 1).items}
    assert found == {
        "lists/__/photos/0.png": "its name leads out of its folder",
        "photos/1.png": "",
        "lists/s3:/other/2.png": reason,
        "lists/ftp:/x/y.png": "not a URL that is read",
        "lists/etc/x.png": "not fetched: nothing of that name",
    }


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("file:///etc/passwd", r"--input file://\.\.\.: brixel reads URLs of s3, s3a, gs, "),
        ("simplecache::s3://bucket/a.png", "brixel reads URLs of s3"),
        ("https://somebody:secret@host/a.png", "credentials do not belong into a URL"),
        ("SharedAccessSignature=sig=secret;BlobEndpoint=https://host/", r"--input https://\.\.\.: brixel reads URLs"),
        ("BlobEndpoint=https://host/a?sig=secret", r"--input https://\.\.\.: brixel reads URLs"),
        ("https:/host/a.png?sig=secret", r"The pattern https:/host/a.png matches no file"),
        ("s3://", "each with a path"),
        ("s3://bucket/none/*.png", "The pattern s3://bucket/none/.*png matches no file"),
        ("s3://bucket/lists", r"No images below s3://bucket/lists\. Files are taken by extension"),
        ("s3://bucket/none.txt", "s3://bucket/none.txt cannot be read as a list of paths, one a line: not fetched: nothing"),
    ],
)  # fmt: skip
def test_a_url_that_names_nothing_says_so(store: ObjectStore, reference: str, message: str):
    store.put("lists/a.txt", b"x")
    with pytest.raises(UsageError, match=message) as caught:
        find_inputs([reference], 1)
    assert "secret" not in str(caught.value)


def test_places_without_a_common_start_are_refused(store: ObjectStore, photographs: Path):
    with pytest.raises(UsageError, match="their names have no common start. Give each kind an output of its own"):
        find_inputs([str(photographs), "s3://bucket/photos/0.png"], 1)


def test_two_urls_of_one_name_are_told_apart(store: ObjectStore):
    address = f"{store.endpoint}/bucket/photos/0.png"
    found = {item.name: item.reason for item in find_inputs([f"{address}?a=1", f"{address}?a=2"], 1).items}
    assert found == {"0.png": "", "0.png#2": "an earlier image has the same name"}


def test_other_stores_of_fsspec_are_read(photographs: Path):
    fsspec = pytest.importorskip("fsspec", reason="needs the extra remote")
    system = fsspec.filesystem("memory")
    system.pipe({f"/set/{path.name}": path.read_bytes() for path in photographs.iterdir()})
    assert names("memory://set/*.png") == EIGHT
    assert fetched("memory://set/5.png") == (photographs / "5.png").read_bytes()
    assert names("memory://set/clip.mp4", "memory://set/0.png") == ["clip.mp4", "0.png"]
    with pytest.raises(UsageError, match="az:// cannot be read: Install adlfs"):
        find_inputs(["az://container/a.png"], 1)
    assert find_inputs(["memory://set/clip.mp4"], 1).items[0].reason == "a video has to be on this disk"


def test_urls_need_their_extra(monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, "s3fs")
    with pytest.raises(UsageError, match=r"s3:// needs s3fs, not installed: pip install 'brixel\[remote\]'"):
        find_inputs(["s3://bucket/a.png"], 1)


def test_urls_of_google_need_theirs(monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, "gcsfs")
    with pytest.raises(UsageError, match=r"gs:// needs gcsfs, not installed: pip install 'brixel\[gcs\]'"):
        find_inputs(["gs://bucket/a.png"], 1)


def test_a_server_without_parts_of_files_is_named(monkeypatch: pytest.MonkeyPatch):
    fsspec = pytest.importorskip("fsspec", reason="needs the extra remote")
    system = fsspec.filesystem("memory")
    system.pipe("/whole/a.bin", bytes(100))
    monkeypatch.setattr(type(system), "cat_file", lambda *_, **__: bytes(100))
    with pytest.raises(UnreachedError, match="the server sends whole files only, and parts of them are needed"):
        remote.fetch(remote.Url("memory://whole/a.bin"), 0, 10)


def test_the_output_of_urls_lies_in_this_folder():
    here = Path.cwd()
    assert default_output(["s3://bucket/photos/*.jpg"], ".h5") == here / "photos.h5"
    assert default_output(["s3://bucket/photos-{000..063}.tar"], ".h5") == here / "photos.h5"
    assert default_output(["https://host/a/cat.jpg?token=1"], ".h5") == here / "cat.h5"
    assert default_output(["s3://a/b.tar", "s3://a/c.tar"], ".h5") == here / "features.h5"


def test_the_advice_names_both_kinds_of_failures():
    again, replace = "tries the 1 again that were not fetched", "Replace or remove those files, then give --overwrite."
    assert _advice({"a": "damaged"}) == replace
    assert _advice({"a": "damaged", "b": "not fetched: timed out"}).endswith(f"{again}. {replace}")
