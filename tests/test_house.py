"""The house: which package imports which, what no shared module names, who is declared where."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from papers import CASES

from common import cli
from runner import papers
from tools import sizes

PAPERS = papers.find()
SHARED = ("common", "runner")


def imported(path) -> set[str]:
    """Return the top-level packages of the project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found & {*sizes.packages()}


ALLOWED = {
    "common": {"common"},
    "runner": {"common", "runner"},
    "preprocess": {"common", "preprocess"},
    "tools": {"common", "runner", "preprocess", "tools"},
}
VIEWS_OF_CMC = ("ring", "feature_transform")  # applied on top of CMC


@pytest.mark.parametrize("package", [*ALLOWED, *PAPERS])
def test_imports_point_one_way(package):
    allowed = ALLOWED.get(package, {"common", "runner", "preprocess", package})
    if package in VIEWS_OF_CMC:
        allowed = allowed | {"cmc"}
    for path in sizes.sources(package):
        up = imported(path) - allowed
        assert not up, f"{path.relative_to(ROOT)} imports {', '.join(sorted(up))}"


def flags_of_papers() -> set[str]:
    """Return the flags that one or two papers' scripts declare, and no shared module."""
    shared = "".join(path.read_text() for package in SHARED for path in sizes.sources(package))
    folders = {}
    for folder in PAPERS:
        for path in sizes.sources(folder):
            for flag in re.findall(r'"--(\w[\w-]*)"', path.read_text()):
                folders.setdefault(flag.replace("_", "-"), set()).add(folder)
    declared = {flag.replace("_", "-") for flag in re.findall(r'"--(\w[\w-]*)"', shared)}
    return {flag for flag, where in folders.items() if len(where) < 3} - declared


@pytest.mark.parametrize("package", SHARED)
def test_shared_modules_name_no_paper_no_script_and_no_flag_of_a_paper(package):
    scripts = {script for p in PAPERS.values() for script in (p.pretraining, p.evaluation)}
    names = {*PAPERS, *(script.partition("/")[2].removesuffix(".py") for script in scripts)}
    names -= {"main", "linear"}  # words of their own
    for path in sizes.sources(package):
        text = path.read_text()
        for name in names:
            assert not re.search(rf"\b{re.escape(name)}\b", text), f"{path.name} names {name}"
        for flag in flags_of_papers():
            name = flag.replace("-", "[-_]")
            spelled = rf"--{name}(?![\w-])|\bargs\.{name}\b"
            assert not re.search(spelled, text), f"{path.name} names --{flag}"


def test_every_folder_with_claims_is_declared():
    folders = {path.parent.name for path in ROOT.glob("*/claims.json")}
    assert folders == {*PAPERS}, (
        f"{', '.join(folders ^ {*PAPERS})}: a paper's folder has both claims.json and paper.py"
    )


@pytest.mark.parametrize("folder", PAPERS)
def test_every_paper_has_cases_in_the_cross_paper_tests(folder):
    own = [case for case in CASES.values() if case.paper.folder == folder]
    assert any(case.whole for case in own), f"{folder} needs a Case in tests/papers.py, one whole"
    scripts = {case.script.replace(".", "/") + ".py" for case in own if case.readme}
    assert PAPERS[folder].pretraining in scripts, f"a Case of {folder} needs `readme` flags"


@pytest.mark.parametrize("folder", PAPERS)
def test_a_declaration_is_complete(folder):
    paper = PAPERS[folder]
    for script in (paper.pretraining, paper.evaluation):
        assert (ROOT / script).is_file() and script.startswith(f"{folder}/"), script
    assert paper.checkpoints and paper.layouts and paper.signs and paper.settings and paper.settles
    assert callable(paper.function("colours"))
    spec = paper.linear()
    assert spec.script.endswith(paper.evaluation)
    for name in (f"{folder}/README.md", f"{folder}/claims.json", f"docs/{folder}.md"):
        assert (ROOT / name).is_file(), f"write {name}"
    page = ROOT / "results" / folder / "README.md"
    assert page.is_file(), f"{page.relative_to(ROOT)} is missing: run tools/claims.py --write"
    content = json.loads((ROOT / folder / "claims.json").read_text())
    assert content["claims"], f"{folder}/claims.json has no claims"
    assert "gpu" in content["scales"], f"{folder}/claims.json needs the scale gpu"


def test_declarations_need_no_torch():
    code = "import sys; from runner import papers; papers.find(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_flags_are_settled_when_they_are_parsed():
    args = cli.freeze(cli.Parser().parse_args([]))
    with pytest.raises(AttributeError, match="args.lr is settled"):
        args.lr = 1
    assert cli.replace(args, lr=2).lr == 2 and not hasattr(args, "lr")


SCRIPTS = [script for p in PAPERS.values() for script in (p.pretraining, p.evaluation)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_assigns_to_its_flags_after_parsing(script):
    tree = ast.parse((ROOT / script).read_text())
    late = [node for node in tree.body if getattr(node, "name", "") not in ("parse_args", "settle")]
    for node in (inner for outer in late for inner in ast.walk(outer)):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets:
            is_flag = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
            assert not (is_flag and target.value.id == "args"), f"{script}:{node.lineno}"


@pytest.mark.parametrize("package", [*SHARED, *PAPERS, "tools", "preprocess"])
def test_lines_have_at_most_a_hundred_columns(package):
    for path in sizes.sources(package):
        wide = [i + 1 for i, line in enumerate(sizes.lines_of(path)) if len(line) > sizes.COLUMNS]
        assert not wide, f"{path.relative_to(ROOT)}: lines {wide}"
