import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest

from retex_jax import logging
from retex_jax.logging import progress_bar


def _rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _steps(workdir, phase):
    return [row["step"] for row in _rows(workdir) if row["phase"] == phase]


def test_rows_of_all_kinds_of_scalars(tmp_path):
    writer = logging.MetricWriter(tmp_path / "new")
    metrics = {"loss": jnp.asarray(0.5), "n": np.int64(3), "acc": 0.25, "one": np.ones(1)}
    writer.write(7, metrics, phase="fit")
    writer.write(8, {"loss": float("nan")}, phase="fit")
    writer.close()
    first, second = _rows(tmp_path / "new")
    assert first.pop("time") > 1e9
    assert first == {"phase": "fit", "step": 7, "loss": 0.5, "n": 3, "acc": 0.25, "one": 1.0}
    assert second["loss"] is None
    with pytest.raises(ValueError, match="'loss' is"):
        writer.write(9, {"loss": np.ones(2)}, phase="fit")
    with pytest.raises(ValueError, match="'step' is the name of a column"):
        writer.write(9, {"step": 1}, phase="fit")
    assert len(_rows(tmp_path / "new")) == 2


def test_resume_drops_the_rows_that_run_again(tmp_path):
    writer = logging.MetricWriter(tmp_path)
    for step in range(5):
        writer.write(step, {"loss": float(step)}, phase="a")
        writer.write(step, {"loss": float(step)}, phase="b")
    writer.close()
    resumed = logging.MetricWriter(tmp_path)
    assert _steps(tmp_path, "a") == [0, 1, 2, 3, 4]
    resumed.resume(3, phase="a")
    resumed.write(3, {"loss": 30.0}, phase="a")
    assert _steps(tmp_path, "a") == [0, 1, 2, 3]
    assert _steps(tmp_path, "b") == [0, 1, 2, 3, 4]
    assert [row["loss"] for row in _rows(tmp_path) if row["phase"] == "a"] == [0, 1, 2, 30]
    resumed.resume(0, phase="b")
    assert _steps(tmp_path, "b") == []


@pytest.mark.parametrize("line", ["[" * 100_000, '{"phase": "a", "step": "2"}', "[1]", "{}", "x"])
def test_damaged_lines_are_removed(tmp_path, line):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write('{"phase": "a", "step": 1}\n' + line + '\n{"phase": "a", "step": 3}\n')
    logging.MetricWriter(tmp_path).resume(3, phase="a")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"phase": "a", "step": 1}\n'


def test_half_a_line_left_by_a_kill_is_removed(tmp_path):
    logging.MetricWriter(tmp_path).write(1, {"loss": 1.0}, phase="a")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"phase": "a", "step": 2, "lo\xc3')
    writer = logging.MetricWriter(tmp_path)
    writer.write(2, {"loss": 2.0}, phase="a")
    assert _steps(tmp_path, "a") == [1, 2]


def test_tensorboard_and_wandb(tmp_path, monkeypatch):
    calls = []
    board = types.SimpleNamespace(
        add_scalar=lambda *args: calls.append(args), close=lambda: calls.append("closed")
    )
    run = types.SimpleNamespace(log=calls.append, finish=lambda: calls.append("finished"))
    fake_board = types.SimpleNamespace(SummaryWriter=lambda path: calls.append(path) or board)
    fake_wandb = types.SimpleNamespace(init=lambda **kw: calls.append(kw) or run)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake_board)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb)
    writer = logging.MetricWriter(tmp_path, tensorboard=True, wandb=True)
    writer.write(2, {"loss": np.float32(0.5)}, phase="a/b")
    writer.close()
    assert calls == [
        str(tmp_path / "tensorboard"),
        {"project": "retex_jax", "dir": str(tmp_path)},
        ("a/b/loss", 0.5, 2),
        {"a/b/loss": 0.5, "a/b/step": 2},
        "closed",
        "finished",
    ]
    assert _steps(tmp_path, "a/b") == [2]


@pytest.mark.parametrize(("module", "extra"), [("tensorboardX", "tensorboard"), ("wandb", "wandb")])
def test_missing_extras(tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{extra}=True needs {module}: pip install 'retex_jax"):
        logging.MetricWriter(tmp_path / "new", **{extra: True})  # type: ignore
    assert not (tmp_path / "new").exists()


def test_other_processes_are_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("retex_jax.logging.terminal.is_lead", lambda: False)
    writer = logging.MetricWriter(tmp_path / "new", tensorboard=True)
    writer.write(1, {"loss": 1.0}, phase="a")
    writer.resume(0, phase="a")
    writer.close()
    with logging.WorkdirLock(tmp_path / "new"), logging.progress(2, "loop") as shown:
        shown.update(1, loss=1.0)
    logging.info("hello")
    logging.warning("hello")
    logging.table("title", ["a"], [[1]])
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr() == ("", "")


def test_messages_keep_brackets_and_long_lines(capsys):
    text = "shape [2, 3] [bold]" + 50 * " word"
    logging.info(text)
    logging.warning("rank [/x] is large")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [text, "warning: rank [/x] is large"]


def test_piped_table_is_ascii_and_aligned(capsys):
    rows = [["mnist [5k]", 0.98765, None], ["animals", np.float32(0.5), 12]]
    logging.table("Accuracy", ["task", "accuracy", "n"], rows)
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out
    cells = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")]
    assert cells[1] == [" mnist [5k] ", "    0.988 ", "  - "]
    assert cells[2] == [" animals    ", "    0.500 ", " 12 "]
    with pytest.raises(ValueError, match=r"rows: \[1\]"):
        logging.table("t", ["a", "b"], [[1, 2], [1]])


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    fake = types.SimpleNamespace(monotonic=lambda: now.seconds)
    monkeypatch.setattr(progress_bar, "time", fake)
    return now


def test_piped_progress_speaks_every_ten_seconds(capsys, clock):
    with logging.progress(100, "fit [a]") as shown:
        for step in range(1, 101):
            shown.update(step, loss=jnp.asarray(1 / step))
            clock.seconds += 0.25
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "fit [a]: 41%, 41/100, 4/s, 15 s left, loss 0.024",
        "fit [a]: 81%, 81/100, 4/s, 5 s left, loss 0.012",
        "fit [a]: 100/100 done in 25 s",
    ]


