"""Eight devices that share one core: XLA ends a process whose devices wait for each other."""

import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("one_core_worker.py")


def test_host_loops_do_not_starve_devices_of_threads():
    worker = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(WORKER)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr
