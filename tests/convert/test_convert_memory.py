"""Converting a file takes the memory of the result and one leaf, not of two models."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

MB = 1 << 20
LEAVES, SIDE = 15, 1600  # 15 kernels of 10 MB as float16, which become 20 MB: 150 MB and 300 MB

CHILD = """
import json, re, sys
import jax, numpy as np
from retex_jax import tree
from retex_jax.convert import engine
from retex_jax.snapshot.folder import Snapshot

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

def sampled(function):
    # The peak, as a thread sees it every millisecond.
    import threading, time
    peak, done = [anonymous()], threading.Event()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    result = function()
    done.set()
    thread.join()
    return result, max(peak[0], anonymous())

path, placed, leaves, side = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), int(sys.argv[4])
rule = engine.Rule("w.{i}", ("q_{i}", "k_{i}"), engine.split(2, 0, engine.TRANSPOSE))
table = engine.Table("big", (rule,))
spec = jax.ShapeDtypeStruct((2 * side, side // 2), np.float32)
expected = {f"{name}_{i}": spec for i in range(leaves) for name in "qk"}
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if placed else None
jax.block_until_ready(jax.device_put(np.zeros(3), sharding))
snapshot = Snapshot(path)
before = anonymous()
params, peak = sampled(lambda: engine.to_flax(snapshot, table, expected, sharding))
print(json.dumps({"before": before, "after": anonymous(), "peak": peak,
                  "result": tree.param_bytes(params), "sum": float(params["q_0"][3, 5])}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("placed", [False, True])
def test_peak_memory(tmp_path, placed):
    path = tmp_path / "big.safetensors"
    kernel = np.arange(SIDE, dtype=np.float16)[:, None] + np.zeros(2 * SIDE, np.float16)
    safetensors.numpy.save_file({f"w.{i}": kernel for i in range(LEAVES)}, path)
    arguments = [str(path), str(placed), str(LEAVES), str(SIDE)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True
    )
    got = json.loads(child.stdout)
    assert got["sum"] == 5 and got["result"] == LEAVES * SIDE * SIDE * 2 * 4
    largest = got["result"] // LEAVES // 2
    assert got["peak"] - got["before"] > 0.9 * got["result"]  # or the measurement sees nothing
    assert got["peak"] - got["before"] <= got["result"] + largest + 64 * MB
