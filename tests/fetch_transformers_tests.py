"""Fetches the common model tests of the installed transformers version, which only its source distribution contains.

python tests/fetch_transformers_tests.py
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(sys.prefix) / f"transformers-{version('transformers')}-tests"


def main() -> None:
    if FOLDER.exists():
        return
    name = f"transformers-{version('transformers')}"
    with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
        source = ["--no-deps", "--no-binary", "transformers", "--dest", folder, name.replace("-", "==")]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *source], check=True)
        with tarfile.open(Path(folder) / f"{name}.tar.gz") as archive:
            tests = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(folder, tests)
        # Last, so that an interrupted download is not taken for a complete one.
        (Path(folder) / name / "tests").rename(FOLDER)


if __name__ == "__main__":
    main()
