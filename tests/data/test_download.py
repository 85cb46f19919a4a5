"""Downloads from a faulty local server, and malicious archives."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injection import Plan
from tests.processes import HANG_SECONDS, launch
from triderm_dist.cli import Interrupted
from triderm_dist.data.download import download, fetch, read_checksums, unpack
from triderm_dist.files import LOCK_SECONDS, exclusive_lock
from triderm_dist.schema import DataError

DATA = bytes(range(256)) * 2000
QUICK = {"attempts": 3, "timeout": HANG_SECONDS, "pause": 0.01}


class Server(ThreadingHTTPServer):
    """Serves `files`; each request consumes one of `faults`, if any is left."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file": DATA}
        self.faults: list[str] = []
        self.headers: dict[str, str] = {}
        self.ranges: list[str | None] = []
        self.tags = True
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        fault = server.faults.pop(0) if server.faults else ""
        data = server.files.get(self.path)
        if data is None or fault.isdecimal():
            self.send_error(int(fault) if fault else 404)
            return
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        start, requested = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if requested and fault != "no ranges" and self.headers.get("If-Range", tag) == tag:
            start = int(requested[1])
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if server.tags:
            self.send_header("ETag", tag)
        for name, value in server.headers.items():
            self.send_header(name, value)
        if fault != "no length":
            more = 1000 if fault in ("too long", "more bytes") else 0
            self.send_header("Content-Length", str(len(data) - start + more))
        self.end_headers()
        body = data[start:] + bytes(1000 if fault == "more bytes" else 0)
        if fault in ("truncated", "reset", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "stall":
            server.closing.wait(HANG_SECONDS)
        elif fault != "truncated":
            self.wfile.write(body[:-1] + b"!" if fault == "wrong byte" else body)
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()


@pytest.mark.parametrize("fault", ["", "truncated", "reset", "stall", "503", "429", "too long", "no ranges"])
def test_transient_faults_are_retried(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults = ["truncated", fault, "truncated", fault]
    path = tmp_path / "sub" / "file"
    # On a busy machine a slow response may count as a stall.
    limits = {"attempts": 20, "timeout": 0.4} if fault == "stall" else {}
    assert fetch(f"{server.url}/file", path, **{**QUICK, **limits}) == hashlib.sha256(DATA).hexdigest()
    assert path.read_bytes() == DATA and [each.name for each in path.parent.iterdir()] == ["file"]


def test_range_with_more_bytes_than_announced_is_discarded(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncated", "more bytes"]
    fetch(f"{server.url}/file", tmp_path / "file", **QUICK)
    assert (tmp_path / "file").read_bytes() == DATA and server.ranges == [None, "bytes=256000-", None]


def test_resumed_download_requests_only_the_missing_bytes(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncated", "503", "503", "503"]
    with pytest.raises(Interrupted, match=r"503 Service Unavailable, 3 attempts in a row; 256000 bytes are kept"):
        fetch(f"{server.url}/file", tmp_path / "file", **QUICK)
    server.ranges.clear()
    fetch(f"{server.url}/file", tmp_path / "file", **QUICK)
    assert server.ranges == ["bytes=256000-"] and (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize(
    ("other", "tags"),
    [
        (DATA[::-1], True),
        *((other, tags) for other in (DATA[:100_000][::-1], DATA + b"more") for tags in (True, False)),
    ],
)
def test_changed_file_is_downloaded_from_the_start(server: Server, tmp_path: Path, other: bytes, tags: bool) -> None:
    """The change is recognized by the entity tag or the length."""
    server.tags = tags
    server.faults = ["truncated", "503", "503", "503"]
    with pytest.raises(Interrupted):
        fetch(f"{server.url}/file", tmp_path / "file", **QUICK)
    server.files["/file"] = other
    server.ranges.clear()
    fetch(f"{server.url}/file", tmp_path / "file", **QUICK)
    assert (tmp_path / "file").read_bytes() == other
    assert len(server.ranges) == (1 if tags else 2)  # with If-Range the first answer is the whole file


def test_download_checksums_are_verified(server: Server, tmp_path: Path) -> None:
    good = hashlib.sha256(DATA).hexdigest()
    server.faults = ["wrong byte"]
    with pytest.raises(DataError, match=rf"checksum \w+ is not the expected {good}; .* rerun the command"):
        fetch(f"{server.url}/file", tmp_path / "file", sha256=good, **QUICK)
    assert not list(tmp_path.iterdir())
    fetch(f"{server.url}/file", tmp_path / "file", sha256=good, **QUICK)
    # The ETag of S3 is the MD5 of the content; an ETag of another server may only look like one.
    server.faults = ["wrong byte", "wrong byte"]
    fetch(f"{server.url}/file", tmp_path / "other", **QUICK)
    server.headers = {"x-amz-request-id": "1"}
    with pytest.raises(DataError, match="is not the expected"):
        fetch(f"{server.url}/file", tmp_path / "third", **QUICK)


@pytest.mark.parametrize(
    ("path", "faults", "message"),
    [
        ("/absent", [], "the server answered 404 Not Found; check base_url="),
        ("/file", ["403"], "the server answered 403 Forbidden"),
        ("/file", ["no length"], "the server sends no Content-Length"),
    ],
)
def test_permanent_errors_are_not_retried(
    server: Server, tmp_path: Path, path: str, faults: list[str], message: str
) -> None:
    server.faults = faults
    with pytest.raises(DataError, match=message) as caught:
        fetch(server.url + path, tmp_path / "file", **QUICK)
    assert len(server.ranges) == 1 and "\n" not in str(caught.value)


def test_unreachable_server_raises_interrupted(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Interrupted, match="Connection refused, 3 attempts in a row"):
        fetch(f"http://127.0.0.1:{port}/file", tmp_path / "file", **QUICK)
    with pytest.raises(DataError, match="not an http or https URL"):
        download(tmp_path, ["x"], base_url="file:///etc")


# --- unpacking -------------------------------------------------------------------------------------------------------


def make_zip(
    path: Path, members: dict[str, bytes], change: Callable[[zipfile.ZipInfo], Any] = lambda info: None
) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            file.writestr(info, data)
    return path


def link(info: zipfile.ZipInfo) -> None:
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


MALICIOUS: dict[str, tuple[dict[str, bytes], Callable[[zipfile.ZipInfo], Any], str]] = {
    "parent": ({"../out.txt": b"x"}, lambda info: None, "would leave the folder"),
    "deep parent": ({"a/b/../../../out.txt": b"x"}, lambda info: None, "would leave the folder"),
    "absolute": ({"/tmp/out.txt": b"x"}, lambda info: None, "would leave the folder"),
    "backslash": ({"..\\out.txt": b"x"}, lambda info: None, "would leave the folder"),
    "drive": ({"C:out.txt": b"x"}, lambda info: None, "would leave the folder"),
    "link": ({"out.txt": b"/etc/passwd"}, link, "a link or a special file"),
    "bomb": ({"zeros": bytes(10**6)}, lambda info: None, "refused as a zip bomb"),
    "large": ({f"{n}": bytes(range(256)) * 20 for n in range(9)}, lambda info: None, "more than max_gb allows"),
    "two cases": ({"a.jpg": b"x", "A.jpg": b"y"}, lambda info: None, "listed twice"),
    "dot": ({".": b"x"}, lambda info: None, "would leave the folder"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_archives_are_refused(tmp_path: Path, name: str) -> None:
    members, change, message = MALICIOUS[name]
    (tmp_path / "in").mkdir()
    archive = make_zip(tmp_path / "in" / "a.zip", {"good.jpg": b"good", **members}, change)
    with pytest.raises(DataError, match=message) as caught:
        unpack(archive, tmp_path / "in" / "a", 40_000)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "in"]


def test_archive_member_larger_than_listed_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"x": b"0123456789" * 100})
    data = archive.read_bytes()
    archive.write_bytes(data.replace(struct.pack("<I", 1000), struct.pack("<I", 10)))
    with pytest.raises(DataError, match=r"zip bomb|not a valid zip"):
        unpack(archive, tmp_path / "a", 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("position", [40, 200, -30])
def test_damaged_archives_are_refused(tmp_path: Path, position: int) -> None:
    archive = make_zip(tmp_path / "a.zip", {"x/photo.jpg": bytes(range(256)) * 40})
    data = bytearray(archive.read_bytes())
    data[position] ^= 255
    archive.write_bytes(data)
    with pytest.raises(DataError) as caught:
        unpack(archive, tmp_path / "a", 10**6)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_nested_folder_of_the_same_name_is_flattened(tmp_path: Path) -> None:
    unpack(make_zip(tmp_path / "a.zip", {"a/": b"", "a/x.jpg": b"x", "a/b/y.jpg": b"y"}), tmp_path / "a", 10**6)
    unpack(make_zip(tmp_path / "c.zip", {"x.jpg": b"x", "c/y.jpg": b"y"}), tmp_path / "c", 10**6)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg")}
    assert files == {"a/x.jpg", "a/b/y.jpg", "c/x.jpg", "c/c/y.jpg"}


# --- the program -----------------------------------------------------------------------------------------------------


def run(*settings: str) -> subprocess.CompletedProcess[str]:
    return launch("shards.download", *settings, check=False)


def test_download_unpack_and_pack_end_to_end(server: Server, make_challenge: Any, tmp_path: Path) -> None:
    """All files are downloaded despite faults; a second run requests nothing; the folder can be packed."""
    from triderm_dist.data.readers.milk10k import read_challenge

    challenge = make_challenge(lesions=11)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted((challenge.folder / "MILK10k_Training_Input").rglob("*.jpg")):
            file.write(path, path.relative_to(challenge.folder))
    server.files = {
        "/m/MILK10k_Training_Metadata.csv": challenge.metadata_path.read_bytes(),
        "/m/MILK10k_Training_GroundTruth.csv": challenge.truth_path.read_bytes(),
        "/m/MILK10k_Training_Supplement.csv": b"isic_id\n",
        "/m/MILK10k_Training_Input.zip": buffer.getvalue(),
    }
    server.faults = ["", "503", "truncated"]
    output = tmp_path / "got"
    sums = tmp_path / "SHA256SUMS"
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    sums.write_text(f"{digest}  MILK10k_Training_Input.zip\n")
    settings = (f"output={output}", "part=train", f"base_url={server.url}/m/", f"checksums={sums}")
    first = run(*settings)
    assert first.returncode == 0 and first.stderr == ""
    assert f"MILK10k_Training_Input.zip: {len(buffer.getvalue()) / 1e6:.1f} MB, sha256 {digest}" in first.stdout
    assert f"next: triderm pack source={output}/MILK10k_Training_Metadata.csv" in first.stdout
    assert json.loads((output / "downloads.json").read_text())["MILK10k_Training_Input.zip"]["sha256"] == digest
    assert len(read_challenge(output).lesions) == 11 and not list(output.glob("*.zip"))
    server.ranges.clear()
    assert run(*settings).returncode == 0 and server.ranges == []

    wrong = run(f"output={tmp_path / 'test'}", "part=test", f"base_url={server.url}/m")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "MILK10k_Test_Metadata.csv: the server answered 404" in wrong.stderr
    down = run(f"output={tmp_path / 'down'}", "base_url=http://127.0.0.1:9", "attempts=1")
    assert down.returncode == 3 and down.stderr.startswith(
        "interrupted: http://127.0.0.1:9/MILK10k_Training_Metadata.csv"
    )


@pytest.mark.slow
def test_killed_download_goes_on_at_any_moment(server: Server, tmp_path: Path) -> None:
    """Killed just before any change of a file, the same command ends with the same files, and nothing else."""
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as file:
        file.writestr("MILK10k_Test_Input/IL_1/ISIC_1.jpg", DATA)
    server.files = {"/MILK10k_Test_Metadata.csv": b"isic_id\n1\n", "/MILK10k_Test_Input.zip": archive.getvalue()}
    output, scratch = tmp_path / "got", tmp_path / "scratch"
    program = ("triderm_dist.commands.download", f"output={output}", "part=test", f"base_url={server.url}")

    def files() -> dict[str, bytes]:
        return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def killed_at(change: int) -> int:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        return launch(
            *program, check=False, environment=Plan(str(output), str(scratch), change).environment()
        ).returncode

    assert killed_at(0) == 0
    expected, changes = files(), (scratch / "changes").read_text().splitlines()
    assert sorted(expected) == [
        "MILK10k_Test_Input/IL_1/ISIC_1.jpg", "MILK10k_Test_Metadata.csv", "downloads.json",
    ]  # fmt: skip
    for number, change in enumerate(changes, 1):
        shutil.rmtree(output)
        assert killed_at(number) == -signal.SIGKILL
        done = launch(*program, check=False)
        assert (done.returncode, done.stderr) == (0, ""), f"killed before {change}"
        assert files() == expected, f"killed before {change}"


def test_second_download_into_a_folder_waits_for_the_first(server: Server, tmp_path: Path) -> None:
    (tmp_path / "got").mkdir()
    words = ("triderm_dist.commands.download", f"output={tmp_path}/got", "part=test", f"base_url={server.url}")
    with exclusive_lock(tmp_path / "got" / ".lock", "test"):
        done = launch(*words, check=False, environment={LOCK_SECONDS: "0"})
    assert done.returncode == 3 and server.ranges == []
    assert done.stderr.startswith(f"error: {tmp_path}/got: another download into this folder is running"), done.stderr


def test_existing_files_are_not_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(DataError, match="exists, but was not downloaded by this program"):
        download(tmp_path, ["file"], base_url=server.url)
    assert (tmp_path / "file").read_bytes() == b"mine"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x", "mine")
    with pytest.raises(DataError, match=r"a\.zip: checksum [0-9a-f]{64} is not the expected 0000"):
        download(tmp_path, ["a.zip"], base_url=server.url, checksums={"a.zip": "0" * 64})
    assert (tmp_path / "a.zip").exists() and not (tmp_path / "a").exists()


def test_checksum_file_formats(tmp_path: Path) -> None:
    path = tmp_path / "SUMS"
    path.write_text(f"{'A' * 64} *dir/file.zip\n\n{'b' * 64}  other\n")
    assert read_checksums(path) == {"file.zip": "a" * 64, "other": "b" * 64}
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1: not `SHA256  NAME`"):
        read_checksums(path)
