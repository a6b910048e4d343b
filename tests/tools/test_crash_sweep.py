"""A small crash sweep: killed, starved, damaged, a real training ends as the uninterrupted one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "crash_sweep.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_small_sweep_finds_no_violation(tmp_path):
    # In a process of its own, for it forks. The tool alone kills 220 times, and takes minutes.
    command = [sys.executable, str(TOOL), "--kills", "6", "--disks", "1", "--damages", "1"]
    # In memory where that can be: what is waited for is the disk, and no power fails here.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    result = subprocess.run(
        [*command, "--rows", "16"],
        capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": place},
    )  # fmt: skip
    told = result.stdout + result.stderr
    assert result.returncode == 0, told
    assert "6 kills, 0 violations" in result.stdout, told
    counts = {what: int(times) for times, what in re.findall(r"^ *(\d+)  (.+)$", told, re.M)}
    assert sum(times for what, times in counts.items() if what.startswith("files ")) == 1
    assert sum(times for what, times in counts.items() if what.startswith("control: ")) == 3
    full = [what for what in counts if what.startswith("full disks")]
    assert full or "full disk: skipped" in told
    equal = counts["runs compared with the uninterrupted one: equal bit for bit"]
    assert equal >= (3 if full else 2)
