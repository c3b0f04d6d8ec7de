"""Start of the package and of the command line: PyTorch is imported where it is needed, and not before."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import segmenter_fast as sf

HEAVY = ("torch", "numpy", "PIL", "huggingface_hub", "triton")
# Prints the help of every command.
ALL_HELP = """
import sys
import typer
from typer.testing import CliRunner
from segmenter_fast.cli import app

def visit(command, path):
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, result.output
    print("Usage: " in result.output, *path)
    for name, child in getattr(command, "commands", {}).items():
        visit(child, [*path, name])

visit(typer.main.get_command(app), [])
"""
LOADED = f"\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules), sep=',')"
# Answers Ctrl-C, as in a terminal, at the moment when a module is about to be imported.
INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == wanted:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
_, wanted, *arguments = sys.argv
sys.argv[1:] = arguments
from segmenter_fast.cli import main
main()
"""


def python(program: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("program", ["import segmenter_fast as sf\nsf.VARIANTS", "import segmenter_fast.cli", ALL_HELP])
def test_nothing_heavy_is_imported(program: str) -> None:
    assert python(program + LOADED).stdout.splitlines()[-1] == ""


def test_the_compiler_is_imported_by_its_first_use() -> None:
    program = "import sys\nimport segmenter_fast as sf\nsf.load, sf.predict\nprint('torch._dynamo' in sys.modules)"
    assert python(program).stdout == "False\n"


def test_another_package_of_our_folders_name_may_be_looked_for_in_a_checkout() -> None:
    """transformers imports ``kernels`` to read its version."""
    root = Path(__file__).parents[1]
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import segmenter_fast.kernels, kernels; print(dir(kernels))"
    )
    assert "attention" not in python(program).stdout


def test_the_program_reaches_every_command() -> None:
    lines = python(ALL_HELP).stdout.splitlines()
    assert {"True", "True predict", "True bench kernels", "True dataset make"} <= set(lines)
    assert all(line.startswith("True") for line in lines)


@pytest.mark.parametrize("arguments", [[], ["--version"], ["variants"]])
def test_an_answer_takes_little_time(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python("from segmenter_fast.cli import main; main()", *arguments, code=0 if arguments else 2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # A tenth of it on an idle machine; importing PyTorch alone takes more.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2


@pytest.mark.parametrize("module", ["rich.console", "numpy", "torch", "torch.functional", "segmenter_fast.segmenter"])
def test_an_interrupt_while_modules_are_imported_is_one_line(module: str) -> None:
    found = python(INTERRUPTED, module, "info", "seg_m_linear_8", code=130)
    assert found.stderr == "interrupted\n"
    assert found.stdout == ""


def test_names_and_modules_appear_at_their_first_use() -> None:
    program = """
import segmenter_fast.accelerate.match
import segmenter_fast as sf
assert callable(sf.accelerate) and callable(sf.load) and callable(sf.kernels.attention)
assert sf.inference.slide is sf.inference.sliding.slide
assert {*sf.__all__, "__version__"} <= set(dir(sf))
from segmenter_fast import *
assert predict is sf.predict and Segmenter.__name__ == "Segmenter"
import pickle
assert pickle.loads(pickle.dumps([Segmenter, Prediction])) == [sf.Segmenter, sf.Prediction]
"""
    python(program)


def test_an_unknown_name_is_no_attribute() -> None:
    assert not hasattr(sf, "nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from segmenter_fast import nothing  # noqa: F401
    with pytest.raises(AttributeError, match="'segmenter_fast' has no attribute '_hidden'"):
        _ = sf._hidden  # type: ignore[attr-defined]


def test_a_missing_dependency_is_named() -> None:
    program = "import sys\nsys.modules['safetensors'] = None\nimport segmenter_fast as sf\nsf.load"
    assert "ModuleNotFoundError: import of safetensors halted" in python(program, code=1).stderr
