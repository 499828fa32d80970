"""Shards of elsewhere in real runs: the place of the tokens, mirrors and the cache change nothing of the result."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparktrain import cli, plan, tokens
from sparktrain.config import Data, RunConfig
from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec
from sparktrain.rundir import RunDir
from sparktrain.spark import index
from sparktrain.tokens.sources import is_local
from sparktrain.tokens.sources.reach import opener
from sparktrain.train import models
from tests.conftest import take_steps, tiny_argv
from tests.web import Web, serve


@pytest.fixture
def web(data: Path) -> Iterator[Web]:
    """The data directory on a server, with a manifest in the directory above the shards."""
    with serve() as web:
        files = sorted((data / "train").iterdir())
        web.files = {f"/d/train/{file.name}": file.read_bytes() for file in files}
        web.files["/d/manifest.json"] = manifest({f"train/{file.name}": file.read_bytes() for file in files})
        yield web


def manifest(files: dict[str, bytes], **changed: Any) -> bytes:
    shards = [
        {"path": name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), **changed}
        for name, raw in files.items()
        if name.endswith(".ds")
    ]
    return json.dumps({"format": "sparktrain-tokens/1", "shards": shards}).encode()


@pytest.fixture
def trained(on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path) -> Callable[..., str]:
    """``trained(place, *flags)``: digest of the parameters after 6 steps of two ranks."""

    def rank(rank: int, size: int, directory: RunDir, config: RunConfig, spec: PlanSpec) -> str:
        records, model, _ = take_steps(directory, config, spec, rank, size)
        assert len(records) == 6
        return models.digest(model)

    def run(place: str, *flags: str) -> str:
        argv = tiny_argv(data, tmp_path / "run", *flags)
        argv[argv.index("--data.path") + 1] = place
        config = cli.parse(RunConfig, argv)
        located = tokens.locate_shards(config.data.path, opener(config.data, {}))
        assert [known.sha256 != "" for known in located.values()] == [not is_local(uri) for uri in located]
        open_ = opener(config.data, located)
        shards = tuple(tokens.inspect(uri, None, open_, known) for uri, known in located.items())
        spec = PlanSpec(shards, sequence_length=32, total_batch=8, steps=6, seed=5)
        directory = RunDir(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        directory.plan.mkdir(parents=True)
        rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
        pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
        (digest,) = set(on_ranks(2, rank, directory, config, spec))
        return str(digest)

    return run


def asked_for_shards(web: Web) -> int:
    return sum(path.endswith(".ds") for path, _, _ in web.asked)


def test_shards_on_a_server_train_the_model_of_local_ones(trained: Callable[..., str], web: Web, data: Path) -> None:
    assert trained(f"{web.url}/d/train") == trained(str(data / "train"))
    assert asked_for_shards(web) > 6 * 8


def test_a_place_that_dies_in_mid_run_is_replaced_by_its_mirror(
    trained: Callable[..., str], web: Web, data: Path
) -> None:
    with serve() as other:
        other.files = web.files
        web.fault = lambda n, path: 404 if n > 30 else None
        roots = f'["{web.url}/d", "{other.url}/d"]'
        assert trained(f"{web.url}/d/train", "--data.mirrors", roots) == trained(str(data / "train"))
        assert len(web.asked) > 30
        assert asked_for_shards(other) > 10


def test_a_second_run_with_a_cache_reads_no_shard_from_the_server(
    trained: Callable[..., str], web: Web, data: Path, tmp_path: Path
) -> None:
    flags = (f"{web.url}/d/train", "--data.cache-dir", str(tmp_path / "cache"))
    first = trained(*flags)
    assert asked_for_shards(web) >= 3
    web.asked.clear()
    assert first == trained(*flags) == trained(str(data / "train"))
    assert asked_for_shards(web) == 0


def test_executors_index_what_a_server_has_and_compare_it_with_its_manifest(spark: Any, web: Web, data: Path) -> None:
    settings = Data(path=(f"{web.url}/d/train",))
    located = tokens.locate_shards(settings.path, opener(settings, {}))
    local = index.index_shards(spark, tokens.locate_shards(data / "train"), Data())
    found = index.index_shards(spark, located, settings)
    assert [(s.num_tokens, s.sha256, most) for s, most in found] == [(s.num_tokens, s.sha256, m) for s, m in local]
    victim = "/d/train/00001_00000_shuffled.ds"
    web.files[victim] = web.files[victim][2:] + web.files[victim][:2]
    with pytest.raises(DataError, match="00001_00000_shuffled.ds has sha256 .*, its manifest says"):
        index.index_shards(spark, located, settings)
    web.files[victim] = web.files[victim][:-2]
    del web.files[f"{victim}.metadata"], web.files[f"{victim}.index"]
    with pytest.raises(DataError, match="00001_00000_shuffled.ds has 7998 bytes, expected 8000 by its manifest"):
        index.index_shards(spark, located, settings)
    web.fault = lambda n, path: 401
    with pytest.raises(DataError, match="environment variable SPARKTRAIN_TOKEN_127_0_0_1, which is not set"):
        index.index_shards(spark, located, settings)


@pytest.mark.parametrize("name", ["../x.ds", "/x.ds", "a/%2e%2e/%2E%2E/x.ds", "a//x.ds", "http://h/x.ds", "./x.ds"])
def test_a_manifest_names_no_file_outside_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.ds").write_bytes(bytes(8))
    (tmp_path / "manifest.json").write_bytes(manifest({name: bytes(8)}))
    with pytest.raises(DataError, match="which is not inside its directory"):
        tokens.locate_shards(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "manifest.json is no JSON: it is torn"),
        (manifest({"a.ds": bytes(8)}, sha256="x"), "has for shard a.ds 8 bytes, sha256 'x'"),
        (manifest({"a.ds": bytes(8)}, bytes=None), "has a shard without path, bytes or sha256"),
        (manifest({"b.ds": bytes(8)}), "b.ds is missing, yet its manifest.json knows it"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.ds").write_bytes(bytes(8))
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokens.locate_shards(tmp_path)


def test_a_manifest_of_another_tool_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.ds").write_bytes(bytes(8))
    (tmp_path / "manifest.json").write_text('{"files": []}')
    assert list(tokens.locate_shards(tmp_path).values()) == [tokens.Known()]
