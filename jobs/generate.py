"""python jobs/generate.py --model RUN_DIR --prompt "def ": sample text from a run or a model directory."""

from pathlib import Path

from sparktrain import cli
from sparktrain.config import Section
from sparktrain.train.generate import generate


class GenerateJob(Section):
    """Sample text from a run or a model directory."""

    model: Path
    """Run directory, or any Hugging Face model directory with a tokenizer."""
    prompt: str
    """Text to go on from."""
    max_new_tokens: int = 128
    """Tokens to add."""
    temperature: float = 0.8
    """Sampling temperature; 0: always the likeliest token."""
    seed: int = 0
    """Seed of the sampling."""


def main(argv: list[str]) -> None:
    job = cli.parse(GenerateJob, argv)
    for piece in generate(job.model, job.prompt, job.max_new_tokens, job.temperature, seed=job.seed):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.main(main)
