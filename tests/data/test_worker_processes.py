"""Worker processes end with the process that started them, and local files are looked up nowhere."""

import ctypes
import os
import signal
import socket
import sys
import time

import datasets
import psutil
import pytest
from datasets import Dataset

from rlhf.data import load_data
from rlhf.data.worker_processes import workers_end_with_this_process


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # where nobody asks for its status
    except psutil.NoSuchProcess:
        return True


def sleep(row):
    time.sleep(60)
    return row


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_workers_of_a_killed_process_end():
    starting = os.fork()
    if not starting:
        with workers_end_with_this_process():
            Dataset.from_dict({"a": [1, 2]}).map(sleep, num_proc=2)
        os._exit(0)
    workers = psutil.Process(starting).children
    try:
        wait_for(lambda: len(workers()) >= 3)  # two, and the one that holds their queue
        children = workers()
        os.kill(starting, signal.SIGKILL)
        wait_for(lambda: all(map(has_ended, children)))
    finally:
        os.waitpid(starting, 0)
        [child.kill() for child in children if not has_ended(child)]


def death_signal_of_a_child():
    child = os.fork()
    if not child:
        number = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
        os._exit(number.value)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_only_workers_get_the_signal():
    with workers_end_with_this_process():
        assert death_signal_of_a_child() == signal.SIGKILL
    assert death_signal_of_a_child() == 0


@pytest.mark.parametrize("kind", ["file", "folder", "pattern", "text"])
def test_local_rows_are_looked_up_nowhere(kind, tmp_path, monkeypatch):
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "rows.jsonl").write_text('{"text": "a"}')
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network")

    # As on a machine that is online.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    places = {"file": "rows.parquet", "folder": "", "pattern": "*.parquet", "text": "text"}
    assert load_data(str(tmp_path / places[kind]))["text"] == ["a"]
    assert asked == [] and datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
