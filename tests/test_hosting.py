"""The files for hosted services are sound: the workflow of CI, the hooks of pre-commit, the citation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE, PROJECT = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def is_target(command: str) -> bool:
    program, _, target = command.partition(" ")
    return program == "make" and re.search(rf"^{target}: ", MAKEFILE, re.M) is not None


def test_ci_runs_lint_and_tests_on_the_oldest_python() -> None:
    text, job = (ROOT / ".github/workflows/ci.yml").read_text(), read(".github/workflows/ci.yml")["jobs"]["test"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make lint", "make test"]
    assert all(map(is_target, commands))
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
    assert job["strategy"]["matrix"]["python"][0] == re.search(r'requires-python = ">=(.*)"', PROJECT)[1]
    assert job["timeout-minutes"] <= 60
    assert "secrets" not in text


def test_hooks_name_tools_of_the_project() -> None:
    config = read(".pre-commit-config.yaml")
    assert [repo["repo"] for repo in config["repos"]] == ["local"], "a remote hook needs a network"
    for hook in config["repos"][0]["hooks"]:
        if hook["language"] == "system" and not is_target(hook["entry"]):
            tool = re.match(r"\.venv/bin/(\w+) ", hook["entry"])
            assert tool, hook
            assert f'"{tool[1]}>=' in PROJECT, hook


@pytest.mark.parametrize("content", [None, "no newline", "blank \n", "<<<<<<< ours\n"])
def test_hooks_find_faults(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
        shutil.copy(ROOT / ".pre-commit-config.yaml", tmp_path)
        (tmp_path / "page.md").write_text(content)
        subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--all-files"],
        cwd=ROOT if content is None else tmp_path,
        env={**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "cache"), "SKIP": "ruff,ruff-format,mypy"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (content is not None), done.stdout + done.stderr


def test_the_citation_names_software_and_paper() -> None:
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["title"] == re.search(r'^name = "(.*)"', PROJECT, re.M)[1]
    assert citation["authors"][0]["name"] in (ROOT / "LICENSE").read_text()
    paper = citation["references"][0]
    assert [author["family-names"] for author in paper["authors"]] == ["Strudel", "Garcia", "Laptev", "Schmid"]


def test_the_changelog_has_this_version() -> None:
    from segmenter_fast import __version__

    assert re.search(rf"^## \[{re.escape(__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
