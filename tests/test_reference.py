"""The reference that docs/reference.py writes from the code: a page for each name, the family, every error."""

import inspect

import cases
import pytest

import snr_adam
from snr_adam import parts, state, telemetry

reference = cases.script("docs", "reference")


@pytest.mark.parametrize("module", [snr_adam, parts, telemetry, state], ids=lambda x: x.__name__)
def test_each_public_name_has_a_page(module):
    found = dict(reference.pages()[module.__name__])
    assert set(found) == {key for key in module.__all__ if not inspect.ismodule(getattr(module, key))}
    assert all(f".. auto{'class' if isinstance(getattr(module, key), type) else 'function'}::" in reference._page(page)
               for key, page in found.items())  # fmt: skip


def test_an_object_has_one_page():
    assert dict(reference.pages()["snr_adam.telemetry"])["report"] == "snr_adam.report"


def test_the_family_is_what_each_preset_builds():
    assert set(reference.presets()) == set(cases.PRESETS)
    rows = {line.split("`")[1]: line for line in reference._family().splitlines() if line.startswith("| [`")}
    assert set(rows) == set(cases.PRESETS)
    assert all("`EMA()`" in rows[key] and "`RMS()`" in rows[key] for key in ("adam", "adamw", "stable_adamw"))
    assert "`FromMean(b2=0.95)`" in rows["adams"]
    assert "| 4 | Zhang et al. [2505.16363]" in rows["adams"]
    assert "`CorrectedDecay(peak=0.001)`" in rows["adamc"]


def test_an_error_is_found_by_its_words():
    source = 'raise ValueError(f"b is {b}: must be" + words)\nTypeError("no")\nKeyError(x)\nIndexError("i" f"{j!r}")'
    one, two, three = reference.messages(source)
    assert one == ("b is {b}: must be{...}", "ValueError", 1)
    assert two[0] == "no"
    assert three[0] == "i{j}"
    assert "no telemetry in this state" in reference._errors()


def test_docstrings_are_plain_text_with_equations():
    lines = [
        "Divides |m^| by n_, *once*: see `adam`.",
        "",
        "    u = m_t / n",
        "",
        "Args: as `adam`, and",
        "  b: `x + 1`, `y of",
        "    two lines` and `Word`s",
        "",
    ]
    reference.as_rst(None, "function", "f", None, None, lines)
    assert lines[0] == r"Divides \|m^\| by n\_, *once*: see :py:obj:`adam <snr_adam.adam>`."
    text = "\n".join(lines)
    assert ".. code-block:: text\n\n    u = m_t / n\n" in text
    assert "Args:\n  b: ``x + 1``, ``y of two lines`` and :py:obj:`Word`\\ s" in text
