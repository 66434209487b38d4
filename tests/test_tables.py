"""What a person sees of reports and histories in a terminal, plain and in colour."""

import dataclasses
import io
import itertools
import re

import numpy as np
import pytest
from fake_reports import fake_reports
from rich.console import Console

import snr_adam
from snr_adam import History
from snr_adam.telemetry import Report
from snr_adam.telemetry.text import numbers

DECADES = (1000.0, 100.0, 10.0, 1.0)


def report(snr, error=0.0, names=None, step=7) -> Report:
    """A report with these SNRs, the last of them for all layers."""
    (made,) = fake_reports(1, len(snr) - 1)
    error = np.broadcast_to(error, len(snr))
    low = np.where(np.isnan(error), snr, np.array(snr) - 2 * np.nan_to_num(error))
    numbers = {"snr": np.array(snr), "snr_error": error, "snr_low": low}
    columns = made.columns | {key: x[:-1] for key, x in numbers.items()}
    total = made.total | {key: float(x[-1]) for key, x in numbers.items()}
    return Report(step, names or made.names, columns, total)


def over_time(*snr, error=0.0) -> History:
    """One layer, and all of them, with these SNRs."""
    return History(report([x, x], error, ("w",), step=t) for t, x in enumerate(snr, start=1))


def runs(shown, width=140) -> list[list[tuple[str, str | None]]]:
    """The lines that `rich` draws, each as texts in one colour."""
    console = Console(file=io.StringIO(), width=width, color_system="standard", force_terminal=True)
    segments = [(x.text, x.style.color.name if x.style and x.style.color else None) for x in console.render(shown)]
    lines: list[list] = [[]]
    for text, color in segments:
        if text == "\n":
            lines.append([])
        else:
            lines[-1].append((text, color))
    return [
        [("".join(text for text, _ in run), color) for color, run in itertools.groupby(line, lambda x: x[1])]
        for line in lines
        if line
    ]


def lines(shown, width=140) -> list[str]:
    return ["".join(text for text, _ in line) for line in runs(shown, width)]


def test_in_colour_it_says_the_same():
    for shown in (report([1.0, 0.1, 0.5]), over_time(*DECADES)):
        plain, colored = str(shown).split("\n"), lines(shown, 115)  # bars take 10 more
        rows = next(i for i, line in enumerate(plain) if line.startswith("---")) + 2
        assert all(any(line.startswith(row.rstrip("-")) for line in colored) for row in plain[:rows])
        legend = " ".join(" ".join(colored[rows:]).split())
        assert all(part in legend for part in (" ".join(plain[rows:]), "; green: signal was found, red: it was not"))


SEEN = {
    "signal": [0.12345, 1.0, np.nan],
    "noise": [12.345, 3.0, 3000.0],
    "pseudo_snr": [0.0123456, 0.25, np.inf],
    "floor": [0.22942, 0.5, 1.0],
    "snr": [0.1234, 1.26, -0.456],
    "snr_error": [0.0456, np.nan, 2.34],
    "snr_low": [0.034, np.nan, -3.5],
    "persistence": [0.12345, np.nan, -0.0246],
    "significant": [0.195, np.nan, 0.0549],
    "effective_step": [1.2345e-4, np.nan, 2.0],
    "gradient_norm": [1234.5, 7.0, 0.0],
    "noise_scale": [71.4, np.inf, np.nan],
    "noise_scale_error": [12.3, np.inf, np.nan],
    "noise_scale_low": [54.4, 1234.0, np.nan],
    "noise_scale_high": [1030.2, np.inf, np.nan],
}
PRINTED = [
    ["layer", "signal", "noise", "pseudo_snr", "floor", "snr", "persistence", "significant", "effective_step"],
    ["in", "0.123", "12.3", "0.0123", "0.229", "0.12 +- 0.05", "0.123", "19.5%", "1.23e-04"],
    ["out", "1", "3", "0.25", "0.5", "1.3", "-", "-", "-"],
    ["total", "-", "3e+03", "inf", "1", "-0.46 +- 2", "-0.0246", "5.5%", "2.00e+00"],
]
PRINTED_TOO = [["noise scale"], ["71 (54 to 1,030)"], [">= 1,234"], ["-"]]


def seen(step=1234, batch_size=None, order=(0, 1, 2)) -> Report:
    """A report of two layers and all of them with the numbers of `SEEN`, taken in another order if told so."""
    values = {key: [row[i] for i in order] for key, row in SEEN.items()}
    columns = {key: np.array(row[:2]) for key, row in values.items()}
    return Report(step, ("in", "out"), columns, {key: row[2] for key, row in values.items()}, batch_size)


def cells(text) -> list[list[str]]:
    """The head, the layers and the total of a printed table."""
    _, head, first, second, _, total, *_ = str(text).split("\n")
    return [re.split(" {2,}", line) for line in (head, first, second, total)]


