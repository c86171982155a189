"""Starting several processes, and the closed form over two of them on this machine."""

import socket
import subprocess
import sys

import pytest

from retex_jax import checkpoint, distributed, preemption

WORKER = """
import sys
import jax
import numpy as np
from retex_jax import ExpertSet, distributed, offsets, tree

address, own, out = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
assert distributed.start(address, 2, int(own)) == 2
assert jax.process_count() == 2 and len(jax.devices()) == 4

def model(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a/kernel": (6, 10), "b/kernel": (6, 10), "b/bias": (10,)}
    return tree.unflatten({k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()})

read = []
experts = ExpertSet.from_trees(model(0), [model(seed) for seed in range(1, 5)])
own_expert = ExpertSet.expert
ExpertSet.expert = lambda self, name, task: read.append(task) or own_expert(self, name, task)
mesh = jax.make_mesh((4,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))
state = offsets.fit_sharded(experts, mesh, rank=2)
assert sorted(set(read)) == [[0, 1], [2, 3]][int(own)], read
whole = offsets.gather(state)
ExpertSet.expert = own_expert
want = offsets.fit(experts, rank=2, precision="float64")
assert abs(whole.report.residual / want.report.residual - 1) < 1e-6
for task in range(4):
    for one, other in zip(
        jax.tree.leaves(offsets.recover(whole, task)), jax.tree.leaves(offsets.recover(want, task))
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
print("equal", own)
"""


PREEMPTED = """
import os
import signal
import sys
import jax
import numpy as np
from retex_jax import ExpertSet, checkpoint, distributed, offsets, preemption

address, own, out = sys.argv[1:]
assert distributed.start(address, 2, int(own)) == 2
for asked, answer in (((), False), ((1,), True), ((0, 1), True)):
    assert distributed.any_process(int(own) in asked) is answer
experts = ExpertSet.from_trees(
    {"kernel": np.zeros((6, 8), np.float32)},
    [{"kernel": np.float32(np.random.default_rng(seed).normal(size=(6, 8)))} for seed in range(3)],
)
mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

def called_away(done, steps, loss):
    if done == 6 and own == "1":
        os.kill(os.getpid(), signal.SIGTERM)

try:
    with preemption.Guard() as guard:
        offsets.fit(
            experts, rank=2, solver="adam", steps=20, warmup_steps=1, chunk_steps=2, checkpoint_every=20,
            checkpoints=checkpoint.Checkpointer(out), mesh=mesh, progress=called_away,
            preempted=lambda: distributed.any_process(guard.is_called),
        )
except preemption.Preempted as error:
    print(guard.is_called, error.message)
    raise
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two(code, folder):
    """Two processes of one run: exit code, output and errors of each."""
    address = f"127.0.0.1:{free_port()}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(own), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in range(2)
    ]
    told = [worker.communicate(timeout=240) for worker in workers]
    return [(worker.returncode, *texts) for worker, texts in zip(workers, told, strict=True)]


def test_two_processes_give_what_one_gives(tmp_path):
    for own, (code, out, err) in enumerate(run_two(WORKER, tmp_path)):
        assert code == 0, err[-3000:]
        assert f"equal {own}" in out


def test_a_signal_to_one_process_lets_both_save_the_same_step_and_leave(tmp_path):
    for own, (code, out, err) in enumerate(run_two(PREEMPTED, tmp_path)):
        assert code == preemption.EXIT_CODE, err[-3000:]
        assert f"{own == 1} the Adam fit is saved at step 6 of 20" in out
    assert checkpoint.Checkpointer(tmp_path).steps() == [6]


def test_one_process_asks_nobody(monkeypatch):
    gather = "jax.experimental.multihost_utils.process_allgather"
    monkeypatch.setattr(gather, lambda *_: pytest.fail("asked"))
    assert [distributed.any_process(flag) for flag in (False, True)] == [False, True]


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", lambda *_: pytest.fail("started"))
    assert distributed.start(environment={}) == 1
    assert distributed.start(environment={"SLURM_NTASKS": "1"}) == 1
    assert distributed.start("localhost:1", 1, 0) == 1


def test_what_is_found(monkeypatch):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args: calls.append(args))
    variables = {"RETEX_COORDINATOR": "a:1", "RETEX_NUM_PROCESSES": "3", "RETEX_PROCESS_ID": "2"}
    assert distributed.start(environment=variables) == 3
    assert distributed.start("b:2", 4, 1, environment=variables) == 4
    distributed.start(environment={"OMPI_COMM_WORLD_SIZE": "2"})
    assert calls == [("a:1", 3, 2), ("b:2", 4, 1), ()]


def test_wrong_settings_are_told_at_once():
    with pytest.raises(ValueError, match="num_processes: got None") as error:
        distributed.start("a:1", environment={})
    assert "process_id: got None" in str(error.value)
    with pytest.raises(ValueError, match=r"coordinator: got 'a', expected HOST:PORT") as error:
        distributed.start("a", 2, -1)
    assert "process_id: got -1" in str(error.value)
    with pytest.raises(ValueError, match="process_id: got 2, expected 0 to 1"):
        distributed.start("a:1", 2, 2)
