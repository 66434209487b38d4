"""What README and docs say is true: their code runs, their links lead somewhere, their numbers are the results'."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
CODE = FENCE.findall(README)
# notebooks run when the documentation is built; clients of trackers are not installed for the default run
PAGES = {
    str(page.relative_to(ROOT / "docs")): page.read_text()
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if FENCE.search(page.read_text()) and "generated" not in page.parts
}
CLIENTS = re.compile(r"import (wandb|mlflow|tensorboardX|trackio)\b")


def run(code: str, names: dict, capsys) -> None:
    """Runs a block; what it prints is what stands in comments beside the prints, if any do."""
    exec(code, names)
    said, expected = capsys.readouterr().out.splitlines(), re.findall(r"print\(.*\)  # (.*)", code)
    assert not expected or said == expected


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Blocks may write files."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", range(len(CODE)))
def test_a_block_of_the_readme_runs_as_it_stands(number, capsys):
    """In one paste. The first ones print the table: every layer, the total, and a signal that was found."""
    code, names = CODE[number], {}
    exec(code, names)
    said = capsys.readouterr().out
    if expected := re.findall(r"print\(.*\)  # (.*)", code):
        assert said.splitlines() == expected
    else:
        lines = said.splitlines()
        assert re.match(r"step [12]00; snr, persistence and noise scale over about \d+ steps", lines[0])
        layers = [line.split()[0] for line in lines[2:6] if "---" not in line]
        assert layers in (["hidden", "out", "total"], ["bias", "kernel", "total"], ["weight", "bias", "total"])
        assert ">=" not in lines[5]
    if "def step(" in code:
        _train(names)


def _train(names):
    x, y = jax.random.normal(jax.random.key(0), (32, 64)), jnp.ones((32, 10))
    losses = []
    for _ in range(20):
        if "optimizer" in names:
            losses.append(names["step"](names["model"], names["optimizer"], x, y))
        else:
            names["model"], names["state"], loss = names["step"](names["model"], names["state"], x, y)
            losses.append(loss)
    assert losses[-1] < 0.99 * losses[0]


def test_the_first_block_is_short():
    assert len(CODE[0].splitlines()) <= 15
    assert len([code for code in CODE if "snr_adam.observe(" in code]) == 3  # plain, NNX, Equinox


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, capsys):
    """Block after block, as its reader would paste them."""
    names: dict = {}
    for code in FENCE.findall(PAGES[page]):
        if not CLIENTS.match(code):
            run(code, names, capsys)


SITE = "https://snr-adam.github.io/snr_adam/"
FILES = "https://github.com/snr-adam/snr_adam/blob/main/"


def test_links_of_the_readme_are_absolute_and_lead_somewhere():
    """They work on a package index too."""
    links = re.findall(r"\]\((\S+?)\)", README)
    assert len(links) > 10
    assert [x for x in links if not x.startswith("https://")] == []
    for link in links:
        if link.startswith(SITE):
            page = link.removeprefix(SITE).removesuffix(".html")
            assert "generated" in page or (ROOT / "docs" / f"{page}.md").exists(), link
        if link.startswith(FILES):
            assert (ROOT / link.removeprefix(FILES)).exists(), link
    assert (ROOT / "docs" / "digits.png").exists()


def test_the_numbers_are_those_of_the_results():
    readme = script("benchmarks", "readme")
    changed = [path.name for path, text in readme.pages().items() if path.read_text() != text]
    assert changed == [], "run benchmarks/readme.py"
