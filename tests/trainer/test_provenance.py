"""A run's folder: its name tells time and commit, and no two runs share one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.provenance import git_commit, new_run_folder


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit; (folder, full commit)."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "repository"
    folder.mkdir()

    def git(*words: str) -> str:
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        command = ["git", "-C", str(folder), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (folder / "train.py").write_text("")
    git("add", "train.py")
    git("commit", "--quiet", "--message", "one", "--no-gpg-sign")
    return folder, git("rev-parse", "HEAD")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder outside of every repository."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


def test_commit(repository):
    folder, commit = repository
    assert git_commit(folder) == commit[:8]


def test_no_commit(outside, monkeypatch):
    assert git_commit(outside) == "nocommit"
    assert git_commit(outside / "missing") == "nocommit"
    monkeypatch.setenv("PATH", str(outside))  # a machine without git
    assert git_commit(outside) == "nocommit"


def test_name_tells_run_time_and_commit_of_the_script(repository, tmp_path, monkeypatch):
    folder, commit = repository
    monkeypatch.setattr(sys, "argv", [str(folder / "train.py")])
    found = new_run_folder(str(tmp_path / "deep" / "output"), "digits")
    assert found.is_dir()
    assert found.parent == tmp_path / "deep" / "output"
    assert re.fullmatch(rf"digits-\d{{8}}-\d{{6}}-{commit[:8]}", found.name)


def test_without_a_script_the_current_folder_counts(repository, tmp_path, monkeypatch):
    """In a notebook or after ``python -c`` argv[0] is no file."""
    folder, commit = repository
    monkeypatch.chdir(folder)
    for name in ("", "-c"):
        monkeypatch.setattr(sys, "argv", [name])
        assert new_run_folder(str(tmp_path / "output"), "run").name.split("-")[3] == commit[:8]


def test_runs_that_start_together_get_folders_of_their_own(outside, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(outside / "train.py")])
    folders = [new_run_folder(str(outside), "run") for _ in range(20)]
    assert len(set(folders)) == 20
    assert all(list(folder.iterdir()) == [] for folder in folders)


@pytest.mark.parametrize("path", ["memory://runs", "s3://bucket/runs"])
def test_only_local_folders(path, outside, monkeypatch):
    monkeypatch.chdir(outside)
    with pytest.raises(ValueError, match=f"output_path='{path}': only local folders can be written to"):
        new_run_folder(path, "run")
    assert list(Path().iterdir()) == []


def test_a_file_in_the_way(outside):
    (outside / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        new_run_folder(str(outside / "file"), "run")


def test_a_thousand_runs(outside, monkeypatch):
    def taken(self, **kwargs):
        raise FileExistsError

    monkeypatch.setattr(Path, "mkdir", taken)
    with pytest.raises(RuntimeError, match=f"{outside}: a thousand runs named run-"):
        new_run_folder(str(outside), "run")
