"""Files for Slurm, Kubernetes and Ray match the schemas of these systems; exit statuses of the launcher."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.processes import HANG_SECONDS, ROOT, finish, interrupt_read, launch, start, wait_for
from triderm_dist.commands.ranks import status_of

KUBERNETES = ROOT / "launch" / "kubernetes"
# Schemas of releases before 1.35 require onPodConditions in every rule, which the servers do not.
RELEASES = ("1.35", "1.37")

INTEGER, STRING, BOOLEAN = ({"type": kind} for kind in ("integer", "string", "boolean"))
STRINGS = {"type": "object", "additionalProperties": STRING}
GROUP = {"rayStartParams": STRINGS, "template": {"type": "object"}}


def strict_object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# Common keys of KubeRay's ray.io/v1 (ray-operator/apis/ray/v1); its pod templates are those of Kubernetes.
RAY_JOB = strict_object(
    {
        "backoffLimit": INTEGER, "activeDeadlineSeconds": INTEGER, "ttlSecondsAfterFinished": INTEGER,
        "shutdownAfterJobFinishes": BOOLEAN, "suspend": BOOLEAN, "entrypoint": STRING, "runtimeEnvYAML": STRING,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        "rayClusterSpec": strict_object(
            {
                "rayVersion": STRING, "authOptions": strict_object({"mode": {"enum": ["token", "disabled"]}}),
                "enableInTreeAutoscaling": BOOLEAN, "autoscalerOptions": {"type": "object"},
                "headGroupSpec": strict_object(GROUP | {"serviceType": STRING}, "rayStartParams", "template"),
                "workerGroupSpecs": {
                    "type": "array",
                    "items": strict_object(
                        GROUP
                        | {"groupName": STRING, "numOfHosts": INTEGER}
                        | {key: INTEGER for key in ("replicas", "minReplicas", "maxReplicas")},
                        "groupName", "minReplicas", "maxReplicas", "rayStartParams", "template",
                    ),
                },
            },
            "headGroupSpec",
        ),
    },
    "entrypoint", "rayClusterSpec",
)  # fmt: skip


def manifests() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.stem}-{manifest['kind']}", manifest)
        for path in sorted(KUBERNETES.glob("*.yaml"))
        for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


def pod_templates(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, list):
        return [found for each in tree for found in pod_templates(each)]
    if not isinstance(tree, dict):
        return []
    own = [tree["template"]] if "template" in tree else []
    return own + [found for each in tree.values() for found in pod_templates(each)]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("name", "manifest"), manifests(), ids=lambda value: value if isinstance(value, str) else "")
def test_kubernetes_files_match_the_schemas(name, manifest, release):
    if manifest["apiVersion"] == "ray.io/v1":
        jsonschema.validate(manifest["spec"], RAY_JOB)
        for template in pod_templates(manifest):
            pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pods"}, "template": template}
            kubernetes_validate.validate(pods, release, strict=True)
    else:
        kubernetes_validate.validate(manifest, release, strict=True)


def test_every_ray_cluster_requires_a_token():
    """Without one, whoever reaches a port can run code."""
    sweep = dict(manifests())["sweep-RayJob"]["spec"]["rayClusterSpec"]
    assert sweep["authOptions"] == {"mode": "token"}
    script = (ROOT / "launch" / "slurm" / "sweep.sh").read_text(encoding="utf-8")
    assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32" in script and "export" in script
    for path in (ROOT / "launch").rglob("*"):
        if path.suffix in (".yaml", ".sh"):
            assert "RAY_AUTH_MODE=disabled" not in path.read_text(encoding="utf-8"), path


def test_pods_of_several_nodes_accept_connections_of_their_own_only():
    """The rendezvous and the connections between ranks have no password."""
    policy = dict(manifests())["nodes-NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"job-name": "triderm-nodes"}}
    assert policy["policyTypes"] == ["Ingress"] and policy["ingress"] == [
        {"from": [{"podSelector": policy["podSelector"]}]}
    ]


def test_misspelled_key_violates_the_schema():
    job = yaml.safe_load((KUBERNETES / "job.yaml").read_text(encoding="utf-8"))
    job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, RELEASES[1], strict=True)


def test_kubernetes_files_are_consistent():
    by_name = dict(manifests())
    pods = [template["spec"] for _, manifest in manifests() for template in pod_templates(manifest)]
    volumes = {v["persistentVolumeClaim"]["claimName"] for pod in pods for v in pod["volumes"] if v["name"] == "data"}
    assert volumes == {by_name["storage-PersistentVolumeClaim"]["metadata"]["name"]}
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert len(images) == 1
    for pod in pods:
        for container in pod["containers"]:
            caches = {each["name"]: each["value"] for each in container.get("env", []) if "CACHE_DIR" in each["name"]}
            assert bool(caches) == ("nvidia.com/gpu" in container["resources"]["limits"]), container["name"]
            assert all(folder.startswith("/data/cache/") for folder in caches.values())
    for name in ("job-Job", "nodes-Job"):
        job = by_name[name]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        rules = job["podFailurePolicy"]["rules"]
        actions = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule}
        assert actions == {2: "FailJob", 3: "Ignore"}
        assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in rules if "onExitCodes" in rule)
        # The ranks save within 30 s of the signal.
        assert job["template"]["spec"]["terminationGracePeriodSeconds"] > 30
        words, nodes = container["command"], job.get("completions", 1)
        assert (
            int(words[words.index("--num_processes") + 1]) == nodes * container["resources"]["limits"]["nvidia.com/gpu"]
        )
    multi_node, service = by_name["nodes-Job"], by_name["nodes-Service"]
    words = multi_node["spec"]["template"]["spec"]["containers"][0]["command"]
    name = multi_node["metadata"]["name"]
    nodes = int(words[words.index("--num_machines") + 1])
    assert multi_node["spec"]["completions"] == multi_node["spec"]["parallelism"] == nodes
    assert service["metadata"]["name"] == multi_node["spec"]["template"]["spec"]["subdomain"] == name
    assert service["spec"]["selector"] == {"job-name": name}
    assert words[words.index("--main_process_ip") + 1] == f"{name}-0.{name}.$(NAMESPACE).svc.cluster.local"
    assert words[words.index("--main_process_port") + 1] == str(service["spec"]["ports"][0]["port"])


def test_cluster_file_is_valid_for_ray():
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((ROOT / "launch" / "ray" / "cluster.yaml").read_text(encoding="utf-8"))
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["max_workers"] == 2
    starts = [
        line for key in ("head", "worker") for line in cluster[f"{key}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2 and all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)
    assert "--env=RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]  # of the search itself
    assert list(cluster["file_mounts"]) == ["/home/triderm/.ray/auth_token"]
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "worker_nodes": {}})


@pytest.mark.parametrize("script", sorted(ROOT.glob("*/slurm/*.sh")), ids=lambda path: path.name)
def test_shell_scripts_have_valid_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)


# --- the status of a launcher -----------------------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]

def save(number, frame):
    time.sleep(0.2)
    (folder / f"saved-{rank}").write_text(signal.Signals(number).name)
    os._exit(3)  # also where the launcher's signal comes while Python exits

for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
with (folder / f"starts-{rank}").open("a") as file:
    file.write("x")
if sys.argv[2] != "wait":
    status = int(sys.argv[2])
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)
(folder / f"ready-{rank}").touch()
time.sleep(900)
"""


