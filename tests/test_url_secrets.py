"""What signs a request, or opens a store, is in no message and in no name of a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from brixel_cli.data import remote
from brixel_cli.data.inputs import find_inputs
from brixel_cli.data.remote import without_secrets


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("https://host/a.png?X-Amz-Signature=secret", "https:/host/a.png"),
        ("https://me:secret@host/a.png", "https:/host/a.png"),
        ("ftp://me:secret@host/a.png?key=secret", "ftp:/host/a.png"),
    ],
)
def test_a_refused_url_of_a_list_names_its_row_without_what_is_secret(tmp_path: Path, line: str, name: str):
    (tmp_path / "list.txt").write_text(f"{line}\n")
    (item,) = find_inputs([str(tmp_path / "list.txt")], 1).items
    assert item.reason
    assert str(item.path).endswith(name)
    assert "secret" not in f"{item}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:p@ss@host/a@b.tar?sig=1", "https://host/a@b.tar"),
        ("s3://bucket/photo_?.png", "s3://bucket/photo_?.png"),
        ("abfs://container@account/a.png", "abfs://container@account/a.png"),
        ("photos/what?.png", "photos/what?.png"),
        ("https://host/what%3F.png", "https://host/what%3F.png"),
        ("az://container/a.png?sv=2024&sig=Ab%2F", "az://container/a.png"),
        ("az://container/a.png?sv%3D2024%26sig%3DAb", "az://container/a.png"),
        ("az://container/a.png%3Fsv=2024&sig=Ab", "az://container/a.png"),
        (
            "abfss://container@account.dfs.core.windows.net/*.png?sig=Ab",
            "abfss://container@account.dfs.core.windows.net/*.png",
        ),
        ("https:/account.blob.core.windows.net/a.png?sig=Ab", "https:/account.blob.core.windows.net/a.png"),
        ("SharedAccessSignature=sig=Ab;BlobEndpoint=https://account/?sig=Ab", "https://account/"),
    ],
)
def test_of_a_url_only_what_is_no_secret_is_shown(text: str, shown: str):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no blob at https://x/a.png?sv=1&sig=Ab%2F now", "no blob at https://x/a.png?... now"),
        ("signed by sv=1&sig=Ab%2F&se=2", "signed by sv=1&sig=***&se=2"),
        ("?sv=1&sig=fromsas", "?..."),
        ("sv=1&spr=fromsas", "***"),
        ("the key secretkey== of myself at https", "the key *** of myself at https"),
        ("sig%3DAb", "sig%3D***"),
        ("X-Amz-Signature=Ab X-Amz-Credential=Cd", "X-Amz-Signature=*** X-Amz-Credential=***"),
    ],
)
def test_no_error_of_a_server_shows_what_signs_a_request(monkeypatch: pytest.MonkeyPatch, text: str, shown: str):
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=1&spr=fromsas")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "Protocol=https;AccountName=myself;AccountKey=secretkey==")
    assert remote._reason(OSError(text)) == f"OSError: {shown}"
