"""Training killed at random moments, and started again, ends bit for bit as if nobody had killed it."""

import json
import multiprocessing
import random
import sys
import time
import warnings

import pytest
from starting import digests, flags_of, start, weights

KILLS = 20
# Killed while libraries load, nothing of ours is lost: they are loaded once, and each run is forked from there.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["starting", "lavender_min.tuning.tune", "lavender_min.hosts.mllama"])


def trained(folder):
    """What a run leaves, but for the clock."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return weights(folder), [entry for entry in history if "loss" in entry]


def quiet(argv):
    sys.stdout = sys.stderr = open("/dev/null", "w")
    warnings.simplefilter("ignore")
    sys.exit(start(argv))


@pytest.mark.slow
def test_twenty_kills_change_no_bit(vlm_folder, store_folder, tmp_path, capsys):
    def run(folder):
        process = SERVER.Process(target=quiet, args=[flags_of(vlm_folder, store_folder, folder, "--save_steps", "1")])
        process.start()
        return process

    first = time.monotonic()
    for name in ("warm", "unbroken"):
        first = time.monotonic()
        process = run(tmp_path / name)
        process.join()
        assert process.exitcode == 0
    whole, lasts = trained(tmp_path / "unbroken"), time.monotonic() - first

    moment, killed, ended = random.Random(0), 0, 0
    while killed < KILLS:
        folder = tmp_path / f"run-{ended}"
        process = run(folder)
        process.join(moment.uniform(0, lasts))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
            # The last one is let through to its end.
            if killed == KILLS:
                process = run(folder)
                process.join()
        if process.exitcode == 0:
            assert trained(folder) == whole
            before = digests(folder)
            again = run(folder)
            again.join()
            assert again.exitcode == 0 and digests(folder) == before
            ended += 1
    with capsys.disabled():
        print(f"{killed} kills in {ended} runs of {lasts:.1f} s")
