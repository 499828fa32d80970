"""Sample text from a trained model: a run, a checkpoint, or any Hugging Face directory."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from pydantic import Field
from transformers import TextIteratorStreamer

from sparktrain import storage, trained
from sparktrain.config import Section
from sparktrain.config.place import Place
from sparktrain.errors import ConfigError, ModelError
from sparktrain.train import models
from sparktrain.train.pretrained import load_tokenizer

# Of a model that knows no limit.
_LONGEST = 2**20


class Generate(Section):
    """Sample text from a run, a checkpoint or a model directory."""

    model: Place
    """Run directory (of a run that is not finished: its newest checkpoint), checkpoint, or Hugging Face directory; with
    a tokenizer."""
    prompt: str = Field(min_length=1)
    """Text to go on from."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens to add, as far as the model's positions reach."""
    temperature: float = Field(0.8, ge=0, allow_inf_nan=False)
    """Sampling temperature; 0: always the likeliest token."""
    top_k: int = Field(50, ge=1)
    """Sample among the likeliest so many tokens."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the sampling."""


def generate(settings: Generate) -> Iterator[str]:
    """Pieces of text as they are sampled after the prompt, which comes first.

    Raises :class:`ModelError` where ``settings.model`` is none of these, or has no tokenizer.
    """
    path, directory = settings.model, trained.find(settings.model).directory
    if not (directory / "tokenizer.json").exists():
        raise ModelError(
            f"{path} holds no tokenizer: expected {directory / 'tokenizer.json'}; put the model's own there"
        )
    with storage.at_hand(directory, "rank-", "strategy.") as here:
        model, tokenizer = models.load(here), load_tokenizer(here)
    torch.manual_seed(settings.seed)
    streamer = TextIteratorStreamer(tokenizer)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
    inputs = tokenizer(settings.prompt, return_tensors="pt", return_token_type_ids=False)
    length, positions = inputs["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None) or _LONGEST
    if not 0 < length < positions:
        raise ConfigError(
            f"prompt has {length} tokens, the model {positions} positions: give a prompt of 1 to {positions - 1}"
        )
    room = positions - length
    options = {**inputs, **sampling, "streamer": streamer, "max_new_tokens": min(settings.max_new_tokens, room)}
    failures: list[Exception] = []

    def sample() -> None:
        try:
            model.generate(**options)
        except Exception as error:  # raised again where the text is awaited
            failures.append(error)
        finally:
            streamer.end()  # type: ignore[no-untyped-call]

    thread = Thread(target=sample, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise ModelError(f"{path} cannot be sampled from: {str(failures[0]).splitlines()[0]}") from failures[0]
