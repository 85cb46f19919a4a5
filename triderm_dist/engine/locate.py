"""Find the folder of a run: a folder, a zip file, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from triderm_dist.config import CONFIG_FILE, read_yaml
from triderm_dist.files import cache_folder, expanded, file_sha256
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import DataError, InputError

HUB = "hf-hub:"


def locate_run(where: str | os.PathLike[str]) -> Path:
    """Return the folder of a run, after extracting a zip file or downloading `hf-hub:USER/NAME[@REVISION]`.

    A zip file is extracted once, into triderm-dist/runs/SHA256 of the user's cache. Raises InputError if there is no
    run, and for a zip file or repository whose settings name plugins or allow commands: only a folder may run code.
    """
    text = os.fspath(where)
    if text.startswith(HUB):
        return _without_code(_download(text), text)
    path = expanded(text)
    if path.is_file():
        return _without_code(_extract(path), text)
    return path.absolute()  # networks are loaded later, maybe from another working directory


def _download(where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = where.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None))
    except HFValidationError:
        raise InputError(f"{where}: not a repository; write {HUB}USER/NAME or {HUB}USER/NAME@REVISION") from None
    except Exception as error:  # the client raises many types: no network, no such repository, no access
        raise InputError(
            f"{where}: cannot be downloaded ({one_line(error, 160, with_type=True)}); check the name and the network, "
            f"or run hf download {repository} on a machine with one, copy the folder, and give its path"
        ) from None


def _extract(path: Path) -> Path:
    """Extract a zip file of a run and return the folder in it that holds the run's settings."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not a zip file; give the folder of a run, a zip of it, or {HUB}USER/NAME")
    target = cache_folder() / "runs" / file_sha256(path)[:32]
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent))
        try:
            with zipfile.ZipFile(path) as archive:
                _check_names(path, archive)
                archive.extractall(part)
            os.utime(part)
            part.rename(target)
        except OSError as error:
            if not target.is_dir():  # unless another process extracted it meanwhile
                raise DataError(f"{path}: cannot be extracted into {target.parent} ({one_line(error)})") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
            text = one_line(error, 160)
            raise DataError(f"{path}: damaged, or of an unknown kind ({text}); copy it again") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    folders = [target] if (target / CONFIG_FILE).is_file() else sorted(target.iterdir())
    found = [folder for folder in folders if (folder / CONFIG_FILE).is_file()]
    if not found:
        raise DataError(f"{path}: holds no {CONFIG_FILE}; give a zip of a run's folder")
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise DataError(f"{path}: holds several runs ({names}); extract it and give the folder of one")
    return found[0]


def _check_names(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise DataError for a member that would be written outside the folder, or is a link."""
    for info in archive.infolist():
        name = PurePosixPath(info.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in name.parts[0] or stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{path}: holds {info.filename!r}, which leaves the folder of a run; do not use this file")


def _without_code(folder: Path, where: str) -> Path:
    """Return the folder. Raises InputError if its settings name code to run."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"{where}: holds no {CONFIG_FILE}; it is not a run")
    settings = read_yaml(path)
    data = settings.get("data") or {}
    for key, code in (("plugins", settings.get("plugins")), ("data.remote.allow_commands", _allows_commands(data))):
        if code:
            raise InputError(
                f"{where}: its settings may run code of others ({key}); if you trust them, extract it and give the "
                "folder"
            )
    return folder


def _allows_commands(data: Any) -> bool:
    remote = data.get("remote") if isinstance(data, dict) else None
    return isinstance(remote, dict) and str(remote.get("allow_commands", "false")).lower() != "false"