def wide(report) -> str:
    """A report's table with all its columns."""
    return "\n".join(line.rstrip() for line in lines(numbers(report)))


def test_every_number_is_printed_under_its_name_with_all_its_digits():
    """Three digits; an SNR has two and its error one; a share has a tenth of a percent; a dash is no number."""
    assert cells(wide(seen())) == [a + b for a, b in zip(PRINTED, PRINTED_TOO, strict=True)]
    shown = " ".join(str(seen()).split("\n"))
    assert shown.startswith("step 1,234 layer")
    assert "; noise scale in batches, with its 95 % interval" in shown
    assert "; noise scale in examples," in " ".join(str(seen(batch_size=32)).split("\n"))


def test_the_title_says_over_how_many_steps_an_average_reaches():
    long = dataclasses.replace(seen(), window=1200)
    assert str(long).startswith("step 1,234; snr, persistence and noise scale over about 1,200 steps\n")
    assert lines(long)[0] == str(long).split("\n")[0]


def test_an_snr_without_an_upper_end_has_no_error_to_print():
    """A third or more of the noise may be signal, for all that is known: `+- inf` says less than nothing."""
    open_ended = seen()
    open_ended.columns["snr_error"][:] = np.inf
    assert [row[5] for row in cells(open_ended)[1:3]] == ["0.12", "1.3"]


def test_over_time_a_number_is_printed_as_in_the_table_of_its_step():
    """The first and the last of each layer, and of all, each with the error of its own time."""
    table, order = cells(wide(seen())), [(2, 0, 1), (1, 2, 0), (0, 1, 2)]
    history = History(seen(step=1000 * (t + 1), order=each) for t, each in enumerate(order))
    for key in PRINTED[0][1:]:
        column = [row[table[0].index(key)] for row in table[1:]]
        head, *rows = cells(history.sparklines(key))
        assert head[:3] == ["layer", "step 1,000", "step 3,000"]
        assert [row[1:3] for row in rows] == [[column[i], column[j]] for i, j in zip(*order[::2], strict=True)]


def test_bars_are_logarithmic():
    shown = lines(report([1000.0, 100.0, 1e-9, -1.0, np.nan, np.inf, 20.0]))
    bars = [line[shown[1].index("SNR") :].strip() for line in shown]
    assert bars[2:8] == ["█" * 8, "█" * 6, "▏", "", "", "█" * 8]  # over four decades
    assert bars[9] == "█" * 4 + "▋"


def test_where_no_signal_was_found_it_is_red():
    shown = report([1.0, 0.3, -1.0, np.inf, np.nan, 0.5], [0.4, 0.2, 0.1, np.nan, np.nan, 0.25])
    colors = [line[0][1] for line in runs(shown)]
    assert colors[2:7] == ["green", "red", "red", "green", None]
    assert colors[8] == "red"


@pytest.mark.parametrize("width", [200, 140, 100, 80, 40])
def test_columns_without_room_are_left_out_and_named(width):
    names = ("blocks/0/attention/query/kernel", "[red]a layer[/red] :smile:")
    shown = lines(report([1.0, 0.1, 0.5], names=names), width)
    assert max(map(len, shown)) <= width
    assert ("no room for" in " ".join(shown)) == ("effective_step" not in shown[1]) == (width < 200)
    if width >= 80:
        assert shown[3].startswith("[red]a layer[/red] :smile:  ")
        assert "…" not in "".join(shown)
        assert all(head in shown[1] for head in ("layer", "snr", "noise scale", "SNR"))


def test_a_sparkline_has_a_height_per_power_and_a_gap_where_there_is_no_number():
    history = over_time(*DECADES, np.nan, -5.0, 0.0, np.inf, 0.1)
    layer = str(history).split("\n")[2]
    assert layer == "w      1e+03 +- 0  0.1 +- 0  █▆▅▃ ▁▁█▁"
    assert "▁ is 0.1 or less, █ 1e+03 or more" in str(history)


def test_all_rows_are_on_one_scale():
    text = str(History([report([100.0, 1.0, 10.0])]))
    assert [line[-1] for line in text.split("\n") if "+-" in line] == ["█", "▁", "▅"]


def test_small_changes_look_small_and_small_numbers_do_not_take_the_scale():
    assert "▁ is 0.11 or less, █ 1.1 or more" in str(over_time(1.0, 1.1, 1.0))
    assert str(over_time(1.0, 1.1, 1.0)).split("\n")[2].endswith("███")
    assert "▁ is 0.0001 or less" in str(over_time(1.0, 1e-30))
    assert str(over_time(-1.0, -2.0)).split("\n")[2].endswith("▁▁")


