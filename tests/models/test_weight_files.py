"""Weight files of every origin are read, or named for what they are; no file and no version is chosen in silence."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from triderm_dist.models.towers import build_tower, locate_weights
from triderm_dist.models.weight_files import read_weight_file, weights_in
from triderm_dist.models.weights import fill, without_prefix
from triderm_dist.schema import CheckpointError, InputError

STATE = {"stem.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(2)}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


WRAPPED: dict[str, Any] = {
    "compiled": prefixed(STATE, "_orig_mod."),
    "parallel": prefixed(STATE, "module."),
    "compiled in parallel": prefixed(STATE, "module._orig_mod."),
    "Lightning": {"state_dict": prefixed(STATE, "model."), "epoch": 3},
    "Lightning, compiled": {"state_dict": prefixed(STATE, "model._orig_mod.")},
    "each block compiled": {"stem._orig_mod.weight": STATE["stem.weight"], "head.bias": STATE["head.bias"]},
    "checkpointed blocks": {
        "_checkpoint_wrapped_module.stem.weight": STATE["stem.weight"],
        "head.bias": STATE["head.bias"],
    },
    "sharded data parallel": prefixed(STATE, "_fsdp_wrapped_module."),
    "another key": {"encoder": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}},
    "settings beside it": {"model": STATE, "args": {"lr": 0.1}, "scaler": {"scale": 1.0}},
    "settings under a wrapper's key": {"model": {"depth": 3}, "state_dict": STATE},
    "average that is the same": {"state_dict": STATE, "state_dict_ema": dict(STATE)},
    "head of another loss": {"state_dict": STATE, "criterion": {"weight": torch.ones(5)}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_weights_are_read(tmp_path: Path, name: str) -> None:
    assert equal(read_weight_file(saved(tmp_path / "w.pth", WRAPPED[name])), STATE)


OTHER = {key: value + 1 for key, value in STATE.items()}
SEVERAL: dict[str, tuple[Any, str]] = {
    "timm": ({"state_dict": STATE, "state_dict_ema": OTHER}, "'state_dict' and 'state_dict_ema'"),
    "average in parallel": ({"model": STATE, "model_ema": prefixed(OTHER, "module.")}, "'model' and 'model_ema'"),
    "wrapped average": ({"model": STATE, "ema": {"module": OTHER, "decay": 0.9}}, "'model' and 'ema'"),
    "teacher": ({"student": STATE, "teacher": OTHER}, "'student' and 'teacher'"),
    "two wrappers": ({"state_dict": STATE, "model": OTHER}, "'state_dict' and 'model'"),
    "two networks": ({"encoder": STATE, "decoder": {"out.weight": torch.ones(3)}}, "'encoder' and 'decoder'"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_versions_of_the_weights_are_refused(tmp_path: Path, name: str) -> None:
    content, names = SEVERAL[name]
    with pytest.raises(CheckpointError, match=rf"w\.pth: holds weights under {names}; save those to use"):
        read_weight_file(saved(tmp_path / "w.pth", content))


def archive(**members: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                file.writestr(name.replace("_pkl", ".pkl"), data)

    return write


def edited(change: Callable[[bytes], bytes], safetensors: bool = False) -> Callable[[Path], object]:
    """Return a writer of a valid file with other bytes."""

    def write(path: Path) -> None:
        save_file(STATE, path) if safetensors else torch.save(STATE, path)
        path.write_bytes(change(path.read_bytes()))

    return write


class Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


NO_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "only zero bytes"),
    "pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "page": (lambda path: path.write_bytes(b"<!DOCTYPE html><title>Google Drive - Virus scan warning"), "a web page"),
    "denied": (lambda path: path.write_bytes(b"<?xml version='1.0'?><Error>AccessDenied"), "an XML file"),
    "json": (lambda path: path.write_bytes(b'{"error": "gated repository"}'), "a JSON file"),
    "list": (lambda path: path.write_bytes(b'{"weight_map": {}}'), "a list of the parts of a sharded file; name it"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(40)), "a gzip file"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40)), "an HDF5 file"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\x03" + bytes(40)), "a GGUF file"),
    "zip": (archive(weights=b"inside"), "a zip archive without tensors of PyTorch.*; unpack it"),
    "script": (archive(data_pkl=b"", constants_pkl=b""), "a TorchScript archive, which holds code"),
    "code": (lambda path: torch.save({"model": Code()}, path), r"a Python object, \w+\.system, that would run code"),
    "old code": (
        lambda path: torch.save({"model": Code()}, path, _use_new_zipfile_serialization=False),
        r"a Python object, \w+\.system, that would run code",
    ),
    "cut": (edited(lambda data: data[:-100]), "cut off or damaged"),
    "cut early": (edited(lambda data: data[:200]), "cut off or damaged"),
    "cut safetensors": (edited(lambda data: data[:-4], True), "safetensors, cut off or damaged"),
    "cut header": (edited(lambda data: data[:40], True), "safetensors, cut off or damaged"),
    "garbled header": (edited(lambda data: data.replace(b"dtype", b"dtipe"), True), "safetensors, cut off or damaged"),
    "false offsets": (edited(lambda data: data.replace(b"[0,8]", b"[0,9]"), True), "safetensors, cut off or damaged"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no named tensors"),
    "list of tensors": (lambda path: torch.save([torch.ones(1)], path), "holds no named tensors"),
    "without values": (
        lambda path: torch.save({"a": torch.ones(2, device="meta")}, path),
        "a has no values or is sparse",
    ),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_files_are_named_whatever_their_suffix(
    tmp_path: Path, name: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write, message = NO_WEIGHTS[name]
    path = tmp_path / f"w{suffix}"
    write(path)
    with pytest.raises(CheckpointError, match=rf"w{re.escape(suffix)}: .*{message}") as error:
        read_weight_file(path)
    text = str(error.value)
    assert text.isprintable() and "weights_only" not in text and "PyTorch 2" not in text and not Path("ran").exists()


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_weight_file(saved(tmp_path / "w.pth", content))


def test_the_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.bin")
    assert equal(read_weight_file(tmp_path / "w.bin"), STATE)
    assert equal(read_weight_file(saved(tmp_path / "w.safetensors", STATE)), STATE)
    with pytest.raises(CheckpointError, match=r"folder\.pth: a folder, no weight file"):
        (tmp_path / "folder.pth").mkdir()
        read_weight_file(tmp_path / "folder.pth")


def write_shards(folder: Path, stem: str = "model", suffix: str = ".safetensors") -> list[Path]:
    parts = [folder / f"{stem}-{n:05}-of-00002{suffix}" for n in (1, 2)]
    for part, (key, value) in zip(parts, STATE.items(), strict=True):
        save_file({key: value}, part) if suffix == ".safetensors" else torch.save({key: value}, part)
    listed = {key: part.name for part, key in zip(parts, STATE, strict=True)}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return parts


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_files_are_read_by_any_part_or_their_list(tmp_path: Path, suffix: str) -> None:
    parts = write_shards(tmp_path, suffix=suffix)
    for file in (*parts, tmp_path / f"model{suffix}.index.json", weights_in(tmp_path, ("open_clip.bin",))):
        assert equal(read_weight_file(file), STATE)
    parts[1].unlink()
    for file in (parts[0], tmp_path / f"model{suffix}.index.json"):
        with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.\w+: no such file, a part of .*all 2 parts"):
            read_weight_file(file)
    with pytest.raises(CheckpointError, match="a part of"):  # before training
        locate_weights(str(parts[0]))
    torch.save(STATE, parts[1])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.\w+: holds 'stem.weight', as does another part"):
        read_weight_file(parts[0])


@pytest.mark.parametrize(
    "listed", ["[]", "{", "[" * 9999, '{"weight_map": {}}', '{"weight_map": {"a": "../../x.bin"}}']
)
def test_lists_of_parts_are_checked(tmp_path: Path, listed: str) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(listed)
    with pytest.raises(CheckpointError, match=r"index\.json: (not a list of the parts|lists no files of its own)"):
        read_weight_file(tmp_path / "m.safetensors.index.json")


def test_one_of_several_files_of_a_folder_is_never_chosen_by_its_name(tmp_path: Path) -> None:
    for name in ("epoch_1.pt", "optimizer.pt", "rng_state_0.pth", "training_args.bin"):
        saved(tmp_path / name, STATE)
    assert weights_in(tmp_path, ("open_clip_model.safetensors",)).name == "epoch_1.pt"
    saved(tmp_path / "epoch_32.pt", OTHER)
    with pytest.raises(
        CheckpointError, match=r"holds 2 weight files, epoch_1\.pt, epoch_32\.pt; name the one to use open"
    ):
        weights_in(tmp_path, ("open_clip_model.safetensors", "b.bin"))
    saved(tmp_path / "b.bin", OTHER)
    assert weights_in(tmp_path, ("open_clip_model.safetensors", "b.bin")).name == "b.bin"


# --- loading into a module -------------------------------------------------------------------------------------------


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


BAD_VALUES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "nan": ("0.weight", lambda t: t * torch.nan, "0.weight holds 6 values that are NaN or infinite"),
    "one infinite": ("0.bias", lambda t: torch.cat([t[:2], torch.tensor([torch.inf])]), "0.bias holds 1 values"),
    "buffer": ("1.running_var", lambda t: t.half() * torch.nan, "1.running_var holds 3 values"),
    "quantized": ("0.weight", lambda t: t.to(torch.int8), "0.weight holds torch.int8, the tower needs torch.float32"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_weights_without_meaning_are_named(module: nn.Module, name: str) -> None:
    key, change, message = BAD_VALUES[name]
    state = {each: value.clone() for each, value in module.state_dict().items()}
    state[key] = change(state[key])
    with pytest.raises(CheckpointError, match=f"w.pth: {message}"):
        fill(module, state, Path("w.pth"))


def test_a_prefix_is_found_if_it_is_the_only_one(module: nn.Module) -> None:
    state = module.state_dict()
    found, prefix = without_prefix({**prefixed(state, "net.backbone."), "net.x": torch.ones(1)}, module, Path("w.pth"))
    assert prefix == "net.backbone." and equal(found, state)
    assert without_prefix(state, module, Path("w.pth")) == (state, "")
    incomplete = prefixed({key: value for key, value in state.items() if key != "1.bias"}, "net.")
    assert without_prefix(incomplete, module, Path("w.pth")) == (incomplete, "")
    with pytest.raises(CheckpointError, match=r"w\.pth: holds the network's weights under 'student' and 'teacher'"):
        without_prefix({**prefixed(state, "student."), **prefixed(state, "teacher.")}, module, Path("w.pth"))


def test_timm_weights_under_a_prefix_are_loaded_and_reported(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    file = saved(tmp_path / "w.pth", {**prefixed(model.state_dict(), "backbone."), "loss.weight": torch.ones(3)})
    tower = build_tower(f"timm:test_resnet@{file}", image_size=64)
    assert "under 'backbone', left out: loss.weight" in tower.report
    assert torch.equal(next(tower.parameters()), next(model.parameters()))


def test_what_is_no_weight_file_is_known_before_training(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("<html>sign in</html>")
    for source in (f"timm:test_resnet@{tmp_path}/w.pth", f"{tmp_path}/w.pth"):
        with pytest.raises(
            CheckpointError, match=r"w\.pth: not a readable weight file \(a web page\); download it again"
        ):
            locate_weights(source)
    with pytest.raises(InputError, match="no such file"):
        locate_weights(f"timm:test_resnet@{tmp_path}/gone.pth")
