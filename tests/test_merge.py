"""Merging: each policy does what its name says, on models of any size, and says why a candidate was left out."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparktrain.errors import ConfigError, ModelError
from sparktrain.train import parameter_pack as packs
from sparktrain.train.merge import Merge, merge, policies
from tests.conftest import ROOT

Job = Callable[..., tuple[int, str, str]]
POLICIES = ["weighted-mean", "norm-clipped-weighted-mean", "trimmed-mean", "coordinate-median"]


# -- policies, as functions -----------------------------------------------------------------------------------------


def matrix(draw: Any, count: int, width: int) -> Tensor:
    number = st.floats(-1e3, 1e3, width=32)
    return torch.tensor(
        draw(st.lists(number, min_size=count * width, max_size=count * width)), dtype=torch.float64
    ).view(count, width)


@st.composite
def candidates(draw: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values [N, K], base [K] and weights [N] of 1 to 7 candidates."""
    count, width = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    weights = draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    return matrix(draw, count, width), matrix(draw, 1, width)[0], torch.tensor(weights, dtype=torch.float64)


def apply(policy: str, values: Tensor, base: Tensor, weights: Tensor) -> Tensor:
    if policy == "weighted-mean":
        return policies.weighted_mean(values, weights)
    if policy == "norm-clipped-weighted-mean":
        norms = (values - base).norm(dim=1)
        scales = policies.clip_scales(norms, float(policies.coordinate_median(norms)))
        return policies.clipped_mean(values, base, weights, scales)
    return policies.trimmed_mean(values, 0.34) if policy == "trimmed-mean" else policies.coordinate_median(values)


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@given(given=candidates(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_order_of_candidates_does_not_matter(policy: str, given: Any, data: Any) -> None:
    values, base, weights = given
    order = data.draw(st.permutations(range(len(values))))
    assert close(apply(policy, values, base, weights), apply(policy, values[order], base, weights[order]))


@pytest.mark.parametrize("policy", POLICIES)
@given(given=candidates())
@settings(max_examples=40, deadline=None)
def test_equal_models_merge_to_themselves_to_the_bit_of_float32(policy: str, given: Any) -> None:
    values, base, weights = given
    same = values[:1].expand_as(values)
    merged = apply(policy, same, base, weights)
    if policy == "norm-clipped-weighted-mean":  # it goes by the base and back
        assert close(merged, values[0])
    else:
        assert torch.equal(merged.float(), values[0].float())


@pytest.mark.parametrize("policy", POLICIES)
@given(given=candidates())
@settings(max_examples=40, deadline=None)
def test_no_coordinate_leaves_the_candidates_range(policy: str, given: Any) -> None:
    values, base, weights = given
    # A clipped candidate lies between base and itself, so there the base counts as one.
    around = torch.cat([values, base[None]]) if policy == "norm-clipped-weighted-mean" else values
    merged = apply(policy, values, base, weights)
    assert (merged >= around.min(dim=0).values - 1e-9).all()
    assert (merged <= around.max(dim=0).values + 1e-9).all()


@pytest.mark.parametrize("policy", POLICIES[:2])
@given(given=candidates(), scale=st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_only_the_ratio_of_weights_counts(policy: str, given: Any, scale: float) -> None:
    values, base, weights = given
    assert close(apply(policy, values, base, weights), apply(policy, values, base, weights * scale))


@pytest.mark.parametrize("policy", POLICIES[2:])
@given(given=candidates(), outlier=st.floats(-1e30, 1e30))
@settings(max_examples=40, deadline=None)
def test_one_outlier_among_three_or_more_moves_nothing_out_of_the_others_range(
    policy: str, given: Any, outlier: float
) -> None:
    values, base, _ = given
    values = torch.cat([values, values[:1] + 1, values[:1] - 1])[:7]
    broken = torch.cat([values, torch.full_like(values[:1], outlier)])
    merged = apply(policy, broken, base, torch.ones(len(broken)))
    assert (merged >= values.min(dim=0).values - 1e-9).all()
    assert (merged <= values.max(dim=0).values + 1e-9).all()


def test_one_outlier_moves_a_clipped_mean_no_further_than_the_clip() -> None:
    base, values = torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 5.0], [3e9, -4e9]])
    scales = policies.clip_scales(values.norm(dim=1), 5.0)
    merged = policies.clipped_mean(values, base, torch.ones(3), scales)
    torch.testing.assert_close(merged, torch.tensor([2.0, 5.0 / 3]))
    assert policies.clip_scales(torch.zeros(2), 0.0).tolist() == [1, 1]


