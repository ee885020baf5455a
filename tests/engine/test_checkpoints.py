import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fewshot_engine import checkpoints, recipes
from fewshot_engine.errors import CheckpointError

WRITER = """
import sys, numpy as np
from pathlib import Path
from fewshot_engine import checkpoints
number = int(sys.argv[2])
while True:
    number += 1
    tensors = {"a": np.full(200_000, number, dtype=np.float32), "b": np.full(3, number)}
    checkpoints.save(Path(sys.argv[1]), tensors, {"number": number})
    print(number, flush=True)
"""


def test_what_is_saved_comes_back(tmp_path):
    tensors = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.array(7, dtype=np.int64),
        "state": np.frombuffer(b"abc", dtype=np.uint8),
    }
    checkpoints.save(tmp_path / "new/run.safetensors", tensors, {"epoch": 3, "name": "Blåbær"})
    loaded, meta = checkpoints.load(tmp_path / "new/run.safetensors")
    assert meta == {"epoch": 3, "name": "Blåbær"}
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert np.array_equal(loaded[name], tensor)
    assert os.listdir(tmp_path / "new") == ["run.safetensors"]


def test_killed_writers_leave_a_readable_checkpoint(tmp_path):
    path = tmp_path / "run.safetensors"
    rng, last = random.Random(0), 0
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(last)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        told = int(writer.stdout.readline())
        time.sleep(rng.uniform(0, 0.02))
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait()
        told = int(rest[-1]) if rest else told
        tensors, meta = checkpoints.load(path)
        assert meta["number"] >= told > last
        assert (tensors["a"] == meta["number"]).all()
        last = meta["number"]


def test_every_line_of_a_save_may_be_the_last(tmp_path):
    """A process that dies before any line of the module leaves the old checkpoint or the new one."""
    code = """
import os, sys, numpy as np
from pathlib import Path
from fewshot_engine import checkpoints
path, left = Path(sys.argv[1]), int(sys.argv[2])
def trace(frame, event, argument):
    global left
    if frame.f_code.co_filename != checkpoints.__file__:
        return None
    if event == "line":
        left -= 1
        if left < 0:
            os._exit(9)
    return trace
sys.settrace(trace)
checkpoints.save(path, {"a": np.ones(4)}, {"version": "new"})
"""
    for line in range(0, 60, 5):
        path = tmp_path / f"{line}.safetensors"
        checkpoints.save(path, {"a": np.zeros(4)}, {"version": "old"})
        done = subprocess.run([sys.executable, "-c", code, str(path), str(line)], check=False).returncode
        tensors, meta = checkpoints.load(path)
        assert tensors["a"].sum() == (4 if meta["version"] == "new" else 0)
        if done == 0:
            assert meta["version"] == "new"
            return
        assert done == 9
    pytest.fail("a save has more lines than were tried")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 64, b"\xff" * 4096])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.safetensors"):
        checkpoints.load(path)


def test_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    checkpoints.save(path, {"a": np.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        checkpoints.load(path)
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of this engine"):
        checkpoints.load(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoints.load(tmp_path / "absent")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        checkpoints.load(path)
    assert not (tmp_path / "executed").exists()


def test_nan_in_a_description_is_refused_and_the_old_checkpoint_stays(tmp_path):
    path = tmp_path / "run.safetensors"
    checkpoints.save(path, {}, {"loss": 1.0})
    with pytest.raises(CheckpointError, match="no JSON"):
        checkpoints.save(path, {}, {"loss": float("nan")})
    assert checkpoints.load(path)[1] == {"loss": 1.0}


def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    checkpoints.save(path, {}, {"version": "old"})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(path, {}, {"version": "new"})
    assert checkpoints.load(path)[1] == {"version": "old"}
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    old, young = tmp_path / ".run.safetensors.aa.tmp", tmp_path / ".run.safetensors.bb.tmp"
    for leftover in (old, young):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    checkpoints.save(tmp_path / "run.safetensors", {}, {})
    assert not old.exists()
    assert young.exists()


def test_saving_a_model_again_replaces_it(tmp_path):
    for number in (1, 2):
        recipes.save_model(tmp_path / "model", {"w": np.ones(number)}, {"kind": "full", "number": number})
    tensors, card = recipes.load_model(tmp_path / "model")
    assert (len(tensors["w"]), card["number"]) == (2, 2)
    assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(CheckpointError, match="no recipe"):
        recipes.load_recipe(tmp_path / "model")
