"""Secrets are removed from messages, logs and saved settings, and other text is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import yaml

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist.cli import read_settings
from triderm_dist.config import Experiment, RemoteConfig, as_yaml, load, save
from triderm_dist.data.shards.remote import Store
from triderm_dist.runtime import redact as redacting
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.redact import URLS, redact, redact_tree, register_secrets
from triderm_dist.runtime.run_log import RunLog
from triderm_dist.schema import ConfigError

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcDEF-123"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(redacting, "_registered", set())
    monkeypatch.setenv(URLS, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("url='http://h/a.tar?token=S3CRET'", "url='http://h/a.tar?***'"),
        ("(https://h/a?X-Amz-Signature=ab%2Fcd&b=1).", "(https://h/a?***)."),
        ("https://user:S3CRET@host/x", "https://***@host/x"),
        ("https://S3CRET@host/x", "https://***@host/x"),
        ("s3://KEY:S3/CRET@bucket/x", "s3://***@bucket/x"),
        ("redis://:S3CRET@h:1", "redis://***@h:1"),
        ("postgresql+psycopg2://u:p@S3CRET@h/db", "postgresql+psycopg2://***@h/db"),
        ("simplecache::https://u:S3CRET@h/x?a=b", "simplecache::https://***@h/x?***"),
        ("https://h/cb#access_token=S3CRET", "https://h/cb?***"),
        ("/x/y?sv=2020&sig=S3CRET%3D", "/x/y?sv=2020&sig=***"),
        ("Authorization: Bearer S3CRET", "Authorization: ***"),
        ("{'Authorization': 'Basic UzNDUkVU'}", "{'Authorization': '***'}"),
        ("{'X-Amz-Security-Token': 'S3CRET', 'Host': 'h'}", "{'X-Amz-Security-Token': '***', 'Host': 'h'}"),
        ("sent Bearer S3CRET-0123456789", "sent Bearer ***"),
        ("pipe:curl -u user:S3CRET https://h/{}", "pipe:curl -u *** https://h/{}"),
        ("pipe:get --api-key S3CRET {}", "pipe:get --api-key *** {}"),
        ("AWS_SECRET_ACCESS_KEY=S3/CRET", "AWS_SECRET_ACCESS_KEY=***"),
        ('"api_key": "S3CRET x"', '"api_key": "***"'),
        ("{wandb: {api_key: S3CRET}}", "{wandb: {api_key: ***}}"),
        ("AccountName=x;AccountKey=S3CRET==;Suffix=y", "AccountName=x;AccountKey=***;Suffix=y"),
        ("password: S3CRET1, user: bob", "password: ***, user: bob"),
        ("hf_abcdefghijklmnopqrstuv is not valid", "*** is not valid"),
        ("key AKIAIOSFODNN7EXAMPLE", "key ***"),
        (f"got {JWT}", "got ***"),
        ("ghp_0123456789abcdefABCDEF", "***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)  # fmt: skip
def test_secret_is_replaced(text, expected):
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "epoch 3: loss=0.5 lr=1e-4, 2 tokens: 17, class token: 768",
        "triderm predict run=x tokens=/data/tokens token_seed=7",
        "see https://docs.example.org/page#anchor",
        "http://host:8080/a@b/c and hf://datasets/a/b@main/x",
        "group=patient_id primary_key=lesion key: value",
        "no permission (403); check the credentials",
        "/home/a/file.py:12: in basic blocks",
        "data.shards=s3://bucket/train output=runs/x",
        "password=null token=",
    ],
)
def test_other_text_is_kept(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "part",
    [
        "a.",
        "a-",
        "http://",
        "http://a:",
        "a@",
        "?a",
        "password='",
        "password=",
        ")",
        "bearer ",
        "#=",
        "token",
        "=",
        "-u ",
        "eyJ",
        " ",
    ],
)
def test_time_is_linear_whatever_the_text_holds(part):
    started = time.process_time()
    redact("https://" + part * (20_000 // len(part)))
    assert time.process_time() - started < 2


def test_value_of_a_secret_environment_variable_is_removed_everywhere(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain-words-only")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/a/key.json")
    monkeypatch.setenv("OLDPWD", "/home/a/work")
    assert redact("got plain-words-only") == "got ***"
    assert redact("/home/a/key.json: no such file in /home/a/work") == "/home/a/key.json: no such file in /home/a/work"


def test_token_of_a_url_is_removed_where_the_url_is_not(tmp_path):
    Store("https://user:pa%2Fssword@host/set?token=abcdefgh&format=attachment", RemoteConfig())
    assert redact("denied: abcdefgh, pa/ssword, attachment") == "denied: ***, ***, attachment"


def test_exceptions_and_values_of_named_keys_are_redacted():
    assert one_line(OSError("GET http://h/a?token=S3CRET")) == "GET http://h/a?***"
    tree = {"wandb": {"api_key": "S3CRET", "apiKey": "x", "project": "skin"}, "urls": ["http://u:p@h/a"], "token": ""}
    assert redact_tree(tree) == {
        "wandb": {"api_key": "***", "apiKey": "***", "project": "skin"},
        "urls": ["http://***@h/a"],
        "token": "",
    }


URL = "https://user:S3CRET@host/set?token=S3CRET"
COMMAND = "pipe:curl -sf -H 'Authorization: Bearer S3CRET' https://host/set/{}"


@pytest.mark.parametrize("url", [URL, COMMAND])
def test_saved_settings_hold_no_secret_and_stages_get_it(tmp_path, url):
    config = read_settings(Experiment, [f"output={tmp_path}", f"data.shards={url}"])
    assert config.data.shards == url
    save(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "S3CRET" not in text + as_yaml(config)
    # A child process reads the saved settings, and the secret from its environment.
    assert load(Experiment, tmp_path / "config.yaml").data.shards == url
    os.environ[URLS] = ""
    saved = load(Experiment, tmp_path / "config.yaml").data
    assert saved.shards == yaml.safe_load(text)["data"]["shards"]
    remote = RemoteConfig(allow_commands=True)
    with pytest.raises(ConfigError, match=rf"hold no passwords and tokens; give the whole URL again, .* {URLS}"):
        Store(str(saved.shards), remote)
    os.environ[URLS] = f"https://other/x?a=b\n{url}"  # what the user may also do
    assert load(Experiment, tmp_path / "config.yaml").data.shards == url


def test_settings_without_secrets_leave_the_environment_alone():
    register_secrets({"shards": "s3://bucket/x", "output": "runs/x"}, pass_on=True)
    assert not os.environ[URLS]


def test_log_holds_no_secret(tmp_path):
    with RunLog(tmp_path, f"triderm crossval data.shards={URL}"):
        print(f"reading {URL}")
    text = (tmp_path / "log.txt").read_text()
    assert "reading https://***@host/set?***" in text and "S3CRET" not in text


def test_program_prints_no_secret(tmp_path):
    """Neither in the line of an error nor in a traceback."""
    code = (
        "from triderm_dist.cli import run; from triderm_dist.config import Experiment\n"
        "def main(config):\n"
        "    print('reading', config.data.shards)\n"
        "    raise KeyError(config.data.shards + ' S3CRETS3CRET')\n"
        "run(Experiment, main, '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"output={tmp_path}", "data.shards=https://h/set?token=S3CRETS3CRET"],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "KeyError: 'https://h/set?***" in done.stderr, done.stderr
    assert "reading https://h/set?***" in done.stdout and "S3CRET" not in done.stdout + done.stderr
