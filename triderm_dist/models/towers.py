"""Every image encoder behind one face: a stem, a row of blocks, a tail, and patch tokens at the end.

Whatever the source, a tower is cut into these three parts, so that freezing, layer-wise learning rates, activation
checkpointing and compilation speak of blocks and never of one library's parameter names.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triderm_dist.models.panderm import build_panderm, is_panderm, load_panderm
from triderm_dist.models.weights import (
    WEIGHT_SUFFIXES,
    fill,
    hub_file,
    listing,
    read_weights,
    rename_by_order,
    strip_prefix,
    weight_file,
)
from triderm_dist.schema import CheckpointError, ConfigError, InputError, one_line

Triple = tuple[float, float, float]

OPENAI_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)

_CONTAINERS = re.compile(r"blocks|stages|layers|(layer|s)\d+")
_HEADS = ("global_pool", "attn_pool", "fc_norm", "pre_logits", "head", "head_drop", "head_dist", "classifier", "fc")
_CLIP_HEADS = ("ln_post", "proj", "attn_pool")


class TokenShape(NamedTuple):
    """L and width of the tokens (B, L, width) of a tower, for a network that is fed tokens computed beforehand."""

    num_tokens: int
    width: int


class Tower(nn.Module):
    """An image encoder: pixels (B, 3, H, W), normalized with its own `mean` and `std`, to tokens (B, L, width).

    `blocks` are the units of freezing, learning-rate decay, checkpointing and compilation; the stem (patch embedding,
    class token, positions, first norm) comes before the first, the tail (last norm or convolution) after the last. The
    first `prefix_tokens` (class, registers) are dropped; a map (`layout` NCHW or NHWC) is read row by row.
    `architecture` names what the weights alone don't tell, `report` says in a line what was loaded from where.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        tail: nn.Module,
        *,
        width: int,
        num_tokens: int,
        image_size: int,
        mean: Triple,
        std: Triple,
        layout: str = "NLC",
        prefix_tokens: int = 0,
        architecture: str = "",
        report: str = "",
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.tail = tail
        self.width = width
        self.num_tokens = num_tokens
        self.image_size = image_size
        self.mean = mean
        self.std = std
        self.architecture = architecture
        self.report = report
        self.frozen_blocks = 0
        self._layout = layout
        self._prefix_tokens = prefix_tokens

    def freeze(self, num_blocks: int) -> None:
        """Keep the stem and the first `num_blocks` blocks (all: the tail too) as they are; 0 freezes nothing.

        The frozen prefix runs outside autograd, so that none of its activations are stored, and stays in evaluation
        mode: no dropout or drop path, and batch norms keep their statistics.
        """
        self.frozen_blocks = min(num_blocks, len(self.blocks))
        for module in self._frozen():
            module.requires_grad_(False)
        self.train(self.training)

    @property
    def trained_blocks(self) -> list[nn.Module]:
        """The blocks after the frozen prefix."""
        return list(self.blocks)[self.frozen_blocks :]

    def train(self, mode: bool = True) -> Tower:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        chain = [self.stem, *self.blocks, self.tail]
        frozen = len(self._frozen())
        x = x.to(next(self.stem.parameters()).dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            for module in chain[:frozen]:
                x = module(x)
        for module in chain[frozen:]:
            x = module(x)
        if self._layout == "NLC":
            return x[:, self._prefix_tokens :]
        return x.flatten(1, 2) if self._layout == "NHWC" else x.flatten(2).transpose(1, 2)

    def _frozen(self) -> list[nn.Module]:
        if not self.frozen_blocks:
            return []
        prefix = [self.stem, *list(self.blocks)[: self.frozen_blocks]]
        return [*prefix, self.tail] if self.frozen_blocks == len(self.blocks) else prefix


def tower_hash(tower: Tower) -> str:
    """sha256 over all that decides a tower's tokens: architecture, input size, normalization, names and tensors."""
    face = [tower.architecture, tower.image_size, tower.mean, tower.std]
    digest = hashlib.sha256(json.dumps(face).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Viewed as bytes, since NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_tower(
    source: str, pretrained: bool = True, image_size: int | None = None, quick_gelu: bool | None = None
) -> Tower:
    """The tower that `source` names.

    `hf-hub:ID` and `local-dir:PATH`: an open_clip repository or folder, of which only the visual tower is built (its
    own ViT, a timm model, or PanDerm). A .pth, .pt, .bin or .safetensors file: PanDerm, sizes read from the tensors.
    `timm:NAME`: any timm network that is a chain of blocks, weights from timm's hub; `timm:NAME@FILE`: from a file,
    or `timm:NAME@package:PACKAGE`: from the weight file that an installed Python package carries.
    `pretrained=False` takes the architecture and random weights. `image_size` in pixels; other than the tower's own,
    positions are resampled. `quick_gelu` overrides an open_clip config, which may not say what shapes can't tell.

    Raises CheckpointError where weights are missing, don't fill the whole tower or belong to another architecture,
    InputError or ConfigError for a source that is unknown or can't be reached.
    """
    kind, _, rest = source.partition(":")
    if kind == "timm":
        _refuse_quick_gelu(quick_gelu, source)
        name, _, file = rest.partition("@")
        return _timm_tower(name, weight_file(file) if file else None, pretrained, image_size)
    if kind == "hf-hub":
        config = hub_file(rest, (OPEN_CLIP_CONFIG,))
        return _open_clip_tower(
            source, config, lambda: hub_file(rest, OPEN_CLIP_WEIGHTS), pretrained, image_size, quick_gelu
        )
    if kind == "local-dir":
        folder = Path(rest)
        return _open_clip_tower(
            source, folder / OPEN_CLIP_CONFIG, lambda: _weights_in(folder), pretrained, image_size, quick_gelu
        )
    if Path(source).suffix in WEIGHT_SUFFIXES:
        _refuse_quick_gelu(quick_gelu, source)
        model, said = load_panderm(read_weights(Path(source)), Path(source), pretrained)
        return _panderm_tower(model, image_size, IMAGENET_MEAN, IMAGENET_STD, f"{source}: PanDerm, {said}")
    raise ConfigError(
        f"tower source {source!r} is unknown: write hf-hub:ID, local-dir:PATH, timm:NAME, timm:NAME@FILE, "
        "or the path of a PanDerm checkpoint (.pth, .pt, .bin, .safetensors)"
    )


def _timm_tower(name: str, file: Path | None, pretrained: bool, image_size: int | None) -> Tower:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=1, cutoff=0.0)
        raise InputError(f"timm:{name}: timm {timm.__version__} has no such model; did you mean {near[0]!r}?")
    download = pretrained and file is None
    try:
        model: Any = timm.create_model(name, pretrained=download, num_classes=0)
    except Exception as error:  # whatever timm and the hub's client raise
        raise InputError(
            f"timm:{name}: can't be built ({one_line(error, 160, with_type=True)}); "
            + ("check the network, or give the weights as timm:NAME@FILE" if download else "take another model")
        ) from None
    said = "weights from timm's hub" if download else "random weights"
    if pretrained and file is not None:
        said = _fill_timm(model, name, file)
    settings = model.pretrained_cfg
    own_size = settings["input_size"][-1]
    said = f"timm:{name}: {said}"
    return _split(model, name, own_size, image_size, tuple(settings["mean"]), tuple(settings["std"]), said)


def _fill_timm(model: nn.Module, name: str, file: Path) -> str:
    """Fill a timm model without classifier from a file; says how, for the report."""
    import timm

    state = read_weights(file)
    how = ""
    if not set(state) & set(model.state_dict()) and file.suffix != ".safetensors":  # safetensors keeps no order
        with torch.device("meta"):
            names = timm.create_model(name, pretrained=False).state_dict()
        renamed = rename_by_order(state, names)
        if renamed is not None:
            state, how = renamed, ", names differ, renamed by order since count, order and shapes all agree"
    rest = fill(model, state, file, left_out=tuple(f"{head}." for head in _HEADS))
    return f"{len(state) - len(rest)} tensors of {file}{how}" + (f", left out: {listing(rest)}" if rest else "")


def _open_clip_tower(
    source: str, config: Path, weights: Any, pretrained: bool, image_size: int | None, quick_gelu: bool | None
) -> Tower:
    """`config`: open_clip_config.json; `weights`: called for the path of the weight file when it is needed."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        model_cfg = settings.get("model_cfg", settings)
        vision = model_cfg["vision_cfg"]
    except FileNotFoundError:
        raise InputError(f"{config}: no such file; {source} must name a folder with {OPEN_CLIP_CONFIG}") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{config}: no open_clip config ({type(error).__name__}: {error})") from None
    preprocess = settings.get("preprocess_cfg") or {}
    mean: Triple = tuple(preprocess.get("mean") or OPENAI_MEAN)
    std: Triple = tuple(preprocess.get("std") or OPENAI_STD)

    file = Path(weights()) if pretrained else config
    state = read_weights(file) if pretrained else {}
    if "pretrain_path" in vision or is_panderm(state):
        _refuse_quick_gelu(quick_gelu, source)
        if pretrained:
            panderm, said = load_panderm(state, file)
        else:
            sizes = [
                vision.get(key, own)
                for key, own in (("width", 768), ("layers", 12), ("patch_size", 16), ("image_size", 224))
            ]
            panderm, said = build_panderm(*sizes), "random weights"
        return _panderm_tower(panderm, image_size, mean, std, f"{source}: PanDerm in an open_clip checkpoint, {said}")

    quick = bool(model_cfg.get("quick_gelu", False)) if quick_gelu is None else quick_gelu
    visual = _build_visual(model_cfg, quick, config)
    is_timm = hasattr(visual, "trunk")
    said = "random weights"
    if pretrained:
        visual_state = strip_prefix(state, "visual.trunk." if is_timm else "visual.")
        if not visual_state:
            raise CheckpointError(f"{file}: has no 'visual.' tensors; its first keys are {listing(list(state))}")
        left_out = tuple(f"{head}." for head in _HEADS) if is_timm else ("proj",)
        rest = fill(visual.trunk if is_timm else visual, visual_state, file, left_out)
        said = f"{len(visual_state) - len(rest)} tensors of {file.name}; left out: text tower, projection"
    if is_timm:
        _refuse_quick_gelu(quick_gelu, source)
        name = vision["timm_model_name"]
        own_size = visual.trunk.pretrained_cfg["input_size"][-1]
        said = f"{source}: open_clip around timm {name}, {said}"
        return _split(visual.trunk, name, own_size, image_size, mean, std, said)
    if quick_gelu is not None:
        origin = "by setting"
    elif "quick_gelu" in model_cfg:
        origin = "by the config"
    else:
        origin = "the config does not say; towers trained from OpenAI's weights need tower.quick_gelu=true"
    said = f"{source}: open_clip ViT, {said}; QuickGELU {'on' if quick else 'off'} ({origin})"
    return _clip_vit_tower(visual, image_size, mean, std, f"open_clip ViT, QuickGELU {'on' if quick else 'off'}", said)


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()]
    found += sorted(path for path in folder.glob("*") if path.suffix in WEIGHT_SUFFIXES and path not in found)
    if not found:
        raise CheckpointError(f"{folder}: has no weight file; expected {' or '.join(OPEN_CLIP_WEIGHTS)}")
    return found[0]


def _build_visual(model_cfg: dict[str, Any], quick_gelu: bool, config: Path) -> Any:
    """open_clip's visual tower alone: its public builders make the text tower too, which may ask the hub for files."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    try:
        vision = CLIPVisionCfg(**model_cfg["vision_cfg"])
        vision.timm_model_pretrained = False
        visual = _build_vision_tower(model_cfg.get("embed_dim", 512), vision, quick_gelu)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{config}: open_clip can't build this vision tower ({one_line(error, 160)})") from None
    if not hasattr(visual, "trunk") and (not hasattr(visual, "transformer") or visual.attn_pool is not None):
        raise InputError(
            f"{config}: only open_clip's ViT without attentional pooling and its timm models are supported"
        )
    return visual


class _ClipStem(nn.Module):
    """Patch embedding, class token, positions and first norm of open_clip's ViT. Pixels to (B, 1 + L, width)."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.conv1 = visual.conv1
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre = visual.ln_pre

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(len(x), 1, -1).to(patches.dtype)
        return self.ln_pre(torch.cat([class_token, patches], 1) + self.positional_embedding.to(patches.dtype))


def _clip_vit_tower(
    visual: Any, image_size: int | None, mean: Triple, std: Triple, architecture: str, report: str
) -> Tower:
    from timm.layers import resample_abs_pos_embed

    own_size, patch = visual.image_size[0], visual.patch_size[0]
    size = _checked_size(image_size, own_size, patch)
    stem = _ClipStem(visual)
    if size != own_size:
        positions = stem.positional_embedding
        resampled = resample_abs_pos_embed(positions.detach()[None], [size // patch] * 2, num_prefix_tokens=1)[0]
        stem.positional_embedding = nn.Parameter(resampled, requires_grad=positions.requires_grad)
        report += f"; positions resampled from {own_size} to {size} pixels"
    return Tower(
        stem,
        list(visual.transformer.resblocks),
        visual.ln_post,
        width=visual.conv1.out_channels,
        num_tokens=(size // patch) ** 2,
        image_size=size,
        mean=mean,
        std=std,
        prefix_tokens=1,
        architecture=architecture,
        report=report,
    )


def _panderm_tower(model: Any, image_size: int | None, mean: Triple, std: Triple, report: str) -> Tower:
    own_size = model.patch_embed.img_size[0]
    return _split(model, "PanDerm", own_size, image_size, mean, std, report)


class _TimmStem(nn.Module):
    """What is left of a timm model when its blocks, tail and head are taken out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


def _split(
    model: Any, name: str, own_size: int, image_size: int | None, mean: Triple, std: Triple, report: str
) -> Tower:
    """Cut a timm model into stem, blocks and tail, and make sure that the chain computes what the model does."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    size = _checked_size(image_size, own_size, patch)
    if size != own_size and hasattr(model, "set_input_size"):
        model.set_input_size((size, size))
        report += f"; positions resampled from {own_size} to {size} pixels"
    probe = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = model.forward_features(probe)

    children = [child for child, _ in model.named_children()]
    containers = [child for child in children if _CONTAINERS.fullmatch(child)]
    blocks: list[nn.Module] = []
    for child in containers:
        container = model.get_submodule(child)
        # ResNet's layers are blocks themselves; a container of blocks is emptied and what was in it is the blocks.
        blocks += [container] if len(containers) > 1 else list(container.children())
        setattr(model, child, nn.ModuleList() if isinstance(container, nn.ModuleList) else nn.Sequential())
    after = children[children.index(containers[-1]) + 1 :] if containers else []
    tail_names = list(takewhile(lambda child: child not in _HEADS, after))
    tail = nn.Sequential(*(model.get_submodule(child) for child in tail_names))
    for child in after:
        setattr(model, child, nn.Identity())
    chain = nn.Sequential(_TimmStem(model), *blocks, tail)
    try:
        with torch.no_grad():
            same = bool(blocks) and torch.allclose(chain(probe), expected, rtol=1e-4, atol=1e-5)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # blocks that need more than the last one's output
        same = False
    if not same:
        raise InputError(
            f"timm:{name}: is no plain chain of blocks; take a ViT, BEiT, EfficientNet, ResNet, ConvNeXt or Swin"
        )

    if expected.ndim == 3:
        layout, prefix = "NLC", getattr(model, "num_prefix_tokens", 0)
        num_tokens, width = expected.shape[1] - prefix, expected.shape[2]
    else:
        layout, prefix = str(getattr(model, "output_fmt", "NCHW")).split(".")[-1], 0
        width = expected.shape[-1] if layout == "NHWC" else expected.shape[1]
        num_tokens = expected[0].numel() // width
    tower = Tower(
        chain[0],
        blocks,
        tail,
        width=width,
        num_tokens=num_tokens,
        image_size=size,
        mean=mean,
        std=std,
        layout=layout,
        prefix_tokens=prefix,
        architecture=name,
        report=report,
    )
    return tower.train(training)


def _checked_size(image_size: int | None, own_size: int, patch: int) -> int:
    if image_size is not None and image_size % patch:
        raise ConfigError(f"tower.image_size: {image_size} is not a multiple of the tower's patch of {patch} pixels")
    return image_size or own_size


def _refuse_quick_gelu(quick_gelu: bool | None, source: str) -> None:
    if quick_gelu is not None:
        raise ConfigError(f"tower.quick_gelu: {source} is no open_clip ViT, leave it null")
