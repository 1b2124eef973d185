"""Token windows by themselves: what crosses to a worker, and what a worker does about signals and its parent."""

import os
import pickle
import signal
import subprocess
import time

import launch
import numpy as np
import psutil

from megatron_vwn.data.windows import BlendedWindows, TokenWindows, WindowSource


def windows(folder, tokens, lengths, sample_index, pad=-1):
    """Samples of 4 tokens over a mapped file whose sequences lie in their order."""
    np.array(tokens, np.uint16).tofile(folder / "data.bin")
    offsets = 2 * np.cumsum([0, *lengths[:-1]])
    mapped = np.memmap(folder / "data.bin", np.uint16, "r")
    order = np.arange(len(lengths))
    samples = np.array(sample_index, np.int32)
    return TokenWindows(mapped, np.array(lengths, np.int32), offsets, order, samples, np.arange(len(samples)), 4, pad)


def test_a_sample_that_the_data_does_not_fill_is_padded(tmp_path):
    # Three sequences; the second sample begins in the second one and finds three tokens.
    read = windows(tmp_path, [5, 6, 7, 8, 9, 10, 11], [3, 2, 2], [[0, 0], [1, 1], [2, 1]])
    assert read[0].tolist() == [5, 6, 7, 8, 9]
    assert read[1].tolist() == [9, 10, 11, -1, -1]
    assert read[0].dtype == np.int32


def test_mapped_files_cross_to_a_worker_by_their_path(tmp_path):
    tokens = np.arange(60_000)
    read = windows(tmp_path, tokens, [60_000], [[0, 4 * place] for place in range(10)])
    np.save(tmp_path / "part.npy", np.zeros(9, np.int16))
    part_index = np.load(tmp_path / "part.npy", mmap_mode="r")
    source = WindowSource(BlendedWindows([read], part_index, np.arange(9)), range(1, 9, 3), 2)
    sent = pickle.dumps(source)
    assert len(sent) < 4000 < read.tokens.nbytes
    received = pickle.loads(sent)
    assert isinstance(received.windows.part_index, np.memmap)
    for number, first in enumerate((1, 4, 7)):
        batch = type("BatchInfo", (), {"iteration": number})
        expected = [list(range(4 * sample, 4 * sample + 5)) for sample in (first, first + 1)]
        assert [each.tolist() for each in received(batch)] == [each.tolist() for each in source(batch)] == expected


PARENT = """
import multiprocessing, pickle, signal, time
from megatron_vwn.data.windows import WindowSource
source = WindowSource(None, range(1), 1, [signal.SIGINT, signal.SIGTERM])
work = "import pickle, time; source = pickle.loads(sent); print('ready', flush=True); time.sleep(60)"
process = multiprocessing.get_context("spawn").Process(target=exec, args=(work, {"sent": pickle.dumps(source)}))
process.start()
print(process.pid, flush=True)
time.sleep(60)
"""


def ended(process):
    """Gone, or only waiting for an init process that may not collect orphans."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_worker_ignores_the_signals_of_its_parent_and_ends_with_it():
    parent = subprocess.Popen(launch.command(0, "-c", PARENT), stdout=subprocess.PIPE, text=True)
    try:
        worker = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
        time.sleep(0.2)
        assert not ended(worker)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 30
    while not ended(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
