"""What the README and the experiments show runs as it stands there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from by_the_clock import tabulate
from compare import parse_comparison, plan
from packaging.requirements import Requirement
from records import read_records
from train import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/experiments.md"]


def blocks(language):
    return [b for page in PAGES for b in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)]


def required(names):
    """The installed distributions that these requirements name, and all that those require."""
    found, open_requirements = {}, [Requirement(name) for name in names]
    while open_requirements:
        requirement = open_requirements.pop()
        wanted = ["", *requirement.extras]
        if requirement.name in found and not requirement.extras:
            continue
        found[requirement.name] = distribution(requirement.name)
        for line in found[requirement.name].requires or []:
            further = Requirement(line)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in wanted):
                open_requirements.append(further)
    return found.values()


@pytest.fixture
def clean_python(tmp_path):
    """The Python of an environment with nothing but our wheel and what it requires, links to what is installed here."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "modeling_stateful_gpt", source / "modeling_stateful_gpt")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *build], check=True)
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (ours,) = distributions(name="modeling-stateful-gpt", path=[str(site)])
    for dependency in required(line for line in ours.requires if "extra ==" not in line):
        for top in {file.parts[0] for file in dependency.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(dependency.locate_file(top))
    return tmp_path / "env/bin/python"


def test_the_python_snippets_run_one_after_the_other_where_only_the_wheel_is_installed(clean_python, tmp_path):
    snippets = blocks("python")
    assert len(snippets) == 6
    check = "import modeling_stateful_gpt, importlib.util\nprint(modeling_stateful_gpt.__file__)\n"
    check += "assert not any(map(importlib.util.find_spec, ('pytest', 'trl', 'datasets', 'matplotlib')))\n"
    script = tmp_path / "snippets.py"
    script.write_text("\n".join([check, *snippets]))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [clean_python, "-I", script], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "env") in result.stdout and "tensor([[" in result.stdout


def test_the_commands_have_the_options_that_are_shown():
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    training = [c[c.index("training/train.py") + 1 :] for c in commands if "training/train.py" in c]
    assert len(training) == 11
    for arguments in training:
        parse(arguments)
    comparisons = [c[c.index("training/compare.py") + 1 :] for c in commands if "training/compare.py" in c]
    assert len(comparisons) == 13
    for arguments in comparisons:
        plan(*parse_comparison(arguments))


def differences(text):
    """All that is written as a mean and its standard error."""
    return [(float(m.replace("−", "-")), float(e)) for m, e in re.findall(r"([+−-]?\d+\.\d+) ± (\d+\.\d+)", text)]


def test_what_the_page_says_of_equal_time_is_what_the_command_says_of_the_records():
    page = (ROOT / "docs/experiments.md").read_text()
    commands = re.findall(r"training/by_the_clock\.py (\S+\.jsonl)(?: --baseline (\d+))? --costs ([\d. ]+)", page)
    assert len(commands) == 3
    for file, baseline, costs in commands:
        _, *rows = tabulate(read_records(ROOT / file), int(baseline or 0), [float(cost) for cost in costs.split()])
        compared = [row for row in rows if not row[0].startswith("gpt") and len(row[1].split()) > 2]
        assert len(compared) >= 2
        for row in compared:
            for mean, error in differences(" ".join(row[4:5] + row[6:])):
                assert any(abs(mean - m) < 6e-4 and abs(error - e) < 6e-4 for m, e in differences(page)), (file, row)


def links(page):
    """The file and the heading in it, or either, that each link of a page leads to."""
    return re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text())


def anchors(page):
    """Of its headings, as GitHub makes them; of one that is there twice, the first place."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    assert len(links(page)) > 20
    for file, heading in links(page):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not heading or anchors(target).count(heading) == 1, (file, heading)


def test_records_that_are_named_exist_and_all_are_named():
    text = "".join(page.read_text() for page in PAGES)
    kept = {path.name for path in (ROOT / "docs/results").iterdir()}
    assert kept <= set(re.findall(r"\w+\.(?:jsonl|png)", text))
    assert set(re.findall(r"results/(\w+\.(?:jsonl|png))", text)) <= kept
