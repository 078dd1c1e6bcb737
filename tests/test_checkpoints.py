"""Checkpoints of other implementations: their keys, the numbers, and what a refusal says."""

import argparse
import copy
import hashlib
import itertools
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sknet_triton import SKNet, SKNetFeatures, SKUnit, StageSpec, sknet26, sknet50, sknet101
from sknet_triton.checkpoints import (
    CheckpointMismatchError,
    convert_state_dict,
    fold_fc2_bias,
    load_checkpoint,
    read_checkpoint,
)
from sknet_triton.checkpoints.layouts import LAYOUTS, LayoutName
from tests.helpers import EXACT_NETWORK, assert_same, message_of, outcome, unchanged
from tests.peer_networks import PEERS, UNITS, Sizes, published
from tests.plain_sknet import largest_error, scramble

SMALL = (StageSpec(32, 1, 1), StageSpec(64, 2))
# The layouts whose network is an SKNet without further ado.
SAME = ("timm", "ports", "pytorchcv")
WITH_HEADS = ("developer0hye", "syt2")


def small(**kwargs: Any) -> SKNet:
    return SKNet(SMALL, **{"num_classes": 5, **kwargs})


def peer(name: str, sizes: Sizes | None = None) -> nn.Module:
    return scramble(PEERS[name](sizes or Sizes())).double()


assert_bitwise = partial(assert_same, bound=0)


def assert_same_network(model: nn.Module, other: nn.Module) -> None:
    """Compares outputs and the gradient of the image, in eval and then in training."""
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        ours, theirs = (outcome(m.train(training), m, x) for m in (model, other))
        for name in ("out", "dx"):
            assert largest_error(ours[name], theirs[name]) < EXACT_NETWORK


# The keys

# SHA-256 of the lines "key shape", sorted, of the implementations' own state dicts.
DIGESTS = {
    ("timm", 50): "5cd80a34dad074b850111079fd56d010208aa83ef5571a2e22d31fbf425408e1",
    ("ports", 50): "2bf5623d0472b51636d160f370ed358dd482cacd7106359756acdb0ca39ab478",
    ("ports", 101): "15fb75f49724a11651b5caf0bbf8d6529df211a6aa155a1ea8b7948dbdaf360c",
    ("pytorchcv", 50): "84089d614e80a6fd775728199ca3f2f089db48f5a3cc6a5a93802ac37e1231bf",
    ("pytorchcv", 101): "264253792c3da60aa4ca013d21a2e82eb4e58277c6182ac3b1897e538bc545f7",
    ("developer0hye", 26): "f7faaca3655ad2509a44d665916a3ed9a0a6748890524b3fe145927cbe336d2f",
    ("developer0hye", 50): "3c70c37d169aa123a706e5ae09bb67582a64ba4ecc39808d343940d7ee64041c",
    ("developer0hye", 101): "ca6b5dd5ec24c42bf4e7d2943155b80f921e3109217ae4a25281053d9c069fa9",
    ("syt2", 50): "0c4c43b04cee59a6509589a444d1eb8def9507d2c3de2655ba7a9993c082c249",
    ("syt2", 101): "d371720046cbceabc538e2fe201974dda50e4ae9137f976266622b025bc1b250",
    ("pytorchinsight", 50): "5d94ae112bca3bf8d72ea92b06e569f5b7f0e191b79a4dc47cdc58c4a0300720",
    ("pytorchinsight", 101): "8dce1648f3ef868a66beba24bda60e3e1c827600f619d2b5914ca44cde989acd",
}
# segmentation_models_pytorch's encoder of timm's network.
SMP_DIGEST = "0551c762dff07f08525415c162272ca7181828ec3f4e34f19b096c0fdba0a482"


