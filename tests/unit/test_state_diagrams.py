"""The diagrams in the documentation are those of the tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "transfer.md"


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "state_diagrams"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_the_document_is_not_stale() -> None:
    done = script("--check")
    assert done.returncode == 0, f"{done.stdout}Run scripts/state_diagrams."


def test_a_stale_document_is_found_and_mended(tmp_path: Path) -> None:
    right = DOCUMENT.read_text(encoding="utf-8")
    stale = tmp_path / "transfer.md"
    stale.write_text(right.replace("FILLING --> READY", "FILLING --> CLOSED"), encoding="utf-8")
    done = script("--check", str(stale))
    assert done.returncode == 1
    assert "+    FILLING --> READY: last pieces" in done.stdout
    assert script(str(stale)).returncode == 0
    assert stale.read_text(encoding="utf-8") == right


def test_a_document_without_a_place_for_them_is_an_error(tmp_path: Path) -> None:
    bare = tmp_path / "transfer.md"
    bare.write_text("# Nothing here\n", encoding="utf-8")
    for arguments in (["--check", str(bare)], [str(bare)]):
        done = script(*arguments)
        assert done.returncode == 1
        assert "no place for the diagram 'slot'" in done.stdout
    assert bare.read_text(encoding="utf-8") == "# Nothing here\n"
