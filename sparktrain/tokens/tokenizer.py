"""The tokenizer of a token directory: trained on a sample of its text, or brought along as a Hugging Face directory.

Kept as the files of that directory, name to content, so that driver and tasks pass it on without a file system.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparktrain.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1 + 1
"""Every byte, the end-of-document token, one merge."""

# A tokenizer's directory is often a model's: its weights stay where they are.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


class TextTokenizer:
    """Text to token ids, each document with its end-of-document token."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self._tokenizer: Any = Tokenizer.from_str(files["tokenizer.json"].decode())
        # A tokenizer.json may say to cut or pad texts to a model's length, which would lose text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<|endoftext|>" written out in a document is text, not its end.
        self._tokenizer.encode_special_tokens = True
        end = _end_of_document(files)
        self.end_id: int | None = None if end is None else self._tokenizer.token_to_id(end)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def sha256(self) -> str:
        """What the ids mean: equal for tokenizers that encode alike."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids, int64 ``[length]``; the last is the end-of-document token."""
        # One text a call stays on this thread: the parallelism is Spark's, and a thread pool per task would fight it.
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array([*ids, self.end_id], dtype=np.int64)

    def decode(self, ids: npt.NDArray[np.int64]) -> str:
        """The text of ``ids``, special tokens left out."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Write the Hugging Face directory."""
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


def train(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens: knows every text, and the same texts give the same one."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return TextTokenizer(
        {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}
    )


def load(directory: Path) -> TextTokenizer:
    """The tokenizer in ``directory``. Raises :class:`ConfigError` or :class:`DataError` where it cannot be used."""
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(
            f"tokenizer {directory} holds no tokenizer.json: give a Hugging Face directory with a fast tokenizer, or "
            "leave tokenizer out to train one"
        )
    files = {name: (directory / name).read_bytes() for name in _FILES if (directory / name).is_file()}
    try:
        tokenizer = TextTokenizer(files)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise DataError(f"tokenizer {directory} cannot be loaded: {error}; save it again") from error
    if tokenizer.end_id is None:
        raise DataError(
            f"tokenizer {directory} has no end-of-document token: set eos_token in its tokenizer_config.json to a "
            "token of its vocabulary"
        )
    return tokenizer


def _end_of_document(files: dict[str, bytes]) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json.loads(files.get(name, b"{}")).get("eos_token")
        if token is not None:
            return str(token["content"] if isinstance(token, dict) else token)
    return None