def digest(tensors: Mapping[str, Tensor]) -> str:
    lines = sorted(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shapes_of(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Returns a state dict of zeros that takes no memory: one number, expanded."""
    with torch.device("meta"):
        state = build(*args, **kwargs).state_dict()
    return {k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in state.items()}


def full(name: str, depth: int, **changes: Any) -> dict[str, Tensor]:
    sizes = published(depth, **changes)
    if name == "pytorchinsight":
        sizes = Sizes(UNITS[depth], (64, 128, 256, 512), 1000)
    return shapes_of(PEERS[name], sizes)


def smp_encoder() -> dict[str, Tensor]:
    """segmentation_models_pytorch's timm-skresnext50_32x4d: split inputs, narrow fc1, no head."""
    state = shapes_of(PEERS["timm"], published(50, least=1, split_input=True))
    return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}


@pytest.mark.parametrize(("name", "depth"), DIGESTS, ids=lambda v: str(v))
def test_the_rebuilt_networks_have_the_keys_and_shapes_of_the_real_ones(
    name: str, depth: int
) -> None:
    assert digest(full(name, depth)) == DIGESTS[name, depth]
    assert digest(smp_encoder()) == SMP_DIGEST


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "depth"), [key for key in DIGESTS if key[0] != "pytorchinsight"], ids=lambda v: str(v)
)
def test_every_published_size_has_the_keys_and_shapes_of_ours(name: str, depth: int) -> None:
    entries: dict[int, Callable[..., nn.Module]] = {26: sknet26, 50: sknet50, 101: sknet101}
    converted = convert_state_dict(full(name, depth))
    assert digest(converted) == digest(shapes_of(entries[depth]))


# The numbers


@pytest.mark.parametrize("name", [*SAME, *WITH_HEADS])
def test_a_converted_network_computes_what_the_original_does(name: LayoutName) -> None:
    original, model = peer(name), small(dtype=torch.float64)
    for key, tensor in original.state_dict().items():
        if ".fcs." in key and key.endswith("bias"):
            tensor.zero_()
    assert not load_checkpoint(model, original.state_dict())
    assert_same_network(model, original)
    moved = convert_state_dict(original.state_dict())
    # In training both moved the running statistics, from the same to the same.
    state = model.state_dict()
    assert_same(state, {key: moved[key] for key in state}, EXACT_NETWORK)
    # Gradients convert like parameters.
    grads = {k: cast(Tensor, p.grad) for k, p in original.named_parameters()}
    ours = {k: cast(Tensor, p.grad) for k, p in model.named_parameters()}
    moved = convert_state_dict(grads, name)
    assert_same(ours, {key: moved[key] for key in ours}, EXACT_NETWORK)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_biased_heads_are_refused_and_folded_they_compute_the_same(name: str) -> None:
    original, model = peer(name), small(dtype=torch.float64)
    with pytest.raises(CheckpointMismatchError, match="fold_fc2_bias") as refusal:
        load_checkpoint(model, original.state_dict())
    assert refusal.value.diff.keys("unexpected") == [
        f"stages.{unit}.sk.fc2.bias" for unit in ("0.0", "1.0", "1.1")
    ]
    wide = SKNet(
        (StageSpec(32, 1, 1, d=33), StageSpec(64, 2, d=33)), num_classes=5, dtype=torch.float64
    )
    converted = convert_state_dict(original.state_dict())
    assert not load_checkpoint(wide, fold_fc2_bias(converted))
    assert any(key.endswith("fc2.bias") for key in converted), "the argument is not changed"
    assert_same_network(wide, original)
    # The new channel stays constant in training: of all that makes it, only its bias is moved.
    fc1 = wide.get_submodule("stages.1.0.sk.fc1")
    for name, moves in (("conv.weight", False), ("bn.weight", False), ("bn.bias", True)):
        assert bool(cast(Tensor, fc1.get_parameter(name).grad)[-1].any()) is moves


def test_one_biased_unit_widens_all_of_them_and_none_none() -> None:
    state = dict(small().state_dict())
    assert_bitwise(fold_fc2_bias(state), state)
    state["stages.1.0.sk.fc2.bias"] = torch.ones(128)
    folded = fold_fc2_bias(state)
    for unit in ("0.0", "1.0", "1.1"):
        column = folded[f"stages.{unit}.sk.fc2.weight"][:, 32]
        assert torch.equal(column.flatten(), torch.full_like(column.flatten(), unit == "1.0"))


@pytest.mark.parametrize(
    ("fc_norm", "length", "message"),
    [
        ("layer", 64, r"^stages\.0\.0\.sk\.fc1\.bn\.weight: expected"),
        ("batch", 63, r"fc2\.bias: expected 64 values, got 63"),
    ],
)
def test_a_bias_that_has_no_place_is_not_folded(fc_norm: str, length: int, message: str) -> None:
    state = dict(small(unit_options={"fc_norm": fc_norm}).state_dict())
    state["stages.0.0.sk.fc2.bias"] = torch.ones(length)
    with pytest.raises(ValueError, match=message):
        fold_fc2_bias(state)


