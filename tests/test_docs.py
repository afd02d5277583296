"""The pages of docs/ are listed, and their links lead somewhere."""

import functools
import re
import shlex

import yaml

import maskdm_jax
from maskdm_jax.diffusion import gaussian, masking, process, samplers
from maskdm_jax.evaluation import metrics


def pages(root):
    return [*root.glob("*.md"), *(root / "docs").rglob("*.md")]


def test_every_page_is_in_the_index(root):
    listed = set(re.findall(r"\]\((\w+\.md)\)", (root / "docs" / "README.md").read_text()))
    assert listed == {page.name for page in (root / "docs").glob("*.md")} - {"README.md"}


def anchors(page) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(root):
    for page in pages(root):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if "://" not in target:
                path, _, anchor = target.partition("#")
                found = (page.parent / path).resolve() if path else page
                assert found.exists(), f"{page.name} links to {target}"
                assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def test_names_of_the_tables_are_documented(root):
    text = " ".join((root / "docs" / name).read_text() for name in ("training.md", "processes.md", "evaluation.md"))
    text += (root / "README.md").read_text()
    tables = (samplers.SAMPLERS, process.PROCESSES, masking.KINDS, metrics.METRICS, gaussian.SCHEDULES)
    missing = [name for table in tables for name in table if not re.search(rf"[`=,|\"]{name}[`,|\" .\n]", text)]
    assert not missing


def test_citation(root):
    cited = yaml.safe_load((root / "CITATION.cff").read_text())
    assert cited["version"] == maskdm_jax.__version__
    assert f"## {maskdm_jax.__version__}" in (root / "CHANGELOG.md").read_text()


PROGRAM = re.compile(r"(?:^|\s)((?:launch|benchmarks|experiments)/\w+\.py\b[^`#]*)")


def commands(root) -> set[str]:
    """Commands FILE.py ... in all pages, in code on lines of its own or within a text, each on one line."""
    found = set()
    for page in pages(root):
        text = re.sub(r"\s*\\\n\s*", " ", page.read_text())
        for line in re.findall(r"^ {4}(.*)$", text, re.MULTILINE) + re.findall(r"`(python [^`]*)`", text):
            found |= {" ".join(command.split()) for command in PROGRAM.findall(line)}
    return found


def flags_of(script) -> set[str]:
    """Names of the flags that a program defines."""
    text = script.read_text()
    own = set(re.findall(r"(?:DEFINE_\w+|add_argument)\(\s*\"-*(\w+)\"", text))
    return own | ({"config"} if "config_flag(" in text else set())


def test_commands_name_what_there_is(root):
    """Programs, flags, recipes and settings of every command in the docs exist."""
    found = commands(root)
    assert len(found) > 60
    for command in found:
        for part in re.split(r"\s--\s", command):  # launch/local.py -- launch/train.py ...
            script, *words = shlex.split(part)
            known, changes, config = flags_of(root / script), {}, None
            for word in words:
                name, _, value = word.removeprefix("--").partition("=")
                if not word.startswith("--") or word == "--":
                    continue
                flag = name.split(".")[0]
                assert flag in known or f"no{flag}" in known or flag.removeprefix("no") in known, f"{command}: {word}"
                if name == "config" and "NAME" not in value and "..." not in value:
                    config = value
                elif name.startswith("config."):
                    changes[name.removeprefix("config.")] = value
            if config and script == "launch/train.py":
                raw = maskdm_jax.recipe(str(root / config)).to_dict()
                for key in changes:
                    *parents, last = key.split(".")
                    section = functools.reduce(lambda node, parent: node[parent], parents, raw)
                    assert last in section, f"{command}: {key}"
