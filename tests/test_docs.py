"""Test that names in the documents exist, and that every registry is documented."""

import re
from pathlib import Path

import pytest

import contrastive.registry
import eval.registry
import memory_bank.registry

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"
DOCUMENTS = (ARCHITECTURE, ROOT / "CONTRIBUTING.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(document):
    named = re.findall(
        r"`((?:contrastive|memory_bank|eval|tests|configs|benchmarks|docs)/[\w/.]*)", document.read_text()
    )
    assert len(named) > (20 if document == ARCHITECTURE else 1)
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_every_link_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text())]
    local = [(page, link) for page, link in links if not link.startswith("http")]
    assert len(local) > 15
    assert [(page.name, link) for page, link in local if not (page.parent / link).exists()] == []


def test_the_map_is_short():
    assert len(ARCHITECTURE.read_text().splitlines()) <= 150


def test_every_registry_is_a_row_of_what_a_newcomer_adds():
    rows = [line for line in ARCHITECTURE.read_text().splitlines() if "tests/extending/" in line]
    known = {name for name in vars(contrastive.registry) if name.isupper()}
    known |= {"PROTOCOLS"} & set(vars(eval.registry))
    known |= {name for name in vars(memory_bank.registry) if name.isupper()}
    assert known - {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)} == set()


def test_every_example_of_extending_is_named():
    examples = {f"tests/extending/{path.name}" for path in (ROOT / "tests/extending").glob("test_*.py")}
    named = set(re.findall(r"tests/extending/\w+\.py", ARCHITECTURE.read_text()))
    assert examples - named <= {"tests/extending/test_own_dataset.py"}  # handed over without a registry


@pytest.mark.parametrize(
    "names",
    [contrastive.registry.METHODS, contrastive.registry.OBJECTIVES, contrastive.registry.DATASETS],
    ids=["methods", "objectives", "datasets"],
)
def test_every_name_in_a_registry_leads_somewhere(names):
    from importlib import import_module

    for target in names.values():
        module, _, attribute = target.partition(":")
        assert callable(getattr(import_module(module), attribute)), target
