"""Files of the Hugging Face hub: downloaded once; where it cannot be reached, that is said at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from brixel_cli.errors import WeightsError

HUB = "hf-hub:"
"""Begins the name of a student on the hub, as in timm: `hf-hub:user/name`, or `hf-hub:user/name@revision`."""
PATIENCE = 5.0
"""Seconds in which the hub must answer."""


def check_hub(repository: str, names: Sequence[str], revision: str | None = None) -> None:
    """Find out whether a download can succeed at all; the hub's own client would go on trying for most of a minute.

    Args:
        repository: on the hub.
        names: of files, one of which is enough if it is stored here.
        revision: of the repository.

    Raises:
        OSError: none of the files is stored here, and the hub does not answer.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in names):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of requests or of httpx, by the version of the client
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise OSError(f"{constants.ENDPOINT} does not answer: {reason[0]}") from error


def download(reference: str, name: str) -> Path:
    """A file of a repository on the hub, which is kept in the cache of the hub's client.

    Args:
        reference: of the repository; begins with `HUB`.
        name: of the file.

    Raises:
        WeightsError: the hub does not answer, or refuses it.
    """
    import huggingface_hub

    repository, _, revision = reference.removeprefix(HUB).partition("@")
    try:
        check_hub(repository, [name], revision or None)
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None))
    except Exception as error:  # the hub's client raises many kinds: network, rights, absence
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{name} of {reference} could not be downloaded from the hub: {reason}") from error
