import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from retex_jax import preemption


def test_a_signal_is_noted_until_the_guard_is_left():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outside"))
    try:
        with (
            pytest.raises(preemption.Preempted, match="step 3 is saved") as error,
            preemption.Guard() as guard,
        ):
            assert not guard.is_called
            signal.raise_signal(signal.SIGTERM)
            assert guard.is_called and not seen
            raise preemption.Preempted("step 3 is saved")
        assert error.value.code == preemption.EXIT_CODE == 75
        signal.raise_signal(signal.SIGTERM)
        assert seen == ["outside"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_nothing_has_answered_ends_the_program_when_the_guard_is_left():
    with pytest.raises(preemption.Preempted, match="is finished"), preemption.Guard():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), preemption.Guard():
        signal.raise_signal(signal.SIGTERM)
        _ = 1 // 0


def test_other_threads_have_no_handlers():
    def work():
        with preemption.Guard() as guard:
            seen.append((signal.getsignal(signal.SIGTERM), guard.is_called))

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(signal.getsignal(signal.SIGTERM), False)]


def run(code):
    """Runs code that has the module at hand; not the package, whose imports take seconds."""
    start = f"import runpy, os, signal\nns = runpy.run_path({str(Path(preemption.__file__))!r})\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_program_ends_with_the_exit_code():
    assert run("raise ns['Preempted']('saved')").returncode == 75


def test_a_second_signal_ends_the_process_at_once():
    done = run("""
        with ns["Guard"]():
            os.kill(os.getpid(), signal.SIGTERM)
            print("goes on", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("never", flush=True)
    """)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "goes on\n")
