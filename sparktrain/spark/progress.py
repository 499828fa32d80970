"""What a user sees of a run: one live line in a terminal, bar and plot in a notebook, a line at times in a log file.

It is made of the ranks' pulses, which the driver reads once a second. Ranks' own lines go on above a live line.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm as bar_here
from tqdm.contrib import DummyTqdmFile
from tqdm.notebook import tqdm_notebook
from tqdm.std import tqdm as text_bar

from sparktrain import pulse
from sparktrain.beside import beside
from sparktrain.errors import ConfigError
from sparktrain.pulse import Stretch
from sparktrain.rundir import RunDir

_SECONDS_BETWEEN_LINES = 30.0
_LINE = "step {n_fmt}/{total_fmt} |{bar:12}| {remaining} left{postfix}"


@contextlib.contextmanager
def shown(
    directory: RunDir, generation: int, ranks: int, steps: int, tell: Callable[[Stretch], None]
) -> Iterator[None]:
    """Show how far attempt ``generation`` is while inside, and ``tell`` every stretch of it."""
    with _display(steps) as show:

        def watch(over: threading.Event) -> None:
            seen: dict[int, pulse.Pulse] = {}
            last = False
            while not last:
                last = over.wait(pulse.SECONDS)
                found = {rank: pulse.read(directory.pulse(generation, rank)) for rank in range(ranks)}
                now = seen | {rank: beat for rank, beat in found.items() if beat is not None}
                if stretch := pulse.between(seen, now):
                    seen = now
                    show(stretch)
                    tell(stretch)

        with beside("progress", watch):
            yield


@contextlib.contextmanager
def _display(steps: int) -> Iterator[Callable[[Stretch], None]]:
    """Shows stretches where this process's standard error ends: a notebook, a terminal, or anywhere else."""
    columns = _columns()
    if issubclass(bar_here, tqdm_notebook):
        with bar_here(total=steps, bar_format=_LINE.replace("{bar:12}", "{bar}")) as bar, _plotter(steps) as plot:
            move = _mover(bar)

            def show(stretch: Stretch) -> None:
                move(stretch)
                plot(stretch)

            yield show
    elif columns:
        # Ranks' lines, which come by standard error, are written above the live line.
        real = sys.stderr
        with (
            text_bar(total=steps, bar_format=_LINE, ncols=columns, file=real) as bar,
            contextlib.redirect_stderr(DummyTqdmFile(real)),
        ):
            yield _mover(bar)
    else:
        yield from _lines(steps)


@contextlib.contextmanager
def _plotter(steps: int) -> Iterator[Callable[[Stretch], None]]:
    """Draws stretches below a notebook's bar, where there is matplotlib."""
    try:
        from sparktrain.report.live import LiveLoss
    except ConfigError:
        yield lambda stretch: None
        return
    live = LiveLoss(steps)
    try:
        yield lambda stretch: live.add(stretch.step, stretch.loss)
    finally:
        with contextlib.suppress(Exception):  # a picture that cannot be shown ends no run
            live.draw()


def _lines(steps: int) -> Iterator[Callable[[Stretch], None]]:
    """The first stretch, one every half minute, and the last."""
    with (
        open(os.devnull, "w") as nowhere,
        text_bar(total=steps, bar_format=_LINE.replace(" |{bar:12}|", ","), file=nowhere) as bar,
    ):
        move, said, last = _mover(bar), [0.0], [0]

        def say() -> None:
            print(f"progress: {bar}", file=sys.stderr, flush=True)
            said[0], last[0] = time.monotonic(), bar.n

        def show(stretch: Stretch) -> None:
            move(stretch)
            if not last[0] or time.monotonic() - said[0] >= _SECONDS_BETWEEN_LINES:
                say()

        try:
            yield show
        finally:
            if bar.n != last[0]:
                say()


def _mover(bar: Any) -> Callable[[Stretch], None]:
    """Moves ``bar``, whose clock starts with the first stretch: what comes before, starting ranks, is no step."""
    started = False

    def move(stretch: Stretch) -> None:
        nonlocal started
        bar.set_postfix_str(str(stretch), refresh=False)
        if not started:
            started = True
            bar.reset()
            bar.initial = bar.n = bar.last_print_n = stretch.step
            bar.refresh()
        else:
            bar.update(stretch.step - bar.n)

    return move


def _columns() -> int | None:
    """Width of the terminal that standard error ends in; None where it ends elsewhere. Under spark-submit, which hands
    its driver's output on by a pipe, what counts is where spark-submit's own output ends."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            return os.get_terminal_size(sys.stderr.fileno()).columns
        out = f"/proc/{os.getppid()}/fd/1"
        if "PYSPARK_GATEWAY_PORT" in os.environ and os.readlink(out).startswith(("/dev/pts/", "/dev/tty")):
            terminal = os.open(out, os.O_RDONLY | os.O_NOCTTY)
            try:
                return os.get_terminal_size(terminal).columns
            finally:
                os.close(terminal)
    return None
