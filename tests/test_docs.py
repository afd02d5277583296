"""The pages of docs/ are listed, and their links lead somewhere."""

import re

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
