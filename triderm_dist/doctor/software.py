"""Python, the packages and their versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Collection, Sequence
from pathlib import Path

from triderm_dist.doctor.findings import Finding, State, try_import
from triderm_dist.doctor.machine import Gpu
from triderm_dist.runtime.extras import EXTRA_OF, install_command

NEEDED = ("torch", "accelerate", "timm", "open_clip_torch", "pyarrow", "simplejpeg")
OPTIONAL = {
    "xgboost": "the stacker",
    "deepspeed": "ZeRO",
    "ray": "triderm search and parallel_folds",
    "optuna": "triderm search",
    "openvino": "quick computation of frozen encoders on a CPU",
    "opencv-python-headless": "quick augmentation on a CPU",
}
"""What needs an optional package, by the package's name."""
IMPORT_NAMES = {"opencv-python-headless": "cv2"}


def versions(required: Collection[str] = ()) -> list[Finding]:
    """Check Python and the packages against the version ranges that triderm-dist declares.

    required: names of `OPTIONAL` that the run needs, so that it cannot start without them.
    """
    ranges = _declared()
    findings = [
        Finding("python", f"{platform.python_version()}  {sys.executable}")
        if sys.version_info >= (3, 11)
        else Finding("python", platform.python_version(), "error", "install Python 3.11 or newer")
    ]
    good = []
    state: State
    for name in (*NEEDED, *OPTIONAL):
        found = installed(name)
        if found is None:
            needed_by = f"; {OPTIONAL[name]} needs it" if name in OPTIONAL else ""
            state = "error" if name in NEEDED or name in required else "ok"
            advice = (
                install_command(IMPORT_NAMES.get(name, name))
                if name in OPTIONAL
                else f"pip install '{ranges.get(name, name)}'"
            )
            findings.append(Finding(name, f"not installed{needed_by}", state, advice))
            continue
        distribution, version = found
        text = f"{distribution} {version}"
        if name == "torch":
            text += f" ({_torch_build()})"
        wanted = ranges.get(name)
        if wanted and not _fits(version, wanted):
            state = "error" if name == "deepspeed" and name in required else "warning"
            problem = f"the launcher needs {wanted}" if state == "error" else "not tested with this version"
            findings.append(Finding(name, f"{text}; {problem}", state, f"pip install '{wanted}'"))
        else:
            good.append(text)
    return [*findings, Finding("packages", ", ".join(good))]


def installed(name: str) -> tuple[str, str] | None:
    """Return the (distribution, version) that a package is installed as; xgboost has three distributions."""
    names = ("xgboost-cu13", "xgboost-cpu", "xgboost") if name == "xgboost" else (name,)
    for each in names:
        try:
            return each, importlib.metadata.version(each)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _declared() -> dict[str, str]:
    """Return the ranges that the installed package and its extras declare, by name; empty if it is not installed."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("triderm-dist") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    wanted = {}
    extras = ("", *EXTRA_OF.values())
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            wanted[requirement.name.removesuffix("-cu13")] = f"{requirement.name}{requirement.specifier}"
    return wanted


def _fits(version: str, wanted: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(wanted).specifier.contains(version, prereleases=True)


def _torch_build() -> str:
    torch = try_import("torch")
    if torch is None:
        return "does not import"
    if torch.version.cuda is None:
        return "CPU build"
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    return f"CUDA {torch.version.cuda}" + (f", NCCL {'.'.join(map(str, nccl))}" if nccl else "")


def nccl(gpu: bool) -> Finding:
    """Check that only one package installs nvidia/nccl/lib/libnccl.so.2; else torch may load the wrong one."""
    return nccl_finding(
        sorted(
            f"{distribution.name} {distribution.version}"
            for distribution in importlib.metadata.distributions()
            if (distribution.name or "").startswith("nvidia-nccl")
        ),
        gpu,
        str(getattr(try_import("torch.version"), "cuda", None)).partition(".")[0],
    )


def nccl_finding(packages: Sequence[str], gpu: bool, cuda: str = "13") -> Finding:
    """Judge the installed NCCL packages, each as `name version`. cuda: major version that torch is built for."""
    if len(packages) < 2:
        return Finding("NCCL", packages[0] if packages else "not installed; only several GPUs need it")
    return Finding(
        "NCCL",
        f"{' and '.join(packages)} install the same libnccl.so.2: xgboost's may replace torch's",
        "error" if gpu else "warning",
        "pip uninstall xgboost-cu13 nvidia-nccl-cu13; pip install --force-reinstall --no-deps xgboost nvidia-nccl-cu12"
        if cuda == "12"
        else "pip uninstall xgboost nvidia-nccl-cu12; pip install --force-reinstall --no-deps xgboost-cu13 "
        "nvidia-nccl-cu13",
    )


def compiler() -> Finding:
    """Check what `train.compile` needs on a GPU: Triton builds a small C program against Python's headers."""
    program = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return compiler_finding(program if program and shutil.which(program) else None, header if header.exists() else None)


def compiler_finding(program: str | None, header: Path | None) -> Finding:
    """Judge the C compiler and Python's header; None if there is none."""
    if program and header:
        return Finding("C compiler", f"{program} with {header}, for torch.compile")
    lacking = " and ".join([*([] if program else ["a C compiler"]), *([] if header else ["Python.h"])])
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    advice = f"apt-get install build-essential python{version}-dev, or train.compile=false"
    return Finding("C compiler", f"{lacking} not found, which torch.compile needs on a GPU", "error", advice)


def architectures(gpus: Sequence[Gpu]) -> list[Finding]:
    """Check that torch is built for each kind of GPU of this host."""
    torch = try_import("torch")
    built = torch.cuda.get_arch_list() if torch and gpus else []
    return [
        finding
        for name, capability in {gpu.name: gpu.capability for gpu in gpus}.items()
        if (finding := architecture_finding(name, capability, built, str(torch.version.cuda)))
    ]


def architecture_finding(name: str, capability: tuple[int, int], built: Sequence[str], cuda: str) -> Finding | None:
    """Report a GPU that torch has no kernels for; None if it has some, or where it does not list them (`built` empty).

    built: as torch.cuda.get_arch_list returns it. sm_XY runs on devices of the same major version X and a minor version
    from Y on, compute_XY on all from X.Y on, as NVIDIA's guide to CUDA says.
    """
    for kind, number in (each.split("_", 1) for each in built):
        digits = number.rstrip("af")  # sm_90a: features of this architecture only
        major, minor = int(digits[:-1]), int(digits[-1])
        if (kind == "compute" and (major, minor) <= capability) or (major == capability[0] and minor <= capability[1]):
            return None
    if not built:
        return None
    text = f"{name} is sm_{capability[0]}{capability[1]}, but torch for CUDA {cuda} has kernels for {', '.join(built)}"
    advice = "install torch for an older CUDA version (pytorch.org/get-started), or CUDA_VISIBLE_DEVICES= for the CPU"
    return Finding("architecture", text, "error", advice)