def test_units_of_pytorchinsight_fit_an_skunit_with_its_branches() -> None:
    sizes = Sizes((1, 1), (64, 128))
    network = peer("pytorchinsight", sizes).eval()
    original = network.get_submodule("layer2.0")
    unit = SKUnit(
        256, 128, 512, 2, branches=[(3, 1, 1), (3, 1, 32)], d=8, dtype=torch.float64
    ).eval()
    converted = convert_state_dict(network.state_dict())
    prefix = "stages.1.0."
    unit.load_state_dict(
        {k.removeprefix(prefix): v for k, v in converted.items() if k.startswith(prefix)}
    )
    x = torch.randn(2, 256, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert largest_error(unit(x), original(x)) < EXACT_NETWORK


# There and back


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((a, b) for a in (*SAME, "sknet_triton") for b in LAYOUTS if b != "pytorchinsight"),
        *((a, b) for a in WITH_HEADS for b in ("sknet_triton", *WITH_HEADS)),
        ("pytorchinsight", "sknet_triton"),
    ],
)
def test_there_and_back_gives_the_same_tensors(name: LayoutName, target: LayoutName) -> None:
    model = scramble(small()) if name == "sknet_triton" else peer(name)
    state = model.state_dict()
    there = convert_state_dict(state, name, target=target)
    if name in (*SAME, "sknet_triton"):
        expected = small() if target == "sknet_triton" else PEERS[target](Sizes())
        assert digest(there) == digest(expected.state_dict())
    assert_bitwise(convert_state_dict(there, target, target=name), state)


def test_converting_copies_and_changes_nothing() -> None:
    state = peer("timm").state_dict()
    before = dict(state)
    assert {*map(id, convert_state_dict(state).values())} == {*map(id, before.values())}
    assert state.keys() == before.keys()


def test_three_branches_are_joined_and_split_in_order_and_can_be_saved(tmp_path: Path) -> None:
    state = small(unit_options={"M": 3}).state_dict()
    heads = convert_state_dict(state, target="syt2")
    whole = state["stages.0.0.sk.fc2.weight"]
    for i in range(3):
        assert torch.equal(heads[f"stage_1.0.conv2.fcs.{i}.weight"], whole[32 * i : 32 * i + 32])
    assert_bitwise(convert_state_dict(heads), state)
    assert_bitwise(read_checkpoint(saved(heads, tmp_path / "heads.safetensors")), heads)


def without(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if part not in key}