def test_the_policies_by_hand() -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 9.0], [100.0, 1.0]])
    assert policies.weighted_mean(values, torch.tensor([1.0, 1.0, 2.0, 0.0])).tolist() == [2.75, 4.5]
    assert policies.trimmed_mean(values, 0.25).tolist() == [3.0, 0.5]
    assert policies.coordinate_median(values).tolist() == [3.0, 0.5]
    assert policies.coordinate_median(values[:3]).tolist() == [2.0, 0.0]
    assert [policies.trimmed(n, f) for n, f in ((3, 0.25), (4, 0.25), (100, 0.29), (9, 0.49))] == [0, 1, 29, 4]


@given(old=st.floats(-1e3, 1e3), new=st.floats(-1e3, 1e3), decay=st.floats(0, 1))
def test_decay_is_the_weight_of_the_old_model_and_reconciling_pulls_by_its_weight(
    old: float, new: float, decay: float
) -> None:
    first, second = torch.tensor([old], dtype=torch.float64), torch.tensor([new], dtype=torch.float64)
    expected = pytest.approx(decay * old + (1 - decay) * new, abs=1e-9)
    assert policies.moving_average(first, second, decay).item() == expected
    assert policies.reconcile(second, first, decay).item() == expected
    assert policies.moving_average(first, second, 0.0).equal(second)
    assert policies.reconcile(first, second, 1.0).equal(second)


@given(metrics=st.lists(st.floats(-50, 50), min_size=2, max_size=6), higher=st.booleans(), shift=st.floats(-10, 10))
def test_the_better_model_weighs_more_whatever_is_measured(metrics: list[float], higher: bool, shift: float) -> None:
    weights = policies.quality_weights(metrics, higher)
    for a, wa in zip(metrics, weights, strict=True):
        for b, wb in zip(metrics, weights, strict=True):
            if (a > b) == higher and abs(a - b) > 1e-6:
                assert wa > wb or wa == wb == 0.01
    assert max(weights) == 1
    assert policies.quality_weights([m + shift for m in metrics], higher) == pytest.approx(weights, abs=1e-9)


# -- models, as files -----------------------------------------------------------------------------------------------


def save(directory: Path, seed: int, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A tiny Llama in which ``seed`` moved every weight a bit from those of seed 0, and one file of a tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    common = torch.Generator().manual_seed(99)
    own = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters() if seed else []:
            p += 0.01 * torch.randn(p.shape, generator=common) + 0.01 * torch.randn(p.shape, generator=own)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "rank-00000.parquet").write_text("")
    return directory


