"""The pages keep their word: examples run as written, commands exist with their options, links lead somewhere.

Blocks marked ``python`` and ``sh`` run in a folder with the files that they name. Blocks marked ``bash`` need a
network, a launcher, a compiler or minutes; their commands are only parsed. The commands of train/README.md run in
tests/train/test_readme.py.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import typer
from typer.testing import CliRunner

import segmenter_fast as sf
from segmenter_fast.cli import app
from support.predict import photo

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
PAGES = {name: (ROOT / name).read_text() for name in TRACKED if name.endswith(".md")}


def blocks(*languages: str) -> list[Any]:
    """Each block of code in these languages, with the page and its number there as its name."""
    return [
        pytest.param(text, id=f"{page}-{number}")
        for page, content in PAGES.items()
        for number, (language, text) in enumerate(
            re.findall(r"^```(\w*)\n(.*?)^```", content, re.DOTALL | re.MULTILINE)
        )
        if language in languages
    ]


def commands(block: str) -> list[list[str]]:
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture
def _reader_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the files that the examples name: checkpoints, photographs and a scan."""
    shutil.copytree(ROOT / "tests" / "golden" / "official_mask", tmp_path / "checkpoint")
    shutil.copy(ROOT / "segmenter_fast" / "assets" / "coffee.jpg", tmp_path / "photo.jpg")
    for name in ("photos/a.png", "photos/b.png", "scan.tif"):
        photo(tmp_path / name, 96, 80)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_reader_files")
@pytest.mark.parametrize("block", blocks("python"))
def test_an_example_runs(block: str) -> None:
    exec(compile(block, "example", "exec"), {"__name__": "page"})


@pytest.mark.usefixtures("_reader_files")
@pytest.mark.parametrize("block", [b for b in blocks("sh") if not b.id.startswith("train/")])
def test_commands_run(block: str) -> None:
    for program, *arguments in commands(block):
        assert program == "segmenter-fast", f"{program} cannot run here: mark the block as bash"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}\n{done.output}\n{done.exception!r}"


@pytest.mark.usefixtures("_reader_files")
@pytest.mark.parametrize("block", blocks("sh", "bash"))
def test_commands_exist(block: str) -> None:
    assert commands(block)
    for words in commands(block):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Raise AssertionError unless a command of a page and all its options exist."""
    program, *arguments = words
    if program == "torchrun" or words[:2] == ["python", "-m"]:
        module, *arguments = arguments[arguments.index("-m") + 1 :]
        assert importlib.util.find_spec(module), module
        if module == "segmenter_fast.cli":
            parse(arguments)
        elif module == "segmenter_fast.train":
            parse(["train", *arguments])
    elif program == "segmenter-fast":
        parse(arguments)
    elif program == "pip":
        extras = re.search(
            r"\n\[project.optional-dependencies\]\n(.*?)\n\n\[", (ROOT / "pyproject.toml").read_text(), re.S
        )
        wanted = re.search(r"\[(.*)\]", arguments[-1])
        assert all(re.search(rf"^{name} = ", extras[1], re.M) for name in (wanted[1].split(",") if wanted else ()))
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), arguments
    elif program in ("bash", "pytest"):
        assert (ROOT / arguments[0]).is_file(), arguments
    else:
        assert program in ("git", "pre-commit") or words == [".", ".venv/bin/activate"], (
            f"a page names an unknown program: {words}"
        )


def parse(arguments: list[str]) -> None:
    """Parse a line of the command line without running it."""

    def silence(command: Any) -> None:
        command.callback = lambda **_: None
        for inner in getattr(command, "commands", {}).values():
            silence(inner)

    program = typer.main.get_command(app)
    silence(program)
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    assert not ended.value.code, arguments


@pytest.mark.parametrize(
    "line", ["segmenter-fast predict a --no-such-option", "make nothing", "pip install '.[none]'", "rm a"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(shlex.split(line))


def anchors(text: str) -> set[str]:
    """The fragments by which the headings of a page are reached."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, fragment = link.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert str(target.resolve().relative_to(ROOT)) in TRACKED, f"{page}: {link} is not in the repository"
        assert not fragment or fragment in anchors(target.read_text()), f"{page}: {link}"


BACKBONES = re.findall(r"\| `(sf\.create_model\(.*?\))` \|", PAGES["docs/checkpoints.md"])


def test_the_table_names_every_kind_of_backbone() -> None:
    assert len(BACKBONES) >= 6


@pytest.mark.parametrize("line", BACKBONES)
def test_the_line_for_a_backbone_names_weights_that_fit(line: str) -> None:
    from segmenter_fast.weights.timm import encoder_state

    def fits(variant: str, pretrained: str, freeze_encoder: bool = False, **fields: Any) -> bool:
        config = sf.VARIANTS[variant].replace(**fields)
        name = config.timm_backbone if pretrained == "timm" else pretrained
        if name in ("backbone.pth", "facebook/dinov2-small"):  # not of timm's: test_huggingface has the latter's names
            return True
        with torch.device("meta"):
            theirs = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
            ours = sf.Segmenter(config).encoder.state_dict()
        shapes = {key: value.shape for key, value in encoder_state(theirs, config).items()}
        return shapes == {key: value.shape for key, value in ours.items()}

    assert eval(line, {"sf": SimpleNamespace(create_model=fits)})