def test_a_few_outliers_do_not_take_the_scale():
    history = over_time(*np.geomspace(10.0, 1.0, 30), 1e6, *np.geomspace(10.0, 1.0, 99))
    assert "▁ is 1 or less, █ 10 or more" in str(history.sparklines(width=200))


def test_more_reports_than_blocks_show_medians():
    history = over_time(*np.repeat(DECADES, 25))
    shown = str(history.sparklines(width=4))
    assert shown.split("\n")[2].endswith("  █▆▃▁")
    assert "the median of up to 25 reports" in shown.replace("\n", " ")
    outlier = over_time(1.0, 1e6, 1.0, np.nan, np.nan, np.nan, 10.0, np.nan, 10.0)
    assert str(outlier.sparklines(width=3)).split("\n")[2].endswith("  ▁ █")
    assert len(str(over_time(*DECADES * 25)).split("\n")[2].split("  ")[-1]) == 40


def test_over_time_green_turns_red():
    (line,) = [line for line in runs(over_time(*DECADES, np.nan, error=6.0)) if line[0][0].startswith("w")]
    assert [color for _, color in line if color] == ["green", "red"]
    assert [text for text, color in line if color] == ["█▆", "▃▁"]


def test_any_quantity_over_time_has_the_colours_of_its_snr():
    history = History(fake_reports(5, 3))
    for key in history.columns:
        table = history.sparklines(key)
        assert str(table).startswith(f"{key} in 5 reports\n")
        assert [x.styles for x in table.drawings] == [x.styles for x in history.sparklines().drawings]


def test_a_history_without_snr_or_without_anything_has_a_text():
    assert str(History()) == "0 reports"
    assert lines(History())[0] == "0 reports"
    odd = Report(3, ("w",), {"loss": np.array([2.0])}, {"loss": 2.0})
    assert str(History([odd])).startswith("loss in 1 report\n")
    assert runs(History([odd]))[2][0][1] is None
    assert "green" not in "".join(lines(History([odd])))


def test_what_cannot_be_drawn_says_why():
    with pytest.raises(KeyError, match="no quantity 'nose'; there are size"):
        over_time(1.0).sparklines("nose")
    with pytest.raises(ValueError, match="width=0: a sparkline needs at least 1"):
        over_time(1.0).sparklines(width=0)
    with pytest.raises(KeyError, match="there are none yet"):
        snr_adam.History().sparklines()


def rounding_in_h10() -> Report:
    """Layers of a tree that is flattened by name; the gradient of the last is rounding."""
    (made,) = fake_reports(1, 3)
    columns = made.columns | {"gradient_norm": np.array([1.0, 1e-9, 1.0]), "size": np.ones(3), "snr_low": np.ones(3)}
    names = (f"h_1/{'attention/' * 9}kernel", "h_10/<b>&", "h_2")
    return Report(1, names, columns, made.total)


def test_printed_text_fits_100_columns_and_keeps_the_order_of_the_network():
    shown = rounding_in_h10()
    history = History([shown])
    for printed in (str(shown), *(str(history.sparklines(key)) for key in ("snr", "noise_scale", "significant"))):
        names = [line.split()[0] for line in printed.split("\n")[2:5]]
        assert [name[:3] for name in names] == ["h_1", "h_2", "h_1"]
        assert max(map(len, printed.split("\n"))) <= 100
        assert "h_10/<b>& ~ " in printed
        assert "~: the gradient is at the level of rounding" in printed.replace("\n", " ")
    assert "~" not in str(seen())


def test_a_legend_explains_the_columns_that_are_there():
    shown = " ".join(str(seen()).split())
    assert shown.endswith("no room for effective_step")
    assert "effective_step:" not in shown
    assert "floor: what pure noise shows" in shown
    assert "effective_step: rms of the update" in " ".join(lines(numbers(seen()), 200))


def test_notebooks_draw_a_table():
    """With every column, and names as text."""
    html = rounding_in_h10()._repr_html_()
    assert [html.count(tag) for tag in ("<table>", "</table>", "<tr>", "</tr>", "<th ", "</th>")] == [
        1,
        1,
        5,
        5,
        11,
        11,
    ]
    assert html.count("<td ") == html.count("</td>") == 4 * 11
    assert "h_10/&lt;b&gt;&amp; ~" in html
    assert "<b>" not in html
    assert "effective_step" in html
    colored = over_time(*DECADES, np.nan, error=6.0)._repr_html_()
    assert "<span style='color:green'>█▆</span><span style='color:red'>▃▁</span>" in colored
    assert History()._repr_html_() == "<p>0 reports</p>"
    plain = over_time(*DECADES).sparklines()._repr_html_()
    assert plain.startswith("<table><caption style='text-align:left'>snr in 4 reports</caption>")
