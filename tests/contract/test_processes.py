"""Two processes of four devices each train as one process does."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("process_worker.py")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def results_of(path, processes):
    port = free_port()
    command = [sys.executable, str(WORKER), str(path), str(processes)]
    workers = [
        subprocess.Popen([*command, str(index), str(port)], stderr=subprocess.PIPE, text=True)
        for index in range(processes)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=180)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    with np.load(path) as data:
        return dict(data)


def test_two_processes_equal_one(tmp_path):
    single = results_of(tmp_path / "single.npz", processes=1)
    double = results_of(tmp_path / "double.npz", processes=2)
    assert single.keys() == double.keys()
    for name, expected in single.items():
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(double[name], expected, rtol=1e-9, err_msg=name)
