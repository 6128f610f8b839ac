"""Writes the table of docs/compatibility.md, from the results of the tests that are marked `client`.

    pytest -n 2 --junitxml report.xml
    python tests/compatibility.py report.xml          # writes the table into docs/compatibility.md
    python tests/compatibility.py report.xml --check  # fails if the page says something else

A row says yes if each of its tests passed, with some of its parameters at least, and none failed, in the environment
that this runs in.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent.parent / "docs/compatibility.md"
BEGIN, END = "<!-- tests/compatibility.py wrote this -->\n", "<!-- to here -->\n"


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def table(report: Path) -> str:
    """The table of a JUnit report: a row for each use of a package, packages and uses in alphabetical order."""
    rows: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, cls = case.attrib["classname"].removeprefix("tests.").partition(".")
        test = f"[`{cls or case.attrib['name'].partition('[')[0]}`](../tests/{module}.py)"
        for mark in case.iterfind("properties/property[@name='client']"):
            rows.setdefault(tuple(mark.attrib["value"].split("\t")), []).append((test, outcome(case)))
    lines = ["| package | version | use | works | shown by |", "|---|---|---|---|---|"]
    for (package, use), results in sorted(rows.items()):
        outcomes = {test: {result for other, result in results if other == test} for test, _ in sorted(results)}
        failed = any("failed" in seen for seen in outcomes.values())
        works = "no" if failed else "yes" if all("passed" in seen for seen in outcomes.values()) else "not run"
        tests = ", ".join(outcomes)
        tested = version(package).partition("+")[0]  # Without the kind of build.
        lines.append(f"| {package} | {tested} | {use} | {works} | {tests} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote, with all tests run")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the table is not that of the report"
    )
    arguments = parser.parse_args()
    before = PAGE.read_text()
    start, end = before.index(BEGIN) + len(BEGIN), before.index(END)
    written, generated = before[start:end], table(arguments.report)
    if written == generated:
        return
    if arguments.check:
        lines = set(written.splitlines()) ^ set(generated.splitlines())
        sys.exit(
            "The table of docs/compatibility.md is not what the tests say. Lines that differ:\n"
            + "\n".join(sorted(lines))
            + f"\nTo write it: python tests/compatibility.py {arguments.report}"
        )
    PAGE.write_text(before[:start] + generated + before[end:])


if __name__ == "__main__":
    main()
