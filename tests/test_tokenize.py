"""Text to token shards: every document once, its text unchanged, the same bytes however the work is cut."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparktrain import tokens
from sparktrain.errors import ConfigError, DataError
from sparktrain.spark.tokenize import TokenizeConfig, tokenize
from sparktrain.tokens import corpus, directory, find_shards
from sparktrain.tokens.tokenizer import END_OF_TEXT, TextTokenizer, load, train

ROOT = Path(__file__).resolve().parent.parent
ODD_TEXTS = ["\ufefftabs\t\r\nend\r", f"a {END_OF_TEXT} b", "naïve 数据 🙂", "\0\x7f\u2028", " ", "\n\n    x"]
Job = Callable[..., tuple[int, str, str]]


def _text(i: int) -> str:
    return f"def function_{i}(value):\n    return value + {i}\n" * (1 + i % 7)


def _documents() -> dict[str, str]:
    documents = {f"package/module_{i}.py": _text(i) for i in range(54)}
    documents |= {f"odd {i} %20é.py": odd for i, odd in enumerate(ODD_TEXTS)}
    return documents | {name: name for name in ("package/__init__.py", "_private.py", ".hidden/.dot.py")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """63 documents, an empty file, one in Latin-1, and files to leave out."""
    root = tmp_path_factory.mktemp("text")
    files = {name: text.encode() for name, text in _documents().items()}
    files |= {"empty.py": b"", "latin.py": "naïve".encode("latin-1")}
    files |= {"site-packages/dependency.py": b"no", "notes.txt": b"no"}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _config(text: Path, output: Path, **settings: Any) -> TokenizeConfig:
    return TokenizeConfig(input=text, output=output, vocab_size=300, shards=3, heldout_fraction=0.1, **settings)


@pytest.fixture(scope="module")
def made(spark: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> directory.TokenDir:
    return tokenize(spark, _config(text, tmp_path_factory.mktemp("made") / "out"), partitions=7)


def _digests(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _texts(shard: str, tokenizer: TextTokenizer) -> list[str]:
    """Texts of a shard, read the way datatrove does: by the exclusive ends in its index."""
    size = tokens.inspect(shard).token_size
    ids = np.fromfile(shard, f"<u{size}").astype(np.int64)
    ends = np.fromfile(f"{shard}.index", "<u8").tolist()
    assert ends[-1] == len(ids)
    assert all(ids[end - 1] == tokenizer.end_id for end in ends)
    assert (ids == tokenizer.end_id).sum() == len(ends)
    return [tokenizer.decode(ids[start : end - 1]) for start, end in zip([0, *ends], ends, strict=False)]


def test_every_document_is_written_once_in_the_splits_order_with_its_text_unchanged(made: directory.TokenDir) -> None:
    documents, tokenizer = _documents(), load(made.path / "tokenizer")
    split = corpus.split(list(documents), seed=0, heldout_fraction=0.1, shards=3)
    assert sorted(split.train + split.heldout) == sorted(documents)
    for shard, path in enumerate(find_shards(made.path / "train")):
        assert _texts(path, tokenizer) == [documents[name] for name in split.train[shard::3]]
    (heldout,) = find_shards(made.path / "heldout")
    assert _texts(heldout, tokenizer) == [documents[name] for name in split.heldout]
    size = sum(len(text.encode()) for text in documents.values())
    assert made.manifest["documents"] == {"train": 57, "heldout": 6, "empty": 1, "not_utf8": 1, "bytes": size}


def test_the_manifest_and_the_side_files_say_what_is_in_the_shards(made: directory.TokenDir) -> None:
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest == made.manifest
    assert manifest["format"] == directory.FORMAT
    assert [s["path"] for s in manifest["shards"]] == [
        *(f"train/{i:05d}_00000_shuffled.ds" for i in range(3)),
        "heldout/00000_00000_shuffled.ds",
    ]
    for entry in manifest["shards"]:
        content = (made.path / entry["path"]).read_bytes()
        assert entry["bytes"] == len(content) == entry["tokens"] * manifest["token_size"]
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        metadata = (made.path / f"{entry['path']}.metadata").read_text().splitlines()
        assert metadata[:2] == [f"sha256:{manifest['tokenizer']['sha256']}|2", str(entry["tokens"])]
        assert (made.path / f"{entry['path']}.index").stat().st_size == 8 * entry["documents"]
    assert sorted(p.name for p in made.path.iterdir()) == ["heldout", "manifest.json", "tokenizer", "train"]


def test_another_number_of_partitions_gives_the_same_bytes(
    spark: Any, made: directory.TokenDir, text: Path, tmp_path: Path
) -> None:
    tokenize(spark, _config(text, tmp_path / "out"), partitions=2)
    assert _digests(tmp_path / "out") == _digests(made.path)


def test_an_interrupted_attempt_with_other_settings_leaves_nothing_behind(
    spark: Any, made: directory.TokenDir, text: Path, tmp_path: Path
) -> None:
    directory.claim(tmp_path)
    for name in ("train/00009_00000_shuffled.ds", "train/.00000_00000_shuffled.ds.ab.tmp", "tokenizer/vocab.json"):
        (tmp_path / name).write_text("torn")
    tokenize(spark, _config(text, tmp_path))
    assert _digests(tmp_path) == _digests(made.path)


def test_a_tokenizer_brought_along_is_used_and_kept(
    spark: Any, made: directory.TokenDir, text: Path, tmp_path: Path
) -> None:
    brought = tmp_path / "brought"
    load(made.path / "tokenizer").save(_directory(brought))
    (brought / "model.safetensors").write_text("weights")
    config = _config(text, tmp_path / "out", tokenizer=brought)
    assert tokenize(spark, config).manifest["tokenizer"] == made.manifest["tokenizer"]
    assert _digests(tmp_path / "out" / "train") == _digests(made.path / "train")
    assert _digests(tmp_path / "out" / "tokenizer") == _digests(made.path / "tokenizer")
    train(["another text"], 258).save(brought)
    with pytest.raises(ConfigError, match="the tokenizer has changed"):
        tokenize(spark, config)


def test_without_a_held_out_part_all_is_for_training(spark: Any, text: Path, tmp_path: Path) -> None:
    config = TokenizeConfig(input=text, output=tmp_path / "out", vocab_size=258, shards=1, heldout_fraction=0)
    made = tokenize(spark, config)
    assert made.manifest["documents"]["train"] == 63
    assert not (tmp_path / "out" / "heldout").exists()


def test_the_job_prints_what_it_made_and_made_again_it_does_nothing(
    spark: Any, made: directory.TokenDir, text: Path, tmp_path: Path, job: Job
) -> None:
    argv = ["--input", str(text), "--output", str(tmp_path / "out"), "--vocab-size", "300", "--shards", "3"]
    code, out, _ = job("tokenize", *argv, "--heldout-fraction", "0.1")
    assert code == 0
    assert "57 documents to train on, 6 held out; left out: 1 not UTF-8, 1 empty" in out
    assert _digests(tmp_path / "out") == _digests(made.path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    code, out, _ = job("tokenize", *argv, "--heldout-fraction", "0.1")
    assert code == 0
    assert "already there" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    code, _, err = job("tokenize", *argv)
    assert code == ConfigError.exit_code
    assert "heldout_fraction is 0.1 there, 0.05 here" in err


def test_a_shard_that_is_gone_is_named_and_not_taken_for_made(tmp_path: Path) -> None:
    manifest = {
        "tokenizer": {"sha256": ""},
        "settings": {},
        "documents": {},
        "shards": [{"path": "train/a.ds", "bytes": 4}],
    }
    directory.claim(tmp_path)
    directory.commit(tmp_path, manifest)
    with pytest.raises(DataError, match=r"train/a\.ds is missing or torn"):
        directory.find(tmp_path, {}, None)
    (tmp_path / "train" / "a.ds").write_bytes(bytes(4))
    found = directory.find(tmp_path, {}, None)
    assert found is not None
    assert not found.fresh


def test_a_manifest_of_another_make_is_left_alone(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ConfigError, match=r"manifest\.json that is not sparktrain-tokens/1"):
            directory.find(tmp_path, {}, None)


def test_files_are_found_whatever_their_first_letter_but_not_in_the_output(text: Path) -> None:
    found = corpus.find(text, "*.py", ("site-packages",), text / "package")
    odd = [f"odd {i} %20é.py" for i in range(len(ODD_TEXTS))]
    assert sorted(found) == sorted([*odd, "_private.py", ".hidden/.dot.py", "empty.py", "latin.py"])


def test_documents_are_measured(text: Path) -> None:
    assert corpus.measure(str(text), "_private.py") == (11, "")
    assert corpus.measure(str(text), "empty.py") == (0, "")
    assert corpus.measure(str(text), "latin.py") == (-1, "")
    assert corpus.measure(str(text), "gone.py") == (-1, "No such file or directory")


def test_the_split_depends_on_names_and_seed_and_on_no_order() -> None:
    names = [f"{i}.py" for i in range(200)]
    split = corpus.split(names, seed=3, heldout_fraction=0.05, shards=4)
    assert sorted(split.train + split.heldout) == sorted(names)
    assert len(split.heldout) == 10
    assert corpus.split(names[::-1], 3, 0.05, 4) == split
    assert set(corpus.split(names, 4, 0.05, 4).heldout) != set(split.heldout)
    assert len(corpus.split(names[:2], 3, 0.05, 1).heldout) == 1
    with pytest.raises(ConfigError, match="1 are held out and 0 are left"):
        corpus.split(names[:1], 3, 0.05, 1)


def test_training_gives_the_same_tokenizer_on_one_thread_and_on_all() -> None:
    code = (
        "from pathlib import Path; from sparktrain.tokens.tokenizer import train; "
        f"print(train([path.read_text() for path in sorted(Path({str(ROOT)!r}).glob('sparktrain/*.py'))], 600).sha256)"
    )
    digests = set()
    for parallel in ("false", "true"):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallel, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def test_transformers_opens_the_tokenizer_and_encodes_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train([_text(i) for i in range(20)], 300)
    tokenizer.save(tmp_path)
    opened = AutoTokenizer.from_pretrained(str(tmp_path))
    assert opened.eos_token == END_OF_TEXT
    assert opened.eos_token_id == tokenizer.end_id
    assert len(opened) == tokenizer.vocab_size == 300
    for text in ["x ,  y .", *(odd for odd in ODD_TEXTS if END_OF_TEXT not in odd)]:
        ids = opened(text).input_ids
        assert [*ids, tokenizer.end_id] == tokenizer.encode(text).tolist()
        assert opened.decode(ids) == text


def test_a_tokenizer_that_would_cut_or_pad_keeps_all_of_a_text(tmp_path: Path) -> None:
    tokenizer = train(["some text"], 258)
    content = json.loads(tokenizer.files["tokenizer.json"])
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    }
    files = {**tokenizer.files, "tokenizer.json": json.dumps(content).encode()}
    assert TextTokenizer(files).encode("some text").tolist() == tokenizer.encode("some text").tolist()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("tokenizer_config.json", "{", "cannot be loaded"),
        ("tokenizer_config.json", "{}", "has no end-of-document token"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "has no end-of-document token"),
    ],
)
def test_a_tokenizer_without_what_it_needs_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    train(["text"], 258).save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load(tmp_path)


def test_the_end_token_may_be_spelled_out_as_an_object_or_in_the_special_tokens_map(tmp_path: Path) -> None:
    train(["text"], 258).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    assert load(tmp_path).end_id == 0
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    assert load(tmp_path).end_id == 0


def test_scripts_beside_the_job_get_the_standard_librarys_tokenize() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'jobs')!r}); import inspect, linecache, tokenize; "
    code += "print(tokenize.__file__, tokenize.open, inspect.tokenize is linecache.tokenize is tokenize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout
    assert done.stdout.endswith(" True\n")


def test_tokenizing_imports_no_torch() -> None:
    code = "import sys, sparktrain.spark.tokenize; print({'torch', 'transformers'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
