"""Weights of the Hugging Face hub, without a network."""

import os
import subprocess
import sys

import pytest

from tests.processes import HANG_SECONDS, ROOT

BUILD = """
import sys
from triderm_dist.models.towers import build_tower
from triderm_dist.schema import InputError
try:
    build_tower(sys.argv[1])
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "hf-hub:someone/clip",
            "hf-hub:someone/clip: cannot download open_clip_config.json ([Errno 111] Connection refused); fetch the "
            "files of {hub}/someone/clip on a machine with a network, put them into a folder, and use local-dir:FOLDER",
        ),
        (
            "timm:resnet18.a1_in1k",
            "timm:resnet18.a1_in1k: cannot download its weights ([Errno 111] Connection refused); fetch "
            "model.safetensors of {hub}/timm/resnet18.a1_in1k on a machine with a network, and use "
            "timm:resnet18.a1_in1k@FILE",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached_is_refused_at_once(tmp_path, source, expected):
    """In one line, and without the warnings of the client, which attempts it for a minute."""
    hub = "http://127.0.0.1:9"  # the discard port, on which nothing listens
    proxies = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"}
    env = {key: value for key, value in os.environ.items() if key.upper() not in proxies}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, source], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS,
        env={**env, "HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.splitlines() == [expected.format(hub=hub)], done.stderr
    assert "Retrying" not in done.stderr