def start_ranks(
    folder: Path, behavior: str, config: str = "accelerate_configs/ddp.yaml", fork: bool = False
) -> subprocess.Popen:
    program = folder / "rank.py"
    program.write_text(RANK)
    return start(str(program), str(folder), behavior, ranks=2, config=config, fork=fork)


@pytest.mark.parametrize(("behavior", "status", "line"), [("2", 2, ""), ("-9", 3, "interrupted: a rank was killed")])
def test_launcher_exits_with_the_status_of_its_ranks(tmp_path, behavior, status, line):
    done = finish(start_ranks(tmp_path, behavior, fork=True))
    assert done.returncode == status
    assert line in done.stderr and "Traceback" not in done.stderr


def test_status_of_a_rank_that_died_from_a_signal(capsys):
    """A scheduler starts again what was killed, and not what crashed."""
    assert [status_of(code) for code in (0, 2, -signal.SIGKILL, -signal.SIGSEGV)] == [0, 2, 3, 128 + signal.SIGSEGV]
    assert capsys.readouterr().err.count("interrupted: ") == 1


@pytest.mark.parametrize(("status", "starts"), [(2, 1), (3, 2)])
def test_launcher_starts_again_where_no_input_is_refused(tmp_path, status, starts):
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    options = ("--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "2", "--max_restarts", "1")
    elastic = ("--num_machines", "1", "--monitor_interval", "0.1")
    done = launch("launch.ranks", *options, *elastic, str(program), str(tmp_path), str(status), check=False)
    assert done.returncode == status
    assert max(len(path.read_text()) for path in tmp_path.glob("starts-*")) == starts


def test_launcher_forwards_a_signal_and_waits_for_the_checkpoint(tmp_path):
    process = start_ranks(tmp_path, "wait")
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, process)
    process.send_signal(signal.SIGUSR1)
    assert finish(process).returncode == 3
    assert [path.read_text() for path in tmp_path.glob("saved-*")] == ["SIGUSR1"] * 2


def test_signal_before_the_ranks_start_exits_with_3(tmp_path):
    os.mkfifo(tmp_path / "ddp.yaml")
    process = start_ranks(tmp_path, "wait", str(tmp_path / "ddp.yaml"))
    with (tmp_path / "ddp.yaml").open("w"):  # opens once the launcher reads the file, and blocks it until closed
        interrupt_read(process, signal.SIGUSR1)
        assert finish(process).returncode == 3
    assert not list(tmp_path.glob("ready-*"))


def test_missing_launcher_file_gives_one_line():
    done = launch("launch.train", config="missing.yaml", check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: launcher: missing.yaml: no such")


# --- a real Slurm -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("sbatch") and shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")),
    reason="Slurm is not installed: apt-get install slurm-wlm munge",
)
def test_slurm_scripts_on_a_real_slurm():
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["tests/slurm/check.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * HANG_SECONDS
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
