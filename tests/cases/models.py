"""Models that cannot be trained, sampled from or merged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cases import Case, Place, edit

Change = Callable[[Path], Any]


def settings(**values: Any) -> Change:
    """The model's config.json with other values; None takes one out."""

    def change(model: Path) -> None:
        known = json.loads((model / "config.json").read_text()) | values
        (model / "config.json").write_text(json.dumps({k: v for k, v in known.items() if v is not None}))

    return change


def weights(change: Callable[[dict[str, Any]], Any]) -> Change:
    """The model's tensors after ``change``."""

    def make(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return make


def raw(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda model: edit(model / name, change)


def without(name: str) -> Change:
    return lambda model: (model / name).unlink()


def pickled(model: Path) -> None:
    """Weights as torch.save leaves them, and nothing else."""
    os.rename(model / "model.safetensors", model / "pytorch_model.bin")


def indexed(shard: str) -> Change:
    def make(model: Path) -> None:
        os.unlink(model / "model.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))

    return make


def code(model: Path) -> None:
    """A model that comes with Python, which says where it was run."""
    (model / "mine.py").write_text(f"open({str(model / 'executed')!r}, 'w')\nclass C: pass\n")
    settings(model_type="mine", architectures=["C"], auto_map={"AutoConfig": "mine.C"})(model)


def describe(change: Change, *more: str) -> Callable[[Place], list[str]]:
    """What an executor is asked of the model before a run."""

    def make(place: Place) -> list[str]:
        from sparktrain import cli
        from sparktrain.config import RunConfig

        change(place.model())
        argv = [*place.train(), "--model.from-pretrained", str(place.inputs / "model"), *more]
        place.stdin = cli.parse(RunConfig, argv).model_dump_json()
        return ["--describe"]

    return make


def scratch(*more: str) -> Callable[[Place], list[str]]:
    def make(place: Place) -> list[str]:
        from sparktrain import cli
        from sparktrain.config import RunConfig

        place.stdin = cli.parse(RunConfig, [*place.train(), *more]).model_dump_json()
        return ["--describe"]

    return make


def of_images(place: Place) -> list[str]:
    scratch()(place)
    config = json.loads(place.stdin)
    config["model"] |= {"architecture": "vit", "sizes": {}}
    place.stdin = json.dumps(config)
    return ["--describe"]


def sample(change: Change, *more: str) -> Callable[[Place], list[str]]:
    """jobs/generate.py"""

    def make(place: Place) -> list[str]:
        change(place.model())
        return ["--model", str(place.inputs / "model"), "--prompt", "def ", "--max-new-tokens", "2", *more]

    return make


def merged(change: Change, *more: str) -> Callable[[Place], list[str]]:
    """jobs/merge.py with a candidate after ``change``."""

    def make(place: Place) -> list[str]:
        change(place.model("candidate"))
        base, candidate = str(place.given.model()), str(place.inputs / "candidate")
        return ["--base", base, "--candidates", candidate, "--output", str(place.out), *more]

    return make


def nothing(model: Path) -> None:
    """All is well with the model."""


def gone(model: Path) -> None:
    shutil.rmtree(model)


def scaled(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] / 0


def shorter(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()


TORN = raw("model.safetensors", lambda c: c[:5000])
BROKEN = [
    # name, change, what all jobs say of it
    ("without config", without("config.json"), "config.json|no checkpoint and no model"),
    ("config torn", raw("config.json", lambda c: c[:40]), "config.json|no valid JSON|cannot be loaded"),
    ("config a list", raw("config.json", lambda c: b"[]"), "cannot be loaded"),
    ("of an unknown type", settings(model_type="nothing-known"), "nothing-known|cannot be loaded"),
    ("without a type", settings(model_type=None), "cannot be loaded"),
    ("that is no language model", settings(model_type="vit"), "no causal language model|cannot be"),
    ("with its own code", code, "brings Python code of its own"),
    (
        "with attention of the Hub",
        settings(_attn_implementation="evil/kernel"),
        "code of evil/kernel .*: take",
    ),
    (
        "that is quantised",
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised .gptq.",
    ),
    ("of pickled weights", pickled, "pytorch_model.bin, a pickle.* safetensors"),
    ("of torn weights", TORN, "model.safetensors is no safetensors file"),
    ("of weights with a huge header", raw("model.safetensors", lambda c: b"\xff" * 8 + c[8:]), "is no safetensors fil"),
    ("of weights with more behind", raw("model.safetensors", lambda c: c + b"x"), "is no safetensors file"),
    ("with an index that leads out", indexed("../x.safetensors"), "names '../x.safetensors', which is not beside it"),
    ("with an index of what is not there", indexed("x.safetensors"), "names 'x.safetensors', which is not beside it"),
]

DESCRIBE = [
    *(Case(f"model {name}", describe(change), 4, message, "worker") for name, change, message in BROKEN),
    Case(
        "model gone",
        describe(gone),
        4,
        "model.from_pretrained .*model is no directory and no hub id",
        "worker",
    ),
    Case(
        "sequence over positions",
        describe(nothing, "--data.sequence-length", "129"),
        2,
        "data.sequence_length is 129, more than the model's 128 positions: set data.sequence_length to at most 128",
        "worker",
    ),
    Case(
        "sizes against the model",
        describe(nothing, "--model.sizes", '{"num_hidden_layers": 3}'),
        2,
        "model.sizes.num_hidden_layers is 3, but .* has 2: remove it",
        "worker",
    ),
    Case(
        "unknown architecture",
        scratch("--model.architecture", "lama"),
        2,
        "model.architecture 'lama' is unknown to transformers: use a model_type, as llama",
        "worker",
    ),
    Case(
        "unknown size",
        scratch("--model.sizes", '{"hiden_size": 3}'),
        2,
        "model.sizes.hiden_size is not a size of llama: remove it",
        "worker",
    ),
    Case(
        "sizes that do not fit",
        scratch("--model.sizes", '{"hidden_size": 65, "num_attention_heads": 2}'),
        2,
        "model.sizes do not make a llama",
        "worker",
    ),
    Case("size of text", scratch("--model.sizes", '{"hidden_size": "big"}'), 2, "model.sizes", "worker"),
    Case("size negative", scratch("--model.sizes", '{"hidden_size": -64}'), 2, "model.sizes", "worker"),
    Case(
        "architecture that is none to train",
        of_images,
        4,
        "no causal language model",
        "worker",
    ),
    Case(
        "tokenizer torn",
        lambda p: scratch("--model.tokenizer", str(p.file("t/tokenizer.json", "{").parent))(p),
        4,
        "tokenizer .*t cannot be loaded",
        "worker",
    ),
    Case("tokenizer gone", scratch("--model.tokenizer", "nowhere"), 4, "tokenizer nowhere", "worker"),
]

GENERATE = [
    *(Case(f"model {name}", sample(change), 4, message, "generate") for name, change, message in BROKEN),
    Case("model gone", sample(gone), 4, "model is no directory: give a run directory", "generate"),
    Case("without tokenizer", sample(without("tokenizer.json")), 4, "model holds no tokenizer: expected", "generate"),
    Case(
        "tokenizer torn",
        sample(raw("tokenizer.json", lambda c: c[:99])),
        4,
        "tokenizer .*model cannot be loaded: .*; save it again",
        "generate",
    ),
    Case(
        "tokenizer of none",
        sample(raw("tokenizer.json", lambda c: b"{}")),
        4,
        "tokenizer .*model cannot be loaded: .*; save it again",
        "generate",
    ),
    Case("weights of another shape", sample(weights(shorter)), 4, "model.norm.weight", "generate"),
    Case("weights missing", sample(weights(lambda t: t.pop("model.norm.weight"))), 4, "model.norm.weight", "generate"),
    Case("weights not finite", sample(weights(scaled)), 4, "cannot be sampled from", "generate"),
    Case("empty prompt", sample(nothing, "--prompt", ""), 2, "prompt: .* at least 1 character", "generate"),
    Case(
        "prompt too long",
        sample(nothing, "--prompt", "x" * 500),
        2,
        "prompt has .* tokens, the model 128 position",
        "generate",
    ),
    Case("no prompt", lambda p: ["--model", str(p.given.model())], 2, "prompt: field required", "generate"),
    Case("temperature", sample(nothing, "--temperature", "nan"), 2, "temperature: .* finite", "generate"),
    Case("top k", sample(nothing, "--top-k", "0"), 2, "top_k: .* greater than or equal to 1", "generate"),
]


def packs(change: Callable[[dict[str, Any]], Any], size: int = 8) -> Callable[[Place], list[str]]:
    """jobs/merge.py on two packs of 8 bytes, the second with another manifest."""

    def make(place: Place) -> list[str]:
        manifest: dict[str, Any] = {"format": "burn-p2p-python-flattened-parameter-pack-v1", "parameter_count": 2}
        manifest |= {"model_schema_hash": "s", "layout_hash": "l", "values_f32_le": "values.f32le"}
        for name in ("a", "b"):
            if name == "b":
                change(manifest)
            place.file(f"{name}/manifest.json", json.dumps(manifest))
            place.file(f"{name}/values.f32le", bytes(size if name == "b" else 8))
        base, candidate = str(place.inputs / "a"), str(place.inputs / "b")
        return ["--base", base, "--candidates", candidate, "--output", str(place.out)]

    return make


MERGE = [
    *(Case(f"candidate {name}", merged(change), 4, message, "merge") for name, change, message in BROKEN[9:]),
    Case("candidate gone", merged(gone), 4, "candidate is no model: expected model.safetensors, ", "merge"),
    Case(
        "candidate of another shape",
        merged(weights(shorter)),
        4,
        r"candidate has model.norm.weight of shape \[5\], but the base .* \[64\]: give candidates",
        "merge",
    ),
    Case(
        "candidate lacks a tensor",
        merged(weights(lambda t: t.pop("model.norm.weight"))),
        4,
        "has model.norm.weight, but .*candidate does not: give candidates",
        "merge",
    ),
    Case(
        "all rejected",
        merged(weights(scaled)),
        4,
        "all 1 candidates were rejected, nothing was merged: .* not fini",
        "merge",
    ),
    Case(
        "output there",
        lambda p: [*merged(nothing)(p), "--output", str(p.inputs)],
        2,
        "output .*inputs exists: choo",
        "merge",
    ),
    Case(
        "candidate twice",
        lambda p: [*merged(nothing)(p), "--candidates", str(p.inputs / "candidate")],
        2,
        "candidates has .*candidate twice: give it once",
        "merge",
    ),
    Case(
        "no candidate",
        lambda p: ["--base", str(p.given.model()), "--output", str(p.out)],
        2,
        "candidates: field req",
        "merge",
    ),
    Case("unknown policy", merged(nothing, "--policy", "mean"), 2, "policy: .*'weighted-mean'", "merge"),
    Case(
        "weights of two",
        merged(nothing, "--weights", "1,2"),
        2,
        "weights has 2 numbers for 1 candidates: give",
        "merge",
    ),
    Case("weight of 0", merged(nothing, "--weights", "0"), 2, "weights has 0.0: expected numbers above 0", "merge"),
    Case(
        "losses and scores",
        merged(nothing, "--losses", "1", "--scores", "1"),
        2,
        "losses and scores are both set",
        "merge",
    ),
    Case(
        "a median's losses",
        merged(nothing, "--losses", "1", "--policy", "coordinate-median"),
        2,
        "coordinate-median takes no losses: remove them",
        "merge",
    ),
    Case(
        "trimmed to nothing",
        merged(nothing, "--policy", "trimmed-mean"),
        2,
        "trim_fraction 0.25 of 1 candidates dro",
        "merge",
    ),
    Case("decay", merged(nothing, "--ema-decay", "1.5"), 2, "ema_decay: .* less than or equal to 1", "merge"),
    Case(
        "losses of no number",
        merged(nothing, "--losses", "NaN"),
        4,
        "all 1 candidates were rejected, .* is nan",
        "merge",
    ),
    Case(
        "packs of two layouts",
        packs(lambda m: m.update(layout_hash="x")),
        4,
        "has layout_hash x, but the base .* l:",
        "merge",
    ),
    Case(
        "pack of another format", packs(lambda m: m.update(format="v9")), 4, "parameter-pack format 'v9': this", "merge"
    ),
    Case(
        "pack without count",
        packs(lambda m: m.pop("parameter_count")),
        4,
        "has parameter_count None: expected a whol",
        "merge",
    ),
    Case("pack torn", packs(lambda m: None, 7), 4, "byte length 7 of .* does not match parameter count 2", "merge"),
    Case(
        "pack that leads out",
        packs(lambda m: m.update(values_f32_le="../a/values.f32le")),
        4,
        "expected a file beside",
        "merge",
    ),
    Case(
        "pack and model",
        lambda p: [*packs(lambda m: None)(p), "--base", str(p.given.model())],
        4,
        "are a parameter pack and a model directory: give models of one kind",
        "merge",
    ),
]

CASES = [*DESCRIBE, *GENERATE, *MERGE]
