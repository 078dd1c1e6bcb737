"""SKNets in folders and on the Hugging Face Hub; needs the extra ``sknet-triton[hub]``."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sknet_triton.checkpoints.config import from_config, to_config
from sknet_triton.checkpoints.diff import CheckpointMismatchError, diff_states
from sknet_triton.checkpoints.files import read_safetensors
from sknet_triton.checkpoints.hints import hints
from sknet_triton.models import SKNet

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError(
        "sknet_triton.checkpoints.hub needs huggingface_hub and safetensors: "
        "pip install 'sknet-triton[hub]'"
    ) from error

CONFIG, WEIGHTS = "config.json", "model.safetensors"


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

        Args:
            pretrained_model_name_or_path: a folder that ``save_pretrained`` wrote, or a
                repository's name; a folder needs no network.
            force_download: as in ``huggingface_hub.hf_hub_download``, like the next four.
            token: likewise.
            cache_dir: likewise.
            local_files_only: likewise.
            revision: likewise.
            map_location: the device to put the network on.

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

    def save_pretrained(self, *args: Any, **kwargs: Any) -> str | None:
        """Writes a folder, as ``PyTorchModelHubMixin.save_pretrained``.

        Raises:
            ValueError: the network was changed after it was built; nothing is written.
        """
        to_config(self)  # refused before the mixin removes an older config
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def _built(cls, config: Any, tensors: dict[str, Tensor]) -> "SKNetHub":
        """Builds the network around ``tensors``; nothing is allocated before they are compared."""
        model = cls(**from_config(config), device="meta")
        diff = diff_states(model.state_dict(), tensors)
        if diff:
            raise CheckpointMismatchError(diff, hints(diff, tensors))
        model.load_state_dict(tensors, assign=True)
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        """Writes the two files; the mixin's public methods call this."""
        config = json.dumps(to_config(self), indent=2)
        # safetensors takes no strides, such as those of channels_last.
        tensors = {key: tensor.contiguous() for key, tensor in self.state_dict().items()}
        save_file(tensors, save_directory / WEIGHTS, metadata={"format": "pt"})
        (save_directory / CONFIG).write_text(f"{config}\n")


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