def test_a_single_step_is_done_where_its_block_ends(capsys, clock):
    with logging.progress(1, "probe"):
        clock.seconds += 5
    assert capsys.readouterr().err.splitlines() == ["probe: 1/1 done in 5 s"]


def test_rate_ignores_the_steps_before_a_resume(capsys, clock):
    with logging.progress(1000, "fit") as shown:
        shown.update(900)
        clock.seconds += 20
        shown.update(910)
    assert capsys.readouterr().err.splitlines()[0] == "fit: 91%, 910/1000, 0.5/s, 3:00 min left"


def test_short_or_failed_loops_end_silently(capsys, clock):
    with logging.progress(0, "none"):
        pass
    with pytest.raises(KeyError), logging.progress(3, "fails") as shown:
        clock.seconds += 5
        shown.update(1)
        raise KeyError
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="total: got -1"), logging.progress(-1, "x"):
        pass


def test_metrics_are_read_only_when_shown(clock, capsys):
    class Unread:
        def __str__(self):
            raise AssertionError("read")

    with logging.progress(10, "fit") as shown:
        shown.update(1, loss=Unread())
        shown.update(2, loss=Unread())


def test_terminal_shows_a_bar():
    code = """
        import time
        from retex_jax import logging
        with logging.progress(20, "fit [a]") as shown:
            for step in range(20):
                time.sleep(0.03)
                shown.update(step + 1, loss=0.5)
                if step == 10:
                    logging.info("in between")
        print("done")
    """
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.Popen(
        command, stderr=follower, stdout=subprocess.PIPE, stdin=follower, env=environment
    )
    os.close(follower)
    shown = io.BytesIO()
    try:
        while chunk := os.read(leader, 4096):
            shown.write(chunk)
    except OSError:  # the terminal's other end is closed
        pass
    os.close(leader)
    out, _ = run.communicate(timeout=60)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue().decode())
    assert run.returncode == 0 and out == b"done\n"
    assert re.search(r"fit \[a\] .*100% 20/20, [\d.]+/s, 0 s left, loss 0.500", text)
    assert "in between" in text


_HOLD = """
    import sys
    from retex_jax.logging import WorkdirLock
    with WorkdirLock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
"""


def test_two_processes_on_one_workdir(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(_HOLD), tmp_path / "run"]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1 and second.stdout == ""
        last = second.stderr.strip().splitlines()[-1]
        assert re.search(rf"workdir .*run is in use by another run .*\"pid\": {first.pid}\b", last)
        with pytest.raises(RuntimeError, match="in use"), logging.WorkdirLock(tmp_path / "run"):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with logging.WorkdirLock(tmp_path / "run"):  # the lock went with its holder
        pass


def test_lock_is_released_and_exclusive_within_a_process(tmp_path):
    for _ in range(2):
        with logging.WorkdirLock(tmp_path):
            with pytest.raises(RuntimeError, match="in use"), logging.WorkdirLock(tmp_path):
                pass
            with pytest.raises(RuntimeError, match="in use"), logging.WorkdirLock(tmp_path):
                pass
    with pytest.raises(KeyError), logging.WorkdirLock(tmp_path):
        raise KeyError
    with logging.WorkdirLock(tmp_path):
        pass


def test_peak_rss_bytes_grows_and_stays():
    before = logging.peak_rss_bytes()
    assert 10e6 < before < 100e9
    block = np.ones(before // 8 + 4_000_000)
    after = logging.peak_rss_bytes()
    assert after >= before + 30e6 - 1e6
    del block
    assert logging.peak_rss_bytes() >= after - 1e6  # Linux counts in batches of pages


def test_import_starts_no_backend():
    code = """
        import retex_jax.artifact, retex_jax.checkpoint, retex_jax.logging
        retex_jax.logging.info("hello")
        import jax
        jax.config.update("jax_num_cpu_devices", 3)  # refused once a backend runs
        assert jax.device_count() == 3
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


def test_clock_adds_up_phases_and_announces_each_once(capsys, monkeypatch):
    now = iter([0.0, 2.0, 10.0, 11.0, 20.0, 25.0])
    monkeypatch.setattr("retex_jax.logging.clock.time.perf_counter", lambda: next(now))
    clock = logging.Clock()
    for phase in ("load", "merge", "load"):
        with clock(phase):
            pass
    assert clock.seconds == {"load": 7.0, "merge": 1.0}
    assert capsys.readouterr().err.split() == ["load", "merge"]
