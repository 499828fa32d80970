"""How long the loop waits for data from a server that sends a given multiple of what training needs.

    python benchmarks/waiting.py [--steps 25] [--multiples 0.5 2]

The batches of ``benchmarks/loop.py``, and a smaller model. First the loop trains on local shards, which tells the rate
it needs; then from an HTTP server of another process, each of whose answers takes 20 ms to begin, and which sends no
more than that rate times the multiple over all connections. Waiting is ``data_seconds`` of the loop's own records; the
first 3 steps, in which reading ahead begins, are left out. At half the rate half of the time must be waiting: that it
is, shows that waiting would be seen.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from loop import BATCH, LENGTH, SIZES, prepare, ready

from sparktrain import plan
from sparktrain.results import StepRecord
from sparktrain.rundir import RunDir
from sparktrain.train import loop, models
from sparktrain.train.strategies import STRATEGIES
from sparktrain.train.world import World, start_world

_FIRST, _PIECE, _LATENCY = 3, 256, 0.02
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def serve(directory: str, rate: float, pipe: Any) -> None:
    """Files of ``directory`` by byte ranges, ``rate`` bytes a second in all."""
    lock, free = threading.Lock(), [time.monotonic()]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            file = Path(directory) / Path(self.path).name
            if not file.exists():
                self.send_error(404)
                return
            body, asked = file.read_bytes(), self.headers["Range"].removeprefix("bytes=").split("-")
            first, last = int(asked[0]), min(int(asked[1]), len(body) - 1)
            time.sleep(_LATENCY)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            for begin in range(first, last + 1, _PIECE):
                piece = body[begin : min(begin + _PIECE, last + 1)]
                with lock:
                    free[0] = max(free[0], time.monotonic()) + len(piece) / rate
                    until = free[0]
                time.sleep(max(0.0, until - time.monotonic()))
                self.wfile.write(piece)

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients hang up when they are done."""

    with Server(("127.0.0.1", 0), Handler) as server:
        pipe.send(server.server_address[1])
        server.serve_forever()


def train(run: RunDir, config: Any, spec: plan.PlanSpec, world: World) -> list[StepRecord]:
    model = models.build(config, world)
    build = STRATEGIES["adamw"].build
    strategy = build(dict(model.named_parameters()), config.strategy, config.optimizer, config.train.steps)
    return list(loop._steps(ready(run, config, spec, world, model, strategy)))[_FIRST:]


def say(where: str, records: list[StepRecord]) -> None:
    waited = [record.data_seconds for record in records]
    print(
        f"{where}: {100 * sum(waited) / sum(r.seconds for r in records):.2f} % of the time is waiting; "
        f"median {1000 * statistics.median(waited):.2f} ms, longest {1000 * max(waited):.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--multiples", type=float, nargs="+", default=[0.5, 2.0])
    options = parser.parse_args()
    steps = options.steps
    with tempfile.TemporaryDirectory() as directory, start_world(threads=1, timeout_seconds=60) as world:
        path = Path(directory)
        run, config, spec = prepare(path, steps)
        config = config.model_copy(update={"model": config.model.model_copy(update={"sizes": SIZES | _SMALL})})
        records = train(run, config, spec, world)
        seconds = statistics.median(record.seconds - record.data_seconds for record in records)
        rate = BATCH * 2 * (LENGTH + 1) / seconds
        print(f"a step takes {1000 * seconds:.1f} ms and needs {BATCH} sequences: {rate / 1000:,.1f} kB/s")
        say("local shards", records)
        for multiple in options.multiples:
            ours, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("spawn")
            server = context.Process(target=serve, args=(directory, multiple * rate, theirs), daemon=True)
            server.start()
            port = ours.recv()
            far = tuple(replace(s, path=f"http://127.0.0.1:{port}/{Path(s.path).name}") for s in spec.shards)
            there, other = replace(spec, shards=far), RunDir(path / f"run-{multiple}")
            other.plan.mkdir(parents=True)
            rows = [row._asdict() for row in plan.rows(there, 0, there.num_positions)]
            pq.write_table(pa.Table.from_pylist(rows), other.plan / "part-0.parquet")
            records = train(other, config, there, world)
            server.terminate()
            server.join()
            say(f"a server of {multiple} times that", records)


if __name__ == "__main__":
    main()
