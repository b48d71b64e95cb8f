"""What the documents say of methods: tables made from docstrings, an index of papers, quoted messages, cited figures."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest

from documents import ROOT, blocks, documents
from llmselect import registry
from llmselect.registry import describe

spec = importlib.util.spec_from_file_location("generated", ROOT / "recipes/generated.py")
assert spec and spec.loader
generated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generated)
METHODS = [(kind, name) for kind, of_kind in generated.KINDS.items() for name, _ in generated.own(of_kind)]
PAPERS = (ROOT / "recipes/papers.md").read_text("utf-8")


@pytest.mark.parametrize("name", generated.DOCUMENTS)
def test_generated_parts_are_fresh(name):
    text = (ROOT / name).read_text("utf-8")
    assert generated.PART.search(text), f"{name} has no generated part"
    assert generated.rendered(text) == text, f"{name} is stale: type `make docs`"


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_is_in_a_table_of_the_readme(kind, name):
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme.split(f"<!-- generated: methods {kind} -->")[1].split("<!-- end -->")[0]
    (line,) = [line for line in table.splitlines() if f"`{name}`" in line.split(" | ")[0]]
    about = describe(generated.KINDS[kind].get(name))
    assert about["title"].rstrip(".") in line and about["Use"].rstrip(".") in line
    assert all(f"https://arxiv.org/abs/{number}" in line for number in generated.numbers(about["Paper"]))
    assert line.count(" | ") == 5 and all(cell.strip() for cell in line.strip("|").split(" | "))


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_with_a_paper_has_settings_and_deviations(kind, name):
    paper = describe(generated.KINDS[kind].get(name))["Paper"]
    if paper.lower().startswith("none"):
        return
    told = f"add a section to recipes/papers.md: '{name}' cites a paper ({paper[:60]}…)"
    for number in generated.numbers(paper):
        assert f"https://arxiv.org/abs/{number}" in PAPERS, told
    snippets = "\n".join(block.text for block in blocks() if block.file == "recipes/papers.md")
    named = {"selector": rf"selector: {name}\b", "extractor": rf"extractor: {name}\b",
             "schedule": rf"name: {name}\b|\b{generated.KINDS[kind].get(name).__name__}\("}[kind]  # fmt: skip
    assert re.search(named, snippets), told
    marked = [word for _, words, _ in generated.PART.findall(PAPERS) for word in words.split()[1:]]
    kin = {other for _, other in METHODS if sources(other) == sources(name)}
    assert kin & set(marked), f"{told}: no `<!-- generated: deviations {name} -->`"


@pytest.mark.parametrize("name", registry._COMBINED)
def test_what_is_said_to_be_written_out_is(name):
    """`llmselect show perplexity` sends its reader to the index of papers."""
    extractor, selector = registry._COMBINED[name]
    found = [block.text for block in blocks() if block.file == "recipes/papers.md" and f"selector: {selector}," in block.text
             and f"extractor: {extractor}" in block.text]  # fmt: skip
    # By the name of a method, or by that of the section.
    assert any(re.search(rf"(?i)^  {re.escape(name)}[-\w]*:", text, re.M) for text in found) or (
        found and re.search(rf"(?im)^## .*\b{re.escape(name)}", PAPERS)
    )
    assert "recipes/papers.md has it written out" in registry.elsewhere(name.upper())


def sources(name: str) -> str:
    return next(kind.get(name).__module__ for kind in generated.KINDS.values() if name in kind.names())


def test_the_first_sentence_ends_where_a_reader_would_end_it():
    assert generated.first("A of Li et al., 0.5 of it. Then more.") == "A of Li et al., 0.5 of it"
    assert generated.first("`x [n]`; rows. `target` too.") == "`x [n]`; rows"
    assert generated.first("O(n log n).") == "O(n log n)"


def test_a_stale_table_and_an_unknown_name_are_seen():
    old = "<!-- generated: methods schedule -->\n| nothing |\n<!-- end -->"
    assert "`infobatch`" in generated.rendered(old) and "nothing" not in generated.rendered(old)
    with pytest.raises(SystemExit, match="no method 'nobody'"):
        generated.rendered("<!-- generated: deviations nobody -->\n<!-- end -->")


def said_by_the_code() -> set[str]:
    """Texts of raised errors, prints and logs, each value in them as `…`."""
    found = set()
    for file in (ROOT / "llmselect").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Raise) or called in ("print", "LlmselectError"):
                found |= {text(one) for one in ast.walk(node) if isinstance(one, ast.JoinedStr | ast.Constant)}
    return found


def text(node: ast.JoinedStr | ast.Constant) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_every_message_that_the_faq_quotes_is_said_by_the_code():
    quoted = re.findall(r"^> `(.+)`$", (ROOT / "recipes/faq.md").read_text("utf-8"), re.MULTILINE)
    said = said_by_the_code()
    assert len(quoted) > 12
    assert [message for message in quoted if not any(message in one for one in said)] == []


def test_every_figure_of_the_guide_stands_in_the_file_that_its_line_cites():
    guide = ROOT / "recipes/guide.md"
    checked = 0
    for paragraph in re.split(r"\n\n|\n(?=\|)", guide.read_text("utf-8")):
        figures = re.findall(r"(?<![\d.])[+-]?\d\.\d{3}(?!\d)", paragraph)
        files = [guide.parent / place for place in re.findall(r"\]\((\.\./eval/[^)]+)\)", paragraph)]
        cited = "\n".join(file.read_text("utf-8") for file in files)
        assert all(figure in cited for figure in figures), f"{figures} are not in {files}"
        checked += len(figures)
    assert checked > 15


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(file):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text("utf-8")) if "://" not in link]
    assert [link for link in links if not (file.parent / link).exists()] == []
