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
from data import byte_tokenizer
from packaging.requirements import Requirement
from records import read_records
from train import parse
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("guides/*.md"))]


def prose(text):
    """Its sentences: no code, formulas, tables, headings or addresses; each bullet ends one."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|^\|.*?$|^#.*?$|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    parts = re.split(r"\n\s*\n|^\s*[-*] ", text, flags=re.MULTILINE)
    return [" ".join(s.split()) for part in parts for s in re.split(r"(?<=[.?!:])\s+", part) if s.strip()]


def test_the_front_page_is_short():
    content = README.read_bytes()
    assert content.count(b"\n") <= 160 and len(content) <= 10_000
    results = content.decode().split("\n| question |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(results) <= 8


@pytest.mark.parametrize(
    "page", [README, DOCS / "how-it-works.md", *sorted(DOCS.glob("guides/*.md"))], ids=lambda page: page.name
)
def test_no_sentence_is_long(page):
    assert not [sentence for sentence in prose(page.read_text()) if len(sentence.split()) > 30]


def blocks(language, pages=PAGES):
    return [b for page in pages for b in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)]


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


@pytest.fixture
def checkpoint(tmp_path):
    """A small model in the folder that has the name of the README's."""
    (name,) = set(re.findall(r'name = "([^"]+)"', README.read_text()))
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=256, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    byte_tokenizer().save_pretrained(tmp_path / name)


def test_the_python_snippets_run_where_only_the_wheel_is_installed(clean_python, checkpoint, tmp_path):
    pages = {page.name: "\n".join(blocks("python", [page])) for page in PAGES}
    assert len(blocks("python")) == 29
    snippets = [f"exec(compile({code!r}, {name!r}, 'exec'), {{}})" for name, code in pages.items()]
    check = "import modeling_stateful_gpt, importlib.util, pkgutil\nprint(modeling_stateful_gpt.__file__)\n"
    check += "for module in pkgutil.iter_modules(modeling_stateful_gpt.__path__, 'modeling_stateful_gpt.'):\n"
    check += "    importlib.import_module(module.name)\n"
    check += "assert not any(map(importlib.util.find_spec, ('pytest', 'trl', 'datasets', 'matplotlib')))\n"
    script = tmp_path / "snippets.py"
    script.write_text("\n".join([check, *snippets]))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([clean_python, "-I", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "env") in result.stdout and "tensor([[" in result.stdout
    assert "The state of each token" in result.stdout


def test_the_commands_have_the_options_that_are_shown():
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    training = [c[c.index("training/train.py") + 1 :] for c in commands if "training/train.py" in c]
    assert len(training) == 15
    for arguments in training:
        parse(arguments)
    comparisons = [c[c.index("training/compare.py") + 1 :] for c in commands if "training/compare.py" in c]
    assert len(comparisons) == 12
    for arguments in comparisons:
        plan(*parse_comparison(arguments))


def rows_below(heading, page):
    """Of the table with this heading, row by row: what the first column says, and the other cells."""
    lines = page[page.index(f"\n| {heading} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    for line in lines:
        name, *cells = (cell.strip(" *") for cell in line.replace("−", "-").strip("|").split("|"))
        yield name.split("]")[0].strip("[*"), cells


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def arm_of(name, arms):
    starts = {"GPT": "gpt", "token shift": "token_shift", "Stateful GPT": "stateful"}
    preset = next((preset for start, preset in starts.items() if name.startswith(start)), "warm_start")
    return next(a for a in arms if a.startswith(preset) and ("pass_probabilities" in a) == name.startswith("…"))


IN_EQUAL_TIME = [(0, "… in the seconds"), (0, "… by the costs"), (1, "… by the costs")]
UNTIL_NOTHING_IMPROVES = [(), (0, "exact"), (0, "worst seed"), (0, "difference"), (1, "difference")]


@pytest.mark.parametrize(
    "heading,file,columns",
    [
        ("Python's manual and library", "data_limited", UNTIL_NOTHING_IMPROVES),
        ("Python, in equal time", "data_limited", IN_EQUAL_TIME),
        ("Tiny Shakespeare", "data_limited_shakespeare", UNTIL_NOTHING_IMPROVES),
        ("Tiny Shakespeare, in equal time", "data_limited_shakespeare", IN_EQUAL_TIME),
        ("Python, 6 layers", "data_limited6", UNTIL_NOTHING_IMPROVES),
        ("Python, 6 layers, in equal time", "data_limited6", IN_EQUAL_TIME),
    ],
)
def test_what_the_page_says_of_little_text_is_what_the_command_says_of_its_records(heading, file, columns):
    page = (DOCS / "experiments.md").read_text()
    (costs,) = re.findall(rf"training/by_the_clock\.py docs/results/{file}\.jsonl --costs ([\d. ]+)", page)
    records = read_records(ROOT / f"docs/results/{file}.jsonl")
    tables = []
    for baseline in (0, 1):
        names, *rows = tabulate(records, baseline, [float(cost) for cost in costs.split()])
        tables.append({row[0]: dict(zip(names, row, strict=True)) for row in rows})
    compared = [*rows_below(heading, page)]
    assert len(compared) >= 3
    for name, cells in compared:
        arm = arm_of(name, tables[0])
        for cell, column in zip(cells, columns, strict=True):
            # Of what ran for two seeds alone, each is shown.
            if column and (cell or name != "GPT") and ("seeds" not in name or "," not in cell):
                assert numbers(cell) == pytest.approx(numbers(tables[column[0]][arm][column[1]]), abs=6e-4), (
                    name,
                    column,
                )


def test_what_the_page_says_of_a_single_epoch_is_what_the_command_says_of_its_records():
    records = read_records(ROOT / "docs/results/late.jsonl")
    by_arm = [
        [dict(zip(names, row, strict=True)) for row in rows]
        for names, *rows in (tabulate(records, 3), tabulate(records, 4))
    ]
    shown = rows_below("| steps | tokens | cost", (DOCS / "experiments.md").read_text())
    # The first half of those that go on, 1, has no row.
    for (name, cells), arm in zip(shown, (0, 3, 2, 4, 5, 6, 7, 8, 9), strict=True):
        rows = [of[arm] for of in by_arm]
        expected = [rows[0]["exact"], rows[0]["worst seed"], rows[0]["difference"], rows[1]["difference"]]
        for cell, value in zip(cells[4:], expected, strict=True):
            assert numbers(cell) == pytest.approx(numbers(value), abs=6e-4), (name, cell, value)


def links(page):
    """The file and the heading in it, or either, that each link of a page leads to."""
    return re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text())


def anchors(page):
    """Of its headings, as GitHub makes them; of one that is there twice, the first place."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_there_are_links():
    assert sum(len(links(page)) for page in PAGES) > 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for file, heading in links(page):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not heading or anchors(target).count(heading) == 1, (file, heading)


def test_records_that_are_named_exist_and_all_are_named():
    text = "".join(page.read_text() for page in PAGES)
    kept = {path.name for path in (ROOT / "docs/results").iterdir()}
    assert kept <= set(re.findall(r"\w+\.(?:jsonl|png)", text))
    assert set(re.findall(r"results/(\w+\.(?:jsonl|png))", text)) <= kept
