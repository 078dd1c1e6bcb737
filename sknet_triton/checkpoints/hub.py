"""SKNets in folders and on the Hugging Face Hub; needs the extra ``sknet-triton[hub]``."""

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sknet_triton.checkpoints.load import CheckpointMismatchError, diff_states, read_safetensors
from sknet_triton.layers import SKUnit
from sknet_triton.models import SKNet, StageSpec

try:
    import safetensors.torch  # noqa: F401 - saving needs it
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ImportError as error:
    raise ImportError(
        "sknet_triton.checkpoints.hub needs huggingface_hub and safetensors: "
        "pip install 'sknet-triton[hub]'"
    ) from error

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "sknet"
# Far beyond any network, and few enough to be built without their tensors.
_MOST_UNITS = 1024


class SKNetHub(
    SKNet,
    PyTorchModelHubMixin,
    library_name="sknet-triton",
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/1903.06586",
    tags=["sknet"],
):
    """An `SKNet` with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

    A folder or repository of one holds ``config.json``, the arguments of `SKNet` as plain data,
    and ``model.safetensors``. Arguments and attributes as in `SKNet`.
    """

    @classmethod
    def from_model(cls, model: SKNet) -> "SKNetHub":
        """Returns an SKNetHub with the tensors of ``model``: shared, not copied.

        Raises:
            TypeError: ``model`` is another class, such as `SKNetFeatures`.
            ValueError: ``model`` was changed after it was built, as by `fuse_bn`.
        """
        if type(model) not in (SKNet, cls):
            raise TypeError(f"model: expected an SKNet, got {type(model).__name__}")
        return cls._built(to_config(model), model.state_dict()).train(model.training)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the config alone says what is built
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
    ) -> "SKNetHub":
        """Builds the network of a local folder or of a repository on the Hub, in eval mode.

        A folder is one that ``save_pretrained`` wrote, and needs no network. ``map_location`` is
        the device to put the network on; the other options are those of
        ``huggingface_hub.hf_hub_download``.

        Raises:
            FileNotFoundError: the folder, or one of its two files, is not there.
            ValueError: the config or the weights are damaged or do not belong together.
        """
        config, weights = _files(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return cls._built(_read_json(config), read_safetensors(weights)).to(map_location).eval()

    def save_pretrained(self, *args: Any, config: object = None, **kwargs: Any) -> str | None:
        """Writes a folder, as ``PyTorchModelHubMixin.save_pretrained``; the config is our own.

        Raises:
            ValueError: the network was changed after it was built; nothing is written.
        """
        return super().save_pretrained(*args, config=to_config(self), **kwargs)

    @classmethod
    def _built(cls, config: Any, tensors: dict[str, Tensor]) -> "SKNetHub":
        """Builds the network around ``tensors``; nothing is allocated before they are compared."""
        model = cast(SKNetHub, from_config(config, cls))
        diff = diff_states(model.state_dict(), tensors)
        if diff:
            raise CheckpointMismatchError(diff)
        model.load_state_dict(tensors, assign=True)
        return model


def _files(name: str | os.PathLike[str], **options: Any) -> tuple[Path, Path]:
    """Returns the config and the weights: of a folder, else of a repository on the Hub."""
    folder = Path(name)
    if folder.is_dir():
        for file in (folder / CONFIG, folder / WEIGHTS):
            if not file.is_file():
                raise FileNotFoundError(f"{folder}: expected a file {file.name} in it, found none")
        return folder / CONFIG, folder / WEIGHTS
    if not isinstance(name, str) or folder.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"{name}: expected a folder, found none")
    config, weights = (Path(hf_hub_download(name, file, **options)) for file in (CONFIG, WEIGHTS))
    return config, weights


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got something else: {error}") from error


def to_config(model: SKNet) -> dict[str, Any]:
    """Returns what builds ``model`` again, as plain data.

    Raises:
        ValueError: an SKNet built from it would have other tensors, as after `fuse_bn`.
    """
    first = cast(SKUnit, cast(nn.Sequential, model.stages[0])[0]).sk
    convs = [cast(nn.Conv2d, branch.get_submodule("conv")) for branch in first.branches]
    norms = {"bn": "batch", "norm": "layer"}
    children = [name for name, _ in first.fc1.named_children()] if first.aggregate == "sk" else []
    config = {
        "model_type": MODEL_TYPE,
        "stages": [_stage(cast(nn.Sequential, stage)) for stage in model.stages],
        "num_classes": model.num_classes,
        "in_chans": cast(nn.Conv2d, model.stem.get_submodule("conv")).in_channels,
        "variant": "caffe" if model.pool.ceil_mode else "paper",
        "unit_options": {
            "branches": [[c.kernel_size[0], c.dilation[0], c.groups] for c in convs],
            "aggregate": first.aggregate,
            "fc_norm": next((norms[name] for name in children if name in norms), "none"),
        },
    }
    diff = diff_states(from_config(config).state_dict(), model.state_dict())
    if diff:
        raise ValueError(f"model: expected an SKNet as it was built, got changes: {diff}")
    return config


def _stage(stage: nn.Sequential) -> dict[str, int | None]:
    sk = cast(SKUnit, stage[0]).sk
    d = sk.fc2.in_channels if sk.aggregate == "sk" else None
    return {"width": sk.out_channels, "units": len(stage), "stride": sk.stride, "d": d}


def from_config(config: Any, cls: type[SKNet] = SKNet) -> SKNet:
    """Builds the network that a config stands for, without memory for its tensors.

    Raises:
        ValueError: no network can be built from it; the argument that is wrong is named.
    """
    try:
        given = {**config, "stages": tuple(StageSpec(**stage) for stage in config["stages"])}
        if given.pop("model_type") != MODEL_TYPE:
            raise ValueError(f"model_type: expected {MODEL_TYPE!r}, got {config['model_type']!r}")
        units = sum(stage.units for stage in given["stages"])
        if units > _MOST_UNITS:
            raise ValueError(f"stages: expected at most {_MOST_UNITS} units, got {units}")
        return cls(**given, device="meta")
    except (KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"config: expected the arguments of an SKNet: {error!r}") from error