def tensors(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base and three candidates of it; the first candidate in several files."""
    directory = tmp_path_factory.mktemp("models")
    save(directory / "1", 1, shard="20KB")
    return [save(directory / "0", 0), directory / "1", *(save(directory / str(seed), seed) for seed in (2, 3))]


def settings_of(models: list[Path], output: Path, **more: Any) -> Merge:
    return Merge.model_validate({"base": models[0], "candidates": models[1:], "output": output} | more)


def test_the_mean_is_the_mean_of_each_tensor_and_the_result_loads(models: list[Path], tmp_path: Path) -> None:
    done = merge(settings_of(models, tmp_path / "merged", weights=[1, 2, 3], losses=[3.0, 2.0, 2.0]))
    assert done.weights == pytest.approx([0.5 / 5.5, 2 / 5.5, 3 / 5.5])
    one, two, three = (tensors(m) for m in models[1:])
    for name, value in tensors(tmp_path / "merged").items():
        expected = (0.5 * one[name].double() + 2 * two[name].double() + 3 * three[name].double()) / 5.5
        torch.testing.assert_close(value, expected.float(), rtol=2e-7, atol=0)
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded.state_dict()["model.norm.weight"], tensors(tmp_path / "merged")["model.norm.weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]


def test_every_policy_agrees_with_itself_on_whole_tensors(models: list[Path], tmp_path: Path) -> None:
    base, *others = (tensors(m) for m in models)
    flat = torch.stack([torch.cat([c[n].double().flatten() for n in base]) for c in others])
    start = torch.cat([base[n].double().flatten() for n in base])
    for policy in POLICIES:
        merge(settings_of(models, tmp_path / policy, policy=policy, trim_fraction=0.34))
        merged = tensors(tmp_path / policy)
        expected = apply(policy, flat, start, torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(
            torch.cat([merged[n].flatten() for n in base]), expected.float(), rtol=1e-6, atol=1e-8
        )


def test_decay_and_reconciling_come_after_the_policy(models: list[Path], tmp_path: Path) -> None:
    base, one, two = (tensors(m) for m in models[:3])
    merge(settings_of(models[:3], tmp_path / "a", ema_decay=0.75, local=models[1]))
    for name, value in tensors(tmp_path / "a").items():
        merged = 0.75 * base[name].double() + 0.25 * (one[name].double() + two[name].double()) / 2
        torch.testing.assert_close(value, (0.25 * merged + 0.75 * one[name].double()).float(), rtol=1e-6, atol=1e-9)


def test_a_sharded_base_gives_its_files_and_bfloat16_is_rounded_once(models: list[Path], tmp_path: Path) -> None:
    base = save(tmp_path / "base", 0, torch.bfloat16, "20KB")
    others = [save(tmp_path / str(seed), seed, torch.bfloat16) for seed in (1, 2)]
    merge(settings_of([base, *others], tmp_path / "merged"))
    assert sorted(p.name for p in base.glob("model*")) == sorted(p.name for p in (tmp_path / "merged").glob("model*"))
    one, two, merged = (tensors(m) for m in (*others, tmp_path / "merged"))
    assert merged.keys() == one.keys()
    for name, value in merged.items():
        assert torch.equal(value, ((one[name].double() + two[name].double()) / 2).to(torch.bfloat16))


def test_tensors_that_are_no_floats_are_the_bases(tmp_path: Path) -> None:
    def write(name: str, value: float, step: int) -> Path:
        (tmp_path / name).mkdir()
        parts = {"b.w": torch.full((3,), value), "a.step": torch.tensor(step), "c": torch.tensor(value)}
        save_file(parts, tmp_path / name / "model.safetensors", {"format": "pt"})
        return tmp_path / name

    merge(settings_of([write("base", 1.0, 7), write("x", 2.0, 8), write("y", 4.0, 9)], tmp_path / "merged"))
    merged = tensors(tmp_path / "merged")
    assert (merged["a.step"], merged["c"]) == (7, 3)
    assert merged["b.w"].tolist() == [3, 3, 3]


def test_packs_merge_to_a_pack(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("x", 1.0), ("y", 2.0), ("z", 30.0)):
        packs.write(tmp_path / name, {"w": torch.full((700, 900), value), "b": torch.tensor([value, 1.0])}, "schema")
    inputs = [tmp_path / name for name in ("base", "x", "y", "z")]
    merge(settings_of(inputs, tmp_path / "merged", policy="coordinate-median", max_norm_ratio=0))
    merged = packs.read(tmp_path / "merged")
    assert (merged.values[0], merged.values[1], np.unique(merged.values[2:]).tolist()) == (2, 1, [2])
    assert merged.manifest == packs.read(tmp_path / "base").manifest


# -- screening ------------------------------------------------------------------------------------------------------


def moved(directory: Path, name: str, model: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    (directory / name).mkdir()
    save_file({k: change(k, v) for k, v in tensors(model).items()}, directory / name / "model.safetensors")
    return directory / name


def test_each_broken_candidate_is_left_out_for_its_own_reason(models: list[Path], tmp_path: Path) -> None:
    base = tensors(models[0])

    def broken(name: str, value: Tensor) -> Tensor:
        value = value.clone()
        if name == "model.norm.weight":
            value[3:5] = math.nan
        return value

    odd = [
        moved(tmp_path, "nan", models[1], broken),
        moved(tmp_path, "huge", models[1], lambda n, v: base[n] + 1e4 * (v - base[n])),
        moved(tmp_path, "reversed", models[1], lambda n, v: 2 * base[n] - v),
    ]
    everything = [*models, *odd, save(tmp_path / "diverged", 4)]
    losses = [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, math.nan]
    done = merge(settings_of(everything, tmp_path / "merged", losses=losses))
    reasons = [verdict.reason for verdict in done.verdicts]
    assert reasons[:3] == ["", "", ""]
    assert reasons[3] == "2 values are not finite, first in model.norm.weight"
    assert reasons[4].startswith("its delta's norm ")
    assert "more than max_norm_ratio 10 times the median" in reasons[4]
    assert "median cosine to the others' is -" in reasons[5]
    assert reasons[6] == "its loss or score is nan"
    assert done.weights == pytest.approx([1 / 3] * 3 + [0] * 4)
    merge(settings_of(models, tmp_path / "clean"))
    for name, value in tensors(tmp_path / "clean").items():
        assert torch.equal(value, tensors(tmp_path / "merged")[name])
    assert f"{odd[0]}: delta norm" in done.report()
    assert "rejected: 2 values are not finite" in done.report()


def test_screening_measures_the_deltas(models: list[Path], tmp_path: Path) -> None:
    base, *others = (torch.cat([v.double().flatten() for _, v in sorted(tensors(m).items())]) for m in models)
    done = merge(settings_of(models, tmp_path / "merged"))
    for i, verdict in enumerate(done.verdicts):
        assert verdict.norm == pytest.approx(float((others[i] - base).norm()), rel=1e-9)
        cosines = sorted(
            float(torch.cosine_similarity(others[i] - base, o - base, dim=0)) for j, o in enumerate(others) if j != i
        )
        assert verdict.cosine == pytest.approx(cosines[1], rel=1e-9)


def test_candidates_that_changed_nothing_are_no_mistake(models: list[Path], tmp_path: Path) -> None:
    done = merge(settings_of([models[0], models[0], models[1]], tmp_path / "merged"))
    assert [v.reason for v in done.verdicts] == ["", ""]
    one = merge(settings_of([models[0], models[0]], tmp_path / "same"))
    assert one.verdicts[0].cosine is None
    assert all(torch.equal(v, tensors(models[0])[k]) for k, v in tensors(tmp_path / "same").items())


# -- the job --------------------------------------------------------------------------------------------------------


def argv(models: list[Path], output: Path, *more: str) -> list[str]:
    each = [word for model in models[1:] for word in ("--candidates", str(model))]
    return ["--base", str(models[0]), *each, "--output", str(output), *more]


def test_the_job_takes_run_directories_and_prints_a_line_per_candidate(
    job: Job, models: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(models[1])
    models = [models[0], tmp_path / "run", *models[2:]]
    code, out, err = job("merge", *argv(models, tmp_path / "m", "--weights", "1,2,1", "--policy", "weighted-mean"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith(f"{models[2]}: delta norm ")
    assert lines[1].endswith(", weight 0.5000")
    assert lines[0].startswith(f"{tmp_path / 'run'}: delta norm ")
    assert lines[3] == f"weighted-mean of 3 models: {tmp_path / 'm'}"


def test_a_file_may_give_what_must_be_given(job: Job, models: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "merge.toml"
    file.write_text(f"base = '{models[0]}'\ncandidates = ['{models[1]}', '{models[2]}']\nweights = [1, 3]\n")
    code, out, err = job("merge", str(file), "--output", str(tmp_path / "m"))
    assert (code, err) == (0, "")
    assert out.splitlines()[1].endswith("weight 0.7500")
    code, out, _ = job("merge", str(file), "--output", str(tmp_path / "n"), "--candidates", f"{models[3]},{models[2]}")
    assert out.splitlines()[0].startswith(str(models[3]))
    file.write_text(f"base = '{models[0]}'\ncandidates = []\n")
    code, _, err = job("merge", str(file), "--output", str(tmp_path / "o"))
    assert (code, "candidates: list should have at least 1 item" in err) == (2, True)
    file.write_text(f"base = '{models[0]}'\n")
    code, _, err = job("merge", str(file), "--output", str(tmp_path / "o"))
    assert (code, "candidates: field required" in err) == (2, True)


def test_a_model_that_does_not_fit_is_one_line(job: Job, models: list[Path], tmp_path: Path) -> None:
    pack, torn, index = tmp_path / "pack", tmp_path / "torn", tmp_path / "index"
    packs.write(pack, {"w": torch.ones(2)}, "s")
    packs.write(tmp_path / "other", {"w": torch.ones(3)}, "s")
    for directory in (torn, index):
        directory.mkdir()
    (torn / "model.safetensors").write_bytes((models[1] / "config.json").read_bytes())
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../0/model.safetensors"}}))
    wide = moved(tmp_path, "wide", models[1], lambda n, v: v[:5].clone() if n == "model.norm.weight" else v)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    save_file({"model.norm.weight": torch.ones(32)}, fewer / "model.safetensors")
    infinite = moved(tmp_path, "inf", models[0], lambda n, v: v / 0)
    for found, message in [
        ([models[0], tmp_path / "nowhere"], "nowhere is no model: expected model.safetensors, "),
        ([models[0], torn], "model.safetensors is no safetensors file: .*it was not copied whole"),
        ([models[0], index], "names '../0/model.safetensors', which is not beside it"),
        ([models[0], pack], "are a parameter pack and a model directory: give models of one kind"),
        ([pack, tmp_path / "other"], "has layout_hash torch-layout-.*give packs of one model"),
        ([models[0], wide], r"has model.norm.weight of shape \[5\], but the base .* \[32\]"),
        ([models[0], fewer], "has lm_head.weight, but .*fewer does not"),
        ([infinite, models[0]], "the base .*inf has values that are not finite in "),
    ]:
        check(job("merge", *argv(found, tmp_path / "out")), 4, message, tmp_path / "out")
    code, _, err = job("merge", *argv(models, pack))
    assert (code, err) == (2, f"error: output {pack} exists: choose another, or remove it\n")
    with pytest.raises(ConfigError, match="exists"):
        merge(settings_of(models, pack))
    with pytest.raises(ModelError, match="not finite in torch.float32: nothing was written"):
        merge(settings_of(models, tmp_path / "out", local=infinite))
    code, _, err = job("merge", *argv([models[0], models[1], models[1]], tmp_path / "out"))
    assert (code, "twice: give it once" in err) == (2, True)


def check(outcome: tuple[int, str, str], code: int, message: str, output: Path) -> None:
    found, _, err = outcome
    assert (found, err.count("\n")) == (code, 1), err
    assert re.search(message, err), err
    assert not output.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    # One tensor of 4 MB and one of 40 MB: 36 MB more of each candidate on disk, and next to nothing in memory.
    for name, size in (("small", 1_000_000), ("large", 10_000_000)):
        for i in range(4):
            packs.write(tmp_path / name / str(i), {"w": torch.full((size,), float(i))}, "s")
    code = """
import re, sys, torch
from pathlib import Path
from sparktrain.train.merge import Merge, merge
torch.set_num_threads(1)
at = Path(sys.argv[1])
for name in ("small", "large"):
    inputs = [at / name / str(i) for i in range(4)]
    merge(Merge(base=inputs[0], candidates=inputs[1:], output=at / name / "merged", policy="coordinate-median"))
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(said[1]) - int(said[0]) < 20_000, said  # kB
    assert np.unique(packs.read(tmp_path / "large" / "merged").values).tolist() == [2]
