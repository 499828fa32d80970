"""What a user sees while ranks train, where standard error ends in a terminal or elsewhere."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A driver whose ranks are this script: real pulses, a rank's line by standard error, as TorchDistributor hands it on.
DRIVER = """
import sys, time
from pathlib import Path
from sparktrain import pulse
from sparktrain.results import StepRecord
from sparktrain.rundir import RunDir
from sparktrain.spark import progress

directory = RunDir(sys.argv[1])
directory.new_generation()
told = []
with progress.shown(directory, 1, 2, 40, told.append):
    with pulse.beating(directory.pulse(1, 0), 0) as first, pulse.beating(directory.pulse(1, 1), 1) as second:
        for step in range(40):
            for rank, records in enumerate((first, second)):
                work = 0.02 * (1 + rank)
                records.append(StepRecord(step, 8.0, 4, 0.1, 1.0, 0.05, 0, work, 0.05 - work, 2_500_000, 0, 0))
            while step == 10 and not told:
                time.sleep(0.01)
            if step == 30:
                print("[rank 0 host] step 30/40  loss 2.0000", file=sys.stderr, flush=True)
print(sum(stretch.steps for stretch in told), "steps were told")
"""
LAST = (
    r"step 40/40{bar} 00:00 left, loss 2\.0000, \d+ tokens/s, 2\.5MB a step, 2 ranks, compute \d+%, communication \d+%"
)


def test_a_log_gets_lines_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["progress:", "[rank", "progress:"]
    assert re.fullmatch(
        "progress: " + LAST.format(bar=",") + r", data 0%, slowest rank 1 on \S+ \(2\.00 x .*", lines[-1]
    )
    assert done.stdout == "40 steps were told\n"


@pytest.mark.parametrize("columns", [160, 60])
def test_a_terminal_gets_one_live_line_below_the_ranks_lines(tmp_path: Path, columns: int) -> None:
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            if not (piece := os.read(ours, 4096)):
                break
        except OSError:  # how a terminal says that its other end is closed
            break
        seen += piece
    os.close(ours)
    assert child.communicate()[0] == b"40 steps were told\n"
    assert child.returncode == 0
    # On a terminal, \r goes back to the line's start, \n to the next line: what is left to be read of each line.
    screen = [[part for part in line.split("\r") if part.strip()][-1:] for line in seen.decode().split("\n")]
    lines = [line[0].rstrip() for line in screen if line]
    assert lines[0] == "[rank 0 host] step 30/40  loss 2.0000"
    assert len(lines) == 2
    assert len(lines[1]) <= columns
    assert re.match(LAST.format(bar=r" \|█{12}\|")[: None if columns == 160 else 50], lines[1])
