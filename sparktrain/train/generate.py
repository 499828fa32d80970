"""Sample text from a trained model: a run directory or any Hugging Face directory."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from sparktrain.errors import ModelError


def generate(
    path: Path, prompt: str, max_new_tokens: int = 128, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Iterator[str]:
    """Pieces of text as they are sampled after ``prompt``, which comes first; greedy at ``temperature`` 0.

    Raises :class:`ModelError` where ``path`` holds no finished run and no model directory, or no tokenizer.
    """
    directory = path / "model" if (path / "model" / "config.json").exists() else path
    for needed, what in (("config.json", "no finished run and no model directory"), ("tokenizer.json", "no tokenizer")):
        if not (directory / needed).exists():
            raise ModelError(
                f"{path} holds {what}: expected {directory / needed}; give a finished run or a model directory"
            )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True).eval()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    streamer = TextIteratorStreamer(tokenizer)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    options = {**inputs, **sampling, "streamer": streamer, "max_new_tokens": min(max_new_tokens, room)}
    thread = Thread(target=model.generate, kwargs=options, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
