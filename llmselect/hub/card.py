"""Dataset and model cards. Every text from data, recipes and folders is escaped for HTML, Markdown and YAML alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# As entities these neither end a table cell or a paragraph nor begin a link, a picture, code or HTML.
_MARKS = {ord(one): f"&#{ord(one)};" for one in "\\`*[]<>&|~$\"'"}

DATASET = """\
---
{{ head }}---

# {{ name }}

{{ subsets | length }} selection{{ "s" if subsets | length > 1 }} of instruction data, made by llmselect {{ version }}. \
Rows stand in rank order, the best first.

```python
from datasets import load_dataset

rows = load_dataset("{{ repo }}", "{{ subsets[0].name }}", split="train")
{%- if scores %}
scores = load_dataset("{{ repo }}", "scores", split="train")  # of the whole pool, by row id
{%- endif %}
```

## What was selected, and how

Pool: {{ origin.pool | cell }}, {{ pool_rows }} rows{% if origin.revision %}, revision {{ origin.revision | cell }}{% endif %}. \
{% if origin.model %}Model: {{ origin.model | cell }}. {% endif %}\
Digests of pool, model and selections are in `llmselect.json`{% if origin.recipe %}, the recipe in `recipe.yaml`{% endif %}.

| configuration | method | selector | settings | budget | seed | rows |
|---|---|---|---|---|---|---|
{% for one in subsets -%}
| {{ one.name | cell }} | {{ one.method | cell }} | {{ one.about.selector | cell }} | \
{{ one.settings | pairs | cell }} | {{ one.about.budget | pairs | cell }} | {{ one.about.seed | cell }} | \
{{ one.selection | length }} |
{% endfor %}
{%- if features %}
| feature | extractor | settings |
|---|---|---|
{% for key, one in features.items() -%}
| {{ key | cell }} | {{ one.extractor | cell }} | {{ one.settings | pairs | cell }} |
{% endfor %}
{%- endif %}
{%- if mix %}
## Sources

Share of the rows, seeds averaged.
{% if picture %}
![Shares of the sources in the pool and in the selections](source-mix.png)
{% endif %}
| source |{% for side in mix.shares %} {{ side | cell }} |{% endfor %}
|---|{% for side in mix.shares %}---|{% endfor %}
{% for source, values in mix.lines() -%}
| {{ source | cell }} |{% for value in values %} {{ value }} |{% endfor %}
{% endfor %}
{%- endif %}
## Licence

{% if licence.id is none -%}
Neither the rows nor their source state a licence, so none is given here. Ask whoever made the pool.
{%- elif licence.rows | length == 1 -%}
As the rows or their source state it. The rows are the work of others; this selection adds no terms.
{%- else -%}
The rows carry several licences; each row goes by its own, in the column `license` where it states one.
{%- endif %}

| licence | rows |
|---|---|
{% for name, count in licence.rows.items() -%}
| {{ name | cell }} | {{ count }} |
{% endfor %}
## Reproduce

{{ reproduce }}
{% if bibtex %}
## Citation

{{ bibtex | fenced("bibtex") }}
{% endif %}"""

MODEL = """\
---
{{ head }}---

# {{ name }}

LoRA adapters of {{ base | cell }}, fine-tuned on the responses of rows chosen by llmselect {{ version }}: the dataset \
{{ repo | cell }}. The licences of the base model and of the data apply; none is given here.

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{{ repo }}", subfolder="{{ adapters[0].folder }}")
```

| folder | method | rows | supervised tokens | steps | epochs | training loss | seed |
|---|---|---|---|---|---|---|---|
{% for one in adapters -%}
| {{ one.folder | cell }} | {{ one.method | cell }} | {{ one.rows | cell }} | {{ one.tokens | cell }} | \
{{ one.steps | cell }} | {{ one.epochs | cell }} | {{ one.loss | cell }} | {{ one.seed | cell }} |
{% endfor %}
Settings, versions and checksums are in each folder's `train.json`.
"""


def render(template: str, head: Mapping[str, Any], **values: Any) -> str:
    """`template` with `head` as its YAML front matter; `values` are escaped."""
    import jinja2
    import yaml
    from markupsafe import Markup

    environment: Any = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"cell": cell, "pairs": pairs, "fenced": fenced}
    # ASCII, so that no other reader takes U+0085 and the like for the end of a line.
    front = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=False, width=1000)
    return environment.from_string(template).render(head=Markup(front), **values)


def cell(value: object) -> Any:
    """Text for one cell or line of Markdown."""
    from markupsafe import Markup

    text = "" if value is None else str(value)
    flat = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return Markup((flat if len(flat) <= 300 else flat[:299] + "…").translate(_MARKS))


def pairs(value: Mapping[Any, Any] | None) -> str:
    """A mapping as `key: value, …`; None stays empty."""
    return ", ".join(f"{key}: {one}" for key, one in (value or {}).items())


def fenced(text: str, language: str) -> Any:
    """A code block that nothing inside `text` can end."""
    from markupsafe import Markup

    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}\n")


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    limits = [10 ** (3 + i) for i in range(len(steps))]
    if rows < limits[0]:
        return "n<1K"
    for i in range(len(steps) - 1):
        if rows < limits[i + 1]:
            return f"{steps[i]}<n<{steps[i + 1]}"
    return "n>1T"
