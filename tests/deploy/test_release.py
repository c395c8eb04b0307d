"""A release is a commit whose changelog lists its changes."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from antefix.version import __version__

ROOT = Path(__file__).parents[2]
RELEASE = ROOT / "deploy" / "release.py"
changes_of, dated = (runpy.run_path(str(RELEASE))[name] for name in ("changes_of", "dated"))
LOG = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n### Added\n\n- Much.\n\n## 0.1.0\n\n- First.\n"


def test_a_versions_part_is_found() -> None:
    assert changes_of("0.2.0", LOG) == "### Added\n\n- Much.\n"
    assert changes_of("0.1.0", LOG) == "- First.\n"


@pytest.mark.parametrize(
    ("version", "log", "message"),
    [
        ("0.3.0", LOG, "no part for 0.3.0"),
        ("0.2", LOG, "no part for 0.2:"),
        ("0.2.0", LOG.replace("2026-12-01", "unreleased"), "unreleased"),
        ("0.1.0", LOG.replace("- First.\n", ""), "says nothing"),
    ],
)
def test_what_is_not_ready_is_refused(version: str, log: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changes_of(version, log)


def test_a_rehearsal_takes_what_is_not_released_yet() -> None:
    assert "Much" in changes_of("0.2.0", LOG.replace("2026-12-01", "unreleased"), allow_unreleased=True)


def test_the_version_is_the_one_that_the_changelog_is_at() -> None:
    # What is not released yet stands above, under "[Unreleased]".
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    assert f"Version {__version__.rpartition('.')[0]}." in (ROOT / "README.md").read_text()


def test_the_date_takes_the_place_of_unreleased_in_that_version_alone() -> None:
    log = LOG.replace("2026-12-01", "unreleased").replace("## 0.1.0", "## 0.1.0 (unreleased)")
    assert dated("0.2.0", log, date(2026, 12, 1)) == LOG.replace("## 0.1.0", "## 0.1.0 (unreleased)")
    assert dated("0.2.0", LOG, date(2027, 1, 1)) == LOG


@pytest.mark.services
def test_a_tag_is_on_the_commit_that_has_the_date_and_only_that_is_released(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        done = subprocess.run(["git", *me, *command], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def release(*options: str) -> tuple[int, str]:
        command = [sys.executable, tmp_path / "deploy" / "release.py", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    for name in ("deploy", "antefix"):
        (tmp_path / name).mkdir()
    shutil.copy(RELEASE, tmp_path / "deploy")
    (tmp_path / "antefix" / "version.py").write_text('__version__ = "0.2.0"\n')
    log = tmp_path / "CHANGELOG.md"
    log.write_text(LOG.replace("2026-12-01", "unreleased"))
    git("init", "--quiet")
    git("config", "user.name", "me")
    git("config", "user.email", "me@example.org")
    git("add", ".")
    git("commit", "--quiet", "--message", "First")
    # 1. Without a tag there is no release. With uncommitted changes there is no tag.
    assert release() == (
        2,
        "release: CHANGELOG.md says that 0.2.0 is unreleased: `make release-tag` writes the date there\n",
    )
    log.write_text(log.read_text() + "\n")
    assert release("--tag") == (2, "release: there are changes that are not committed\n")
    git("checkout", "--quiet", "CHANGELOG.md")
    # 2. The tag is on the commit that sets the date, and lists the changes.
    assert release("--tag") == (0, "")
    assert re.search(r"^## 0\.2\.0 \(\d{4}-\d\d-\d\d\)$", log.read_text(), re.MULTILINE)
    assert git("rev-parse", "v0.2.0^{commit}") == git("rev-parse", "HEAD") and not git("status", "--porcelain")
    assert "### Added" in git("tag", "--list", "--format=%(contents)", "v0.2.0")
    code, said = release("--tag")
    assert code == 2 and "v0.2.0 is there already" in said
    # 3. A later commit is not that release.
    git("commit", "--quiet", "--allow-empty", "--message", "More")
    code, said = release()
    assert code == 2 and "no tag v0.2.0" in said