def test_what_cannot_be_converted_is_refused() -> None:
    ours, timm, syt2 = small().state_dict(), peer("timm").state_dict(), peer("syt2").state_dict()

    def refused(message: str, state: Mapping[str, Tensor], **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            convert_state_dict(state, **arguments)

    # Heads that do not fit their unit.
    one_head = r"^stages\.0\.0\.sk\.fc2\.weight: expected one head a"
    refused(one_head, without(syt2, ".fcs.0."))
    scalars = {key: torch.tensor(1.0) if ".fcs." in key else tensor for key, tensor in syt2.items()}
    refused(r"got \{0: \[\], 1: \[\]\}", scalars)
    odd = {**ours, "stages.0.0.sk.fc2.weight": torch.zeros(65, 32, 1, 1)}
    refused(r"^stages\.0\.0\.sk\.fc2: expected as many rows", odd, target="syt2")
    # What the target cannot hold.
    biased = r"'timm' has no place for 3 of the keys, .*stages\.0\.0\.sk\.fc2\.bias"
    refused(biased, syt2, target="timm")
    layer = small(unit_options={"fc_norm": "layer"}).state_dict()
    refused(r"no place for 6 of the keys.*fc1\.norm\.weight", layer, target="ports")
    three = small(unit_options={"M": 3}).state_dict()
    refused(r"no place for .*branches\.2\.conv\.weight", three, target="pytorchinsight")
    # Layouts and networks.
    refused("^source: expected one of 'sknet_triton', .*'tim'", ours, source="tim")
    refused("^target: expected one of 'sknet_triton', .*'tim'", ours, target="tim")
    two = {f"{name}.{key}": tensor for name in "ab" for key, tensor in timm.items()}
    refused(r"got 2: timm under 'a\.', timm under 'b\.'", two)
    disguised = {f"encoder.{key}": tensor for key, tensor in timm.items()} | {
        "head.weight": torch.zeros(5, 128)
    }
    refused(r"'head\.weight' is unknown to the layout 'timm'", disguised)


# Detection


def test_every_layout_is_told_by_its_mark_and_no_other() -> None:
    for name, layout in LAYOUTS.items():
        model = small() if name == "sknet_triton" else PEERS[name](Sizes())
        marks = [other for other in LAYOUTS if LAYOUTS[other].mark in model.state_dict()]
        assert marks == [name] == [layout.name]


def test_what_was_looked_for_is_said() -> None:
    other = nn.Linear(2, 3).state_dict()
    said = message_of(ValueError, lambda: convert_state_dict(other))
    assert "no layout of an SKNet found" in said
    assert "in 2 keys: weight, bias" in said
    assert all(f"{layout.name}: {layout.mark}" in said for layout in LAYOUTS.values())
    # A named source is not guessed.
    said = message_of(ValueError, lambda: convert_state_dict(peer("timm").state_dict(), "ports"))
    assert "source='ports'" in said
    assert [name for name in LAYOUTS if LAYOUTS[name].mark in said] == ["ports"]


@pytest.mark.parametrize(
    "prefix", ["module.", "module._orig_mod.", "_forward_module.model.module.", "encoder."]
)
@pytest.mark.parametrize("name", PEERS)
def test_prefixes_are_taken_off(prefix: str, name: str) -> None:
    state = PEERS[name](Sizes()).state_dict()
    wrapped = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    assert_bitwise(convert_state_dict(wrapped), convert_state_dict(state))


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_are_taken_off_anywhere(wrapper: str) -> None:
    state = peer("timm").state_dict()
    inside = {key.replace(".conv1.", f".{wrapper}.conv1."): v for key, v in state.items()}
    outside = {f"{wrapper}.net.{wrapper}.{key}": v for key, v in inside.items()}
    assert len(outside.keys() - state.keys()) == len(state)
    assert_bitwise(convert_state_dict(outside), convert_state_dict(state))


def with_a_compiled_part(model: nn.Module) -> nn.Module:
    model.add_module("layer1", cast(nn.Module, torch.compile(model.get_submodule("layer1"))))
    return model


class Training(nn.Module):
    """A network and its average in a module of a training framework."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.average = AveragedModel(model)
        self.register_buffer("step", torch.tensor(7))


@pytest.mark.parametrize("wrap", [AveragedModel, Training, with_a_compiled_part])
def test_counters_beside_the_network_are_left_out(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = peer("ports").float()
    wrapped = wrap(model).state_dict()
    assert not load_checkpoint(small(), wrapped)
    assert not load_checkpoint(small(), {"ema": {"weights": wrapped, "decay": 0.99}, "step": 3})


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "model_ema", "module", "generator"]
)
def test_checkpoints_of_training_scripts_are_opened(key: str) -> None:
    state = peer("timm").state_dict()
    checkpoint = {key: state, "epoch": 3, "best": torch.tensor(0.7), "optimizer": {"lr": 0.1}}
    assert_bitwise(convert_state_dict(checkpoint), convert_state_dict(state))
    assert_bitwise(convert_state_dict({"model": checkpoint}), convert_state_dict(state))


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ([1], TypeError, "expected a mapping, got list"),
        (nn.Linear(1, 1), TypeError, "expected a mapping, got Linear"),
        ({"state_dict": {}, "model_ema": {}}, ValueError, "got 2, under"),
        ({"weights": {}}, ValueError, "got dict under 'weights'"),
        ({1: torch.ones(1)}, TypeError, "expected strings as keys, got 1"),
        ({"a": torch.ones(2, device="meta")}, ValueError, "dense tensors, got .* on meta"),
        ({"a": torch.eye(2).to_sparse()}, ValueError, "dense tensors, got .*sparse"),
        ({"a": torch.ones(1), "_orig_mod.a": torch.ones(1)}, ValueError, "two keys stand for 'a'"),
    ],
    ids=["list", "module", "two", "other", "number", "meta", "sparse", "double"],
)
def test_what_holds_no_tensors_is_refused(
    checkpoint: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert_state_dict(checkpoint)


# The last three have numbers that are not the source's.
@pytest.mark.parametrize(
    "key",
    [
        *("layer1.0.se.weight", "layer01.0.conv1.conv.weight"),
        *("layer0.0.conv1.conv.weight", "layer1.00.conv3.bn.bias"),
    ],
)
def test_unknown_keys_stay_and_are_named(key: str) -> None:
    state = peer("timm").state_dict() | {key: torch.ones(1)}
    assert key in convert_state_dict(state)
    with pytest.raises(CheckpointMismatchError, match=rf"1 unexpected\n.*{re.escape(key)}"):
        load_checkpoint(small(), state)


# Loading


def test_another_head_is_named_and_all_the_rest_can_be_loaded() -> None:
    model, state = small(num_classes=3), peer("timm").float().state_dict()
    before = copy.deepcopy(model.state_dict())
    with unchanged(model), pytest.raises(CheckpointMismatchError) as refusal:
        load_checkpoint(model, state)
    assert str(refusal.value).splitlines()[:4] == [
        "the checkpoint does not fit the model: 2 different",
        "different   head.weight: float32 [5, 128], the model has float32 [3, 128]",
        "different   head.bias: float32 [5], the model has float32 [3]",
        "only the head differs: num_classes is 5 in the checkpoint and 3 in the model; "
        "strict=False loads all the rest",
    ]
    copied = pickle.loads(pickle.dumps(refusal.value))
    assert (str(copied), copied.diff) == (str(refusal.value), refusal.value.diff)
    diff = load_checkpoint(model, state, strict=False)
    assert diff.keys("different") == ["head.weight", "head.bias"]
    assert len(diff) == 2
    expected = convert_state_dict(state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key] if key.startswith("head.") else expected[key])


@pytest.mark.parametrize(("ours", "theirs"), [(0, 5), (5, 0)])
def test_a_head_on_one_side_only_is_named(ours: int, theirs: int) -> None:
    state = {k: v for k, v in peer("timm").state_dict().items() if theirs or k[:3] != "fc."}
    with pytest.raises(ValueError, match=f"num_classes is {theirs} in the .* and {ours} in the"):
        load_checkpoint(small(num_classes=ours), state)


def test_a_backbone_takes_a_checkpoint_without_its_head() -> None:
    backbone, original = SKNetFeatures(SMALL, dtype=torch.float64).eval(), peer("timm").eval()
    assert not load_checkpoint(backbone, without(original.state_dict(), "fc."))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        logits = cast(nn.Linear, original.get_submodule("fc"))(backbone(x)[-1].mean((2, 3)))
        assert largest_error(logits, original(x)) < EXACT_NETWORK


def test_the_list_of_differences_is_capped_and_complete_in_the_exception() -> None:
    with pytest.raises(CheckpointMismatchError) as refusal:
        load_checkpoint(small(), full("timm", 50))
    lines = str(refusal.value).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == f"... and {len(refusal.value.diff) - 20} more"
    found = convert_state_dict(full("timm", 50))
    ours = small().state_dict()
    assert set(refusal.value.diff.keys("unexpected")) == found.keys() - ours.keys()
    assert {row.key for row in refusal.value.diff if row.kind == "different"} == {
        key for key in ours if found[key].shape != ours[key].shape
    }


def test_missing_keys_are_named_but_for_counts_of_batches() -> None:
    state = peer("ports").state_dict()
    old = without(state, "num_batches_tracked")
    assert len(old) < len(state)
    assert not load_checkpoint(small(), old)
    del state["layer1.0.conv2.fc1.0.weight"], state["layer1.0.conv2.fc1.1.running_mean"]
    with pytest.raises(CheckpointMismatchError) as refusal:
        load_checkpoint(small(), state)
    assert refusal.value.diff.keys("missing") == [
        "stages.0.0.sk.fc1.conv.weight",
        "stages.0.0.sk.fc1.bn.running_mean",
    ]


def test_integers_do_not_load_as_weights_and_the_models_dtype_is_kept() -> None:
    state, model = peer("timm").state_dict(), small(dtype=torch.bfloat16)
    assert not load_checkpoint(model, state)
    assert {t.dtype for t in model.parameters()} == {torch.bfloat16}
    state["fc.weight"] = state["fc.weight"].to(torch.int8)
    with pytest.raises(CheckpointMismatchError, match=r"int8 \[5, 128\], the model has bfloat16"):
        load_checkpoint(model, state)


@pytest.mark.parametrize("name", ["timm", "syt2"])
def test_no_shape_leads_to_another_error_than_a_refusal(name: str) -> None:
    state = peer(name).float().state_dict()
    model = small()
    shapes = ((), (0,), (2, 3), (1, 0, 1, 1))
    for key, shape in itertools.product(state, shapes):
        # Heads are joined, or not, before there is anything to compare.
        error = ValueError if ".fcs." in key else CheckpointMismatchError
        odd = torch.zeros((1, *shape) if "tracked" in key else shape)
        with unchanged(model), pytest.raises(error):
            load_checkpoint(model, {**state, key: odd})


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(1, 1), ValueError, "expected an SKNet or a module with its names, got Linear"),
        (nn.Sequential(small()), ValueError, r"such as ddp\.module"),
        (small(device="meta"), ValueError, "got the meta device"),
        ("sknet50", TypeError, "got str"),
    ],
    ids=["other", "wrapped", "meta", "text"],
)
def test_a_model_that_cannot_be_loaded_is_refused(
    model: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^model: .*{message}"):
        load_checkpoint(model, peer("timm").state_dict())


# segmentation_models_pytorch


def test_an_encoder_loads_with_timms_shapes_and_with_its_own_all_74_are_named() -> None:
    fitting = without(full("timm", 50), "fc.")
    assert not load_checkpoint(
        sknet50(num_classes=0), {f"encoder.{key}": tensor for key, tensor in fitting.items()}
    )
    state = {f"encoder.{key}": tensor for key, tensor in smp_encoder().items()}
    state["decoder.blocks.0.conv.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointMismatchError) as refusal:
        load_checkpoint(sknet50(num_classes=0), state)
    diff = refusal.value.diff
    assert len(diff.keys("different")) == 74
    assert diff.keys("unexpected") == ["decoder.blocks.0.conv.weight"]
    assert diff.keys("missing") == []
    assert {key.split(".")[4] for key in diff.keys("different")} == {"branches", "fc1", "fc2"}


# Files


def saved(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file(dict(state), path)
    elif path.suffix == ".old":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, path)
    return path


FILES = ("weights.safetensors", "weights.pth", "weights.old")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("renamed", [None, "weights.bin", "weights", "weights.pth.safetensors"])
def test_files_are_told_by_their_content(tmp_path: Path, name: str, renamed: str | None) -> None:
    state = peer("timm").float().state_dict()
    path = saved(state, tmp_path / name)
    if renamed is not None:
        path = path.rename(tmp_path / renamed)
    for given in (path, str(path)):
        model = small()
        assert not load_checkpoint(model, given)
        assert_bitwise(model.state_dict(), convert_state_dict(state))


class Touching:
    """Opens a file for writing when it is unpickled by a trusting reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["evil.pth", "evil.old", "evil.pkl"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    touched, path = tmp_path / "touched", tmp_path / name
    checkpoint = {"state_dict": peer("timm").state_dict(), "extra": Touching(touched)}
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(checkpoint, protocol=2))
    else:
        saved(checkpoint, path)
    model = small()
    with unchanged(model), pytest.raises(ValueError, match="only tensors are loaded") as refusal:
        load_checkpoint(model, path)
    assert str(path) in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert "weights_only" not in str(refusal.value)
    assert not touched.exists()
    if path.suffix == ".pth":
        torch.load(path, weights_only=False)["extra"].close()
        assert touched.exists(), "the pickle does what it says"


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, name: str) -> None:
    path = saved({"a": torch.arange(7.0), "b": torch.ones(2, 3)}, tmp_path / name)
    whole = path.read_bytes()
    assert read_checkpoint(path)["a"][3] == 3
    for size in range(0, len(whole), 1 + len(whole) // 250):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "got an empty one"), (b"GIF89a....", "begins with b'GIF89a"), (b"\x00" * 9, "begins")],
    ids=["empty", "gif", "zeros"],
)
def test_another_kind_of_file_is_refused_by_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))}: expected a safetensors file .*{message}"
    ):
        load_checkpoint(small(), path)


def test_a_folder_a_missing_file_and_what_a_pickle_asks_for_are_named(tmp_path: Path) -> None:
    path = saved({"args": argparse.Namespace(lr=0.1), "model": {}}, tmp_path / "trained.pth")
    with pytest.raises(ValueError, match=r"trained\.pth: the pickle asks for argparse\.Namespace"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        read_checkpoint(tmp_path / "gone.pth")


def test_without_safetensors_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'sknet-triton\[hub\]'"):
        read_checkpoint(path)
