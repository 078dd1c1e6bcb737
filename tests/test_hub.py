"""SKNets in folders and on the Hub: what is written builds the same network, and only that."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

from sknet_triton import SKNet, SKNetFeatures, StageSpec, fuse_bn, sknet26
from sknet_triton.checkpoints import hub, load_checkpoint
from sknet_triton.checkpoints.hub import SKNetHub, to_config
from tests.helpers import assert_same

SMALL = (StageSpec(32, 1, 1), StageSpec(64, 2, 2, d=7))


def small(**kwargs: Any) -> SKNetHub:
    return SKNetHub(SMALL, **{"num_classes": 5, **kwargs})


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was asked for {args} {kwargs}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(hub, "hf_hub_download", refuse)


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    assert_same(model.state_dict(), other.state_dict(), bound=0)


# Round trips

CASES: dict[str, Callable[[], SKNet]] = {
    "sknet26": lambda: sknet26(num_classes=3),
    "custom": small,
    "no head, one channel": lambda: small(num_classes=0, in_chans=1),
    "caffe": lambda: small(variant="caffe"),
    "three branches": lambda: small(unit_options={"M": 3, "r": 4, "L": 8, "G": 16}),
    "kernels": lambda: small(unit_options={"branches": [(3, 1, 32), (5, 1, 8), (7, 3, 1)]}),
    "sum": lambda: small(unit_options={"aggregate": "sum"}),
    "layer norm": lambda: small(unit_options={"fc_norm": "layer"}),
    "no norm": lambda: small(unit_options={"fc_norm": "none"}),
    "bfloat16": lambda: small(dtype=torch.bfloat16),
    "strides": lambda: SKNetHub(
        (StageSpec(32, 1, 2), StageSpec(32, 1, 3), StageSpec(32, 2, 1)), num_classes=2
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_saved_is_built_again(case: str, tmp_path: Path) -> None:
    model = CASES[case]()
    SKNetHub.from_model(model).save_pretrained(tmp_path / "net")
    loaded = SKNetHub.from_pretrained(tmp_path / "net")
    assert isinstance(loaded, SKNet)
    assert_same_state(loaded, model)
    assert not loaded.training
    assert not load_checkpoint(model, tmp_path / "net" / "model.safetensors")
    x = torch.randn(2, to_config(model)["in_chans"], 64, 64, dtype=torch.float64)
    # Copies, because the order of a sum may depend on how a file's tensors are aligned.
    with torch.no_grad():
        out, expected = (copy.deepcopy(m).double().eval()(x) for m in (loaded, model))
    assert torch.equal(out, expected)
    # Kernels, strides, dilations and groups; only the name of the class may differ.
    assert str(loaded).removeprefix("SKNetHub") == str(model).removeprefix(type(model).__name__)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "net" / name).read_bytes()


def test_the_folder_holds_a_config_weights_and_a_card(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "sknet",
        "stages": [
            {"width": 32, "units": 1, "stride": 1, "d": 32},
            {"width": 64, "units": 2, "stride": 2, "d": 7},
        ],
        "num_classes": 5,
        "in_chans": 3,
        "variant": "paper",
        "unit_options": {
            "branches": [[3, 1, 32], [3, 2, 32]],
            "aggregate": "sk",
            "fc_norm": "batch",
        },
    }


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_saved_is_the_network_as_it_is_now(
    tmp_path: Path, copied: Callable[[SKNetHub], SKNetHub]
) -> None:
    model = small(in_chans=2)
    model.reset_classifier(9)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    model = copied(model)
    model.save_pretrained(tmp_path)
    loaded = SKNetHub.from_pretrained(tmp_path)
    assert loaded.num_classes == 9
    assert_same_state(loaded, model)


def test_from_model_shares_the_tensors_and_the_mode() -> None:
    model = SKNet(SMALL).eval()
    shared = SKNetHub.from_model(model)
    assert not shared.training
    with torch.no_grad():
        model.stem.get_parameter("conv.weight").fill_(2.0)
    assert_same_state(shared, model)
    with pytest.raises(TypeError, match=r"^model: expected an SKNet, got SKNetFeatures$"):
        SKNetHub.from_model(SKNetFeatures(SMALL))


# Refusals


def test_a_folded_network_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"^model: expected an SKNet as it was built, got changes"):
        fuse_bn(model.eval()).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    config = json.loads((path / "config.json").read_text())
    changed = edit(config)
    (path / "config.json").write_text(json.dumps(config if changed is None else changed))
    return path


NOT_BUILT = "^config: expected the arguments of an SKNet: "


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: [c], NOT_BUILT),
        (lambda c: c.pop("stages") and None, f"{NOT_BUILT}KeyError.*stages"),
        (lambda c: c.update(weights="../secret.safetensors"), f"{NOT_BUILT}.*'weights'"),
        (lambda c: c.update(model_type="resnet"), "^model_type: expected 'sknet', got 'resnet'"),
        (lambda c: c.update(stages=[]), "^stages: expected at least one"),
        (lambda c: c.update(stages="SKNET50"), f"{NOT_BUILT}.*StageSpec"),
        (lambda c: c["stages"][1].update(width="64"), NOT_BUILT),
        (lambda c: c["stages"][1].update(width=63), "^in_channels: expected a multiple of the"),
        (lambda c: c["stages"][1].update(width=2**80), NOT_BUILT),
        (lambda c: c["stages"][0].update(units=10**9), "^stages: expected at most 1024 units, got"),
        (lambda c: c["stages"][0].update(d=0), "^d: expected a positive number, got 0"),
        (lambda c: c["stages"][0].update(expansion=4), f"{NOT_BUILT}.*'expansion'"),
        (lambda c: c.update(num_classes=-1), "^num_classes: expected at least 0, got -1"),
        (lambda c: c.update(num_classes=float("nan")), NOT_BUILT),
        (lambda c: c.update(variant=["paper"]), "^variant: expected 'paper' or 'caffe', got"),
        (lambda c: c["unit_options"].update(branches=[[4, 1, 1]]), "^kernel: expected an odd"),
        (lambda c: c["unit_options"].update(aggregate="max"), "^aggregate: expected 'sk' or 'sum'"),
        (lambda c: c["unit_options"].update(device="cuda"), f"{NOT_BUILT}.*'device'"),
        # Of other weights, of more than any memory holds as well.
        (lambda c: c.update(num_classes=6), "num_classes is 5 in the checkpoint and 6"),
        (lambda c: c.update(num_classes=2**41), r"head\.weight: .* the model has .*2199023255552"),
    ],
)
def test_a_wrong_value_in_the_config_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SKNetHub.from_pretrained(edited(tmp_path, edit))


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff\xfe", b"__import__('os')"], ids=range(4)
)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json: expected JSON, got something else"),
        ("model.safetensors", r"model\.safetensors: the safetensors file is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, message: str, content: bytes) -> None:
    small().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SKNetHub.from_pretrained(tmp_path)


def test_a_folder_without_one_of_its_files_is_named(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"expected a file {name} in it, found none"):
            SKNetHub.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["./gone", "../gone", "~/gone", "/gone/net", Path("gone")])
def test_a_missing_folder_is_not_asked_of_the_hub(name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder, found none"):
        SKNetHub.from_pretrained(name)


# The Hub, with its two functions replaced


def test_a_repository_is_asked_for_its_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo: str, file: str, **options: Any) -> str:
        asked.append((repo, file, options))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    options: dict[str, Any] = {"force_download": True, "token": "t", "cache_dir": tmp_path}
    options |= {"local_files_only": True, "revision": "v1"}
    assert_same_state(SKNetHub.from_pretrained("someone/sknet", **options), model)
    on_meta = SKNetHub.from_pretrained("someone/sknet", **options, map_location="meta")
    assert {tensor.device.type for tensor in on_meta.state_dict().values()} == {"meta"}
    files = ("config.json", "model.safetensors")
    assert asked == 2 * [("someone/sknet", file, options) for file in files]


def test_pushing_uploads_what_saving_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    uploaded: dict[str, bytes] = {}

    def create(self: HfApi, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload(self: HfApi, *, folder_path: Path, **kwargs: Any) -> str:
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = small()
    assert model.push_to_hub("someone/sknet") == "done"
    model.save_pretrained(tmp_path)
    assert uploaded == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert b"sknet-triton" in uploaded["README.md"]
