"""Parameter packs: the bytes burn_p2p's Python runtime writes, read and written; and one line for each mistake."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparktrain.errors import ConfigError, ModelError
from sparktrain.train import parameter_pack as packs
from sparktrain.train.parameter_pack import ALL, StateDictFilter, layout

# What the reference runtime (0.21.0-pre.84) wrote of `golden()`.
ALL_HASH = "torch-layout-da4b025c3a404b34f984365dbb507df1a20fdd9947ae5521a158fb9b34c70dca"
ALL_VALUES = (
    "000080bf000060bf000040bf000000000000003e0000803e0000c03e0000003f0000203f0000803f0000903f0000a03f00004040"
    "00004840000050400000804000008440000088400000a0400000a4400000a8400000c0400000e0400000e4400000e840"
)
ALL_MANIFEST = """{
  "format": "burn-p2p-python-flattened-parameter-pack-v1",
  "model_schema_hash": "schema-a",
  "layout_hash": "torch-layout-da4b025c3a404b34f984365dbb507df1a20fdd9947ae5521a158fb9b34c70dca",
  "parameter_count": 25,
  "values_f32_le": "values.f32le",
  "state_dict_filter": {
    "include_globs": [],
    "exclude_globs": []
  },
  "included_keys": [
    "0.bias",
    "0.weight",
    "1.bias",
    "1.running_mean",
    "1.running_var",
    "1.weight",
    "2.bias",
    "2.weight"
  ],
  "excluded_float_keys": [],
  "ignored_non_float_keys": [
    "1.num_batches_tracked"
  ]
}"""
WEIGHTS_HASH = "torch-layout-c9f9d4426dc9467dd1bbe436cd64885d7ef9671aaaa5078d5333a4a40a47bf6e"
WEIGHTS_VALUES = "000000000000003e0000803e0000c03e0000003f0000203f0000e0400000e4400000e840"
WEIGHTS = StateDictFilter(("*.weight",), ("1.*",))


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))


def golden() -> torch.nn.Module:
    """Each float entry holds arange/8 - 1 + its index among the sorted keys."""
    net = model()
    state = net.state_dict()
    for i, key in enumerate(sorted(state)):
        if state[key].is_floating_point():
            state[key].copy_(torch.arange(state[key].numel()).reshape(state[key].shape) / 8 - 1 + i)
    return net


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def test_a_pack_is_the_references_to_the_byte(tmp_path: Path) -> None:
    packs.write(tmp_path / "pack", golden(), "schema-a")
    assert (tmp_path / "pack" / "values.f32le").read_bytes().hex() == ALL_VALUES
    assert (tmp_path / "pack" / "manifest.json").read_text() == ALL_MANIFEST
    assert sorted(p.name for p in (tmp_path / "pack").iterdir()) == ["manifest.json", "values.f32le"]


def test_a_filtered_pack_is_the_references(tmp_path: Path) -> None:
    made = packs.write(tmp_path, golden(), "schema-a", WEIGHTS)
    assert (tmp_path / "values.f32le").read_bytes().hex() == WEIGHTS_VALUES
    assert (made.layout_hash, made.parameter_count) == (WEIGHTS_HASH, 9)
    assert made.included_keys == ("0.weight", "2.weight")
    assert made.excluded_float_keys == ("0.bias", "1.bias", "1.running_mean", "1.running_var", "1.weight", "2.bias")
    assert made.ignored_non_float_keys == ("1.num_batches_tracked",)
    assert json.loads((tmp_path / "manifest.json").read_text())["state_dict_filter"] == {
        "include_globs": ["*.weight"],
        "exclude_globs": ["1.*"],
    }


def test_the_references_pack_is_read_and_the_rest_of_the_model_kept(tmp_path: Path) -> None:
    (tmp_path / "values.f32le").write_bytes(bytes.fromhex(WEIGHTS_VALUES))
    # The five keys that the reference's Rust side writes.
    (tmp_path / "manifest.json").write_text(
        f'{{"format": "{packs.FORMAT}", "model_schema_hash": "schema-a", "layout_hash": "{WEIGHTS_HASH}", '
        '"parameter_count": 9, "values_f32_le": "values.f32le"}'
    )
    net, before = model(), {k: v.clone() for k, v in model().state_dict().items()}
    assert packs.load(tmp_path, net, WEIGHTS).model_schema_hash == "schema-a"
    for key, value in net.state_dict().items():
        expected = golden().state_dict()[key] if key in ("0.weight", "2.weight") else before[key]
        assert torch.equal(value, expected), key


def test_values_that_no_number_equals_survive(tmp_path: Path) -> None:
    odd = torch.tensor([0.1, -0.0, math.nan, math.inf, -math.inf, 1e-45, 3.4e38])
    packs.write(tmp_path, {"w": odd}, "s")
    assert packs.read(tmp_path).values.tobytes() == odd.numpy().tobytes()


def test_modules_come_by_name_then_by_key_as_plain_strings(tmp_path: Path) -> None:
    # '-' sorts before '.', so sorting full keys would put a-b first.
    state = {"modules": {"a-b": model(), "a": model()}}
    keys = packs.write(tmp_path, state, "s").included_keys
    assert keys[0].startswith("a.")
    assert keys[-1].startswith("a-b.")
    ten = {f"{i}.w": torch.tensor([float(i)]) for i in range(11)}
    packs.write(tmp_path, ten, "s")
    assert packs.read(tmp_path).values.tolist() == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_module_is_the_same_pack_however_it_is_given() -> None:
    net = golden()
    assert {layout(s).layout_hash for s in (net, {"model": net, "step": 3}, net.state_dict())} == {ALL_HASH}
    assert layout(model().to("meta")).layout_hash == ALL_HASH
    assert layout(golden().to(torch.bfloat16)).layout_hash != ALL_HASH


def test_half_precision_is_written_as_float32_and_read_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net, other = model().to(torch.bfloat16), model().to(torch.bfloat16)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    packs.write(tmp_path, net, "s")
    packs.load(tmp_path, other)
    assert equal(net, other)


def test_a_tensor_that_is_a_transposed_view_is_written_row_by_row(tmp_path: Path) -> None:
    packs.write(tmp_path, {"w": torch.arange(6.0).view(2, 3).T}, "s")
    assert packs.read(tmp_path).values.tolist() == [0, 3, 1, 4, 2, 5]


def test_tied_weights_are_there_once_per_name_and_may_not_differ(tmp_path: Path) -> None:
    net = Tied()
    assert packs.write(tmp_path, net, "s").parameter_count == 2 * 20
    other = Tied()
    packs.load(tmp_path, other)
    assert torch.equal(other.head.weight, net.embed.weight)
    assert other.head.weight is other.embed.weight
    values = np.fromfile(tmp_path / "values.f32le", "<f4")
    values[-1] += 1
    values.tofile(tmp_path / "values.f32le")
    with pytest.raises(ModelError, match="different values for embed.weight and head.weight, which the model ties"):
        packs.load(tmp_path, other)
    assert torch.equal(other.embed.weight, net.embed.weight)


def test_globs_are_case_sensitive_and_exclude_wins() -> None:
    chosen = StateDictFilter(("*.weight", "[01].bias"), ("0.*",))
    assert [k for k in ("0.weight", "1.bias", "1.Weight", "2.weight", "2.bias") if chosen.selects(k)] == [
        "1.bias",
        "2.weight",
    ]
    assert ALL.selects("anything")


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        ({"include_globs": [" "]}, "state_dict_filter.include_globs contains an empty pattern"),
        ({"exclude_globs": ["a", ""]}, "state_dict_filter.exclude_globs contains an empty pattern"),
        ({"exclude_globs": ["a\0"]}, "state_dict_filter.exclude_globs pattern .* contains a NUL byte"),
        ({"include_globs": "*.weight"}, "include_globs is the string '[*].weight': give a list"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(globs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StateDictFilter(**globs)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"modules": {"a.b": torch.nn.Linear(1, 1)}}, "module names must not contain '.', found 'a.b'"),
        ({"modules": {"": torch.nn.Linear(1, 1)}}, "module names must not be empty"),
        ({"modules": {}}, "{'modules': ...} must contain a non-empty module mapping"),
        ({"modules": 3}, "{'modules': ...} must contain a non-empty module mapping"),
        (3, "requires a torch model, .*, found int"),
        ({"model": 3}, "requires a torch model, .*, found int"),
        (torch.nn.ReLU(), "selected zero floating-point parameters of 0"),
        ({"ids": torch.arange(3)}, "selected zero floating-point parameters of 0"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises((ModelError, ConfigError), match=message):
        packs.write(tmp_path / "pack", state, "s")
    assert not (tmp_path / "pack").exists()


def test_a_filter_that_selects_nothing_names_what_there_was() -> None:
    with pytest.raises(ConfigError, match="zero floating-point parameters of 8: its include_globs .*'decoder.*0.bias"):
        layout(model(), StateDictFilter(("decoder.*",)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": "v2"}, "has parameter-pack format 'v2': this sparktrain reads 'burn-p2p"),
        ({"parameter_count": 24}, "byte length 100 of .* does not match parameter count 24: expected 96 bytes"),
        ({"parameter_count": "25"}, "has parameter_count '25': expected a whole number"),
        ({"layout_hash": None}, "has layout_hash None: expected a string"),
        ({"values_f32_le": "../values.f32le"}, "names values '../values.f32le': expected a file beside it"),
        ({"values_f32_le": "other"}, "has no other: it was not copied whole"),
        ({"layout_hash": "torch-layout-0"}, "layout torch-layout-0 .* does not match model layout torch-layout-da4b"),
    ],
)
def test_a_damaged_pack_is_refused_and_loads_nothing(tmp_path: Path, damage: dict[str, Any], message: str) -> None:
    packs.write(tmp_path, golden(), "s")
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    net = model()
    with pytest.raises(ModelError, match=message) as caught:
        packs.load(tmp_path, net)
    assert "\n" not in str(caught.value)
    assert equal(net, model())


def test_half_a_pack_is_none(tmp_path: Path) -> None:
    packs.write(tmp_path, golden(), "s")
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text[:50])
    with pytest.raises(ModelError, match="manifest.json is not valid JSON"):
        packs.read(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ModelError, match="format"):
        packs.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ModelError, match="is no parameter pack: it has no manifest.json, which is written last"):
        packs.read(tmp_path)


def test_writing_that_fails_midway_leaves_the_pack_that_was_there_and_nothing_else(tmp_path: Path) -> None:
    packs.write(tmp_path, golden(), "s")
    with pytest.raises(NotImplementedError):
        packs.write(tmp_path, model().to("meta"), "s")  # it has a layout, but no values
    net = model()
    packs.load(tmp_path, net)
    assert equal(net, golden())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("other", "filter", "message"),
    [
        (torch.nn.Linear(2, 3), ALL, "the pack alone has 0.bias and the model alone has bias"),
        (model(), StateDictFilter((), ("2.*",)), "the pack alone has 2.bias"),
        (model().to(torch.bfloat16), ALL, "the names are the same, so a shape or a dtype differs"),
    ],
)
def test_a_pack_of_another_model_names_the_difference(
    tmp_path: Path, other: torch.nn.Module, filter: StateDictFilter, message: str
) -> None:
    packs.write(tmp_path, golden(), "s")
    with pytest.raises(ModelError, match=message):
        packs.load(tmp_path, other, filter)
