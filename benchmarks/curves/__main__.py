"""Loss over communicated bytes of every strategy: the same small Llama, batches and tokens, two gloo ranks of a thread.

    python benchmarks/curves --data TOKENS_DIR [--steps 300] [--tokens-per-step 2048] [--seeds 1 2] [--only adamw ...]
    python benchmarks/curves --table

TOKENS_DIR is what jobs/tokenize.py leaves (``english.py`` says how that of the committed figures was made). The
learning rate is tuned for each strategy: all of its rates over ``--tuning`` steps with the first seed, then the best of
them over ``--steps`` with every seed. A run that is finished is a line of RESULTS/curves.jsonl with all its settings,
and is not done again: a table grows over as many sittings as it takes. ``--until 17:30`` starts nothing later.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import table
import torch.multiprocessing as mp
from rank import train

ADAMW, SIGN, MOMENTUM = (1.5e-3, 3e-3, 6e-3), (5e-4, 1e-3, 2e-3), (7.5e-4, 1.5e-3, 3e-3)
_FIXED = {"kind": "diloco", "sync_every": 10}
# Strategy, ranks, and learning rates to try, or the entry whose best one it takes.
ENTRIES: dict[str, tuple[dict[str, Any], int, tuple[float, ...] | str]] = {
    "adamw": ({"kind": "adamw"}, 2, ADAMW),
    "alone": ({"kind": "adamw"}, 1, ADAMW),
    "diloco": ({"kind": "diloco"}, 2, ADAMW),
    "sparseloco": ({"kind": "sparseloco"}, 2, ADAMW),
    "distro": ({"kind": "distro"}, 2, SIGN),
    "diloco int8": ({"kind": "diloco", "compression": "int8"}, 2, "diloco"),
    "diloco int4": ({"kind": "diloco", "compression": "int4"}, 2, "diloco"),
    "diloco H=30 int4": ({"kind": "diloco", "sync_every": 30, "compression": "int4"}, 2, "diloco"),
    "distro, decay 0.95": ({"kind": "distro", "compression_decay": 0.95}, 2, SIGN),
    "distro, k=8, 1 bit": ({"kind": "distro", "compression_topk": 8, "values": "1bit"}, 2, "distro"),
    "diloco H=10, average": (_FIXED | {"outer": "average"}, 2, ADAMW),
    "diloco H=10, Nesterov 0.7/0.9": (_FIXED | {"outer": "sgd"}, 2, MOMENTUM),
    "torchft DiLoCo H=10": ({"kind": "torchft", "sync_every": 10}, 2, MOMENTUM),
    "torchft LocalSGD H=10": ({"kind": "torchft_local_sgd", "sync_every": 10}, 2, "diloco"),
}


class Bench:
    """Runs that were done, and those that are."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.file: Path = arguments.results / "curves.jsonl"
        self.done = {line["key"]: line for line in table.lines(self.file)}
        manifest = json.loads((arguments.data / "manifest.json").read_text())
        self.vocab_size = manifest["tokenizer"]["vocab_size"]
        self.tokens = hashlib.sha256(json.dumps(manifest["shards"], sort_keys=True).encode()).hexdigest()[:16]

    def run(self, name: str, lr: float, seed: int, steps: int) -> dict[str, Any] | None:
        """The line of a run, trained now if it is not there; None: there is no time for it."""
        strategy, world, _ = ENTRIES[name]
        settings = {
            "strategy": strategy,
            "world": world,
            "lr": lr,
            "seed": seed,
            "steps": steps,
            "tokens_per_step": self.arguments.tokens_per_step,
            "sequence_length": self.arguments.sequence_length,
            "warmup_steps": max(10, steps // 10),
            "eval_every": steps // 6 if steps == self.arguments.steps else steps,
            "model": llama(self.arguments.hidden_size, self.arguments.layers, self.vocab_size),
            "data": self.tokens,
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if key not in self.done:
            if self.arguments.until and datetime.datetime.now().time() >= self.arguments.until:
                return None
            with tempfile.TemporaryDirectory() as directory:
                output = Path(directory, "result")
                places = (str(self.arguments.data), str(Path(directory, "meeting")), str(output))
                # Forked, so that what takes seconds to import is there already.
                mp.start_processes(train, (world, settings, *places), nprocs=world, start_method="fork")
                result = json.loads(output.read_text())
            versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers")}
            # Defaults are not in the settings, and may change.
            commit = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
            line = {"key": key, "name": name, **settings, **versions, "commit": commit, **result}
            with self.file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            self.done[key] = line
            print(f"{name}, lr {lr}, seed {seed}, {steps} steps: {line['loss']:.4f}", flush=True)
        return self.done[key]

    def best(self, name: str) -> float | None:
        """The learning rate of an entry; None: there is no time to find it."""
        rates = ENTRIES[name][2]
        if self.arguments.lr:
            return float(self.arguments.lr)
        if isinstance(rates, str):
            return self.best(rates)
        tried = rates[-self.arguments.rates :]
        lines = [self.run(name, lr, self.arguments.seeds[0], self.arguments.tuning) for lr in tried]
        return min((line["loss"], line["lr"]) for line in lines if line)[1] if all(lines) else None


def llama(hidden_size: int, layers: int, vocab_size: int) -> dict[str, Any]:
    """192 wide with 4 layers and 2,048 tokens: 2.2 million parameters."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "use_cache": False,
        "vocab_size": vocab_size,
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tuning", type=int, default=100)
    parser.add_argument("--rates", type=int, default=3, help="try only so many of an entry's rates, the highest")
    parser.add_argument("--lr", type=float, help="tune nothing, take this")
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--until", type=datetime.time.fromisoformat)
    parser.add_argument("--table", action="store_true", help="train nothing, write tables and pictures")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    arguments.results.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        bench = Bench(arguments)
        for seed in arguments.seeds:
            for name in arguments.only:
                lr = bench.best(name)
                if lr is not None:
                    bench.run(name, lr, seed, arguments.steps)
    table.write(arguments.results)


if __name__ == "__main__":
    main()
