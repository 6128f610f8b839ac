"""What the README shows runs as it stands there."""

import re
import shlex
from pathlib import Path

from train import parse

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    assert len(blocks("python")) == 5
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert "tensor([[" in capsys.readouterr().out


def test_the_commands_have_the_options_that_are_shown():
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    training = [c[c.index("training/train.py") + 1 :] for c in commands if "training/train.py" in c]
    assert len(training) == 5
    for arguments in training:
        parse(arguments)


def test_pictures_and_files_that_are_mentioned_exist():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target
