"""Files of the Hugging Face hub: from its client's cache on this machine, or downloaded."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import CheckpointError, InputError

ATTEMPTS = 3
"""Attempts to connect to the hub, one and two seconds apart."""


def hub_file(repository: str, names: Sequence[str]) -> Path:
    """Return the first of `names` that a Hugging Face repository holds, from the local cache or downloaded.

    Raises InputError if the hub cannot be reached or the repository is unknown or gated, CheckpointError if it
    holds none of the names.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if cached := _cached_file(repository, names):
        return cached
    if why := why_unreachable(repository, names[0]):
        raise InputError(
            f"hf-hub:{repository}: cannot download {names[0]} ({why}); fetch the files of {hub_page(repository)} on a "
            "machine with a network, put them into a folder, and use local-dir:FOLDER"
        )
    try:
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    except Exception as error:  # the hub's client raises many types: no network, unknown or gated repository
        raise InputError(
            f"hf-hub:{repository}: cannot download {names[0]} ({one_line(error, 160, with_type=True)}); "
            "check the id and the network, or download the files and use local-dir:PATH"
        ) from None
    raise CheckpointError(f"hf-hub:{repository}: has none of {', '.join(names)}; it is not an open_clip repository")


def hub_page(repository: str) -> str:
    """Return the address of a repository of the Hugging Face hub."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def why_unreachable(repository: str, name: str) -> str:
    """Return why no connection to the Hugging Face hub can be made, after `ATTEMPTS`; "" if one may be.

    The hub's client attempts to download for a minute, with a warning each time. A slow answer, a missing file and a
    refused one are left to it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    why = ""
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            get_hf_file_metadata(hf_hub_url(repository, name))
        except Exception as error:  # of whichever HTTP library the client uses
            why = _no_connection(error)
        else:
            why = ""
        if not why:
            break
    return why


def _no_connection(error: BaseException | None) -> str:
    """Return the text of the error of the operating system that an error is of, if no connection can be made."""
    while error is not None:
        if isinstance(error, socket.gaierror | ConnectionRefusedError):
            return one_line(error)
        if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            return one_line(error)
        error = error.__cause__ or error.__context__
    return ""


def is_cached(repository: str, names: Sequence[str]) -> bool:
    """Return whether the local cache holds one of `names` of a Hugging Face repository.

    Raises InputError for a bad id.
    """
    return _cached_file(repository, names) is not None


def _cached_file(repository: str, names: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in names:
            if isinstance(cached := try_to_load_from_cache(repository, name), str):
                return Path(cached)
    except HFValidationError:
        raise InputError(f"hf-hub:{repository}: not a repository id; write hf-hub:OWNER/NAME") from None
    return None
