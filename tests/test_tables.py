"""What a person sees of reports and histories in a terminal, plain and in colour."""

import io
import itertools

import numpy as np
import pytest
from fake_reports import fake_reports
from rich.console import Console

import snr_adam
from snr_adam import History
from snr_adam.telemetry import Report

DECADES = (1000.0, 100.0, 10.0, 1.0)


def report(snr, error=0.0, names=None, step=7) -> Report:
    """A report with these SNRs, the last of them for all layers."""
    (made,) = fake_reports(1, len(snr) - 1)
    error = np.broadcast_to(error, len(snr))
    columns = made.columns | {"snr": np.array(snr[:-1]), "snr_error": error[:-1]}
    total = made.total | {"snr": snr[-1], "snr_error": error[-1]}
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
        plain, colored = str(shown).split("\n"), lines(shown, 250)
        for text in plain[:-1]:
            assert any(line.startswith(text.rstrip("-")) for line in colored)
        assert all(word in " ".join(colored) for word in (plain[-1], "green: signal, red: an SNR within 2 errors"))


def test_bars_are_logarithmic():
    shown = lines(report([1000.0, 100.0, 1e-9, -1.0, np.nan, np.inf, 20.0]))
    bars = [line[shown[1].index("SNR") :].strip() for line in shown]
    assert bars[2:8] == ["█" * 8, "█" * 6, "▏", "", "", "█" * 8]  # over four decades
    assert bars[9] == "█" * 4 + "▋"


def test_what_is_within_two_errors_of_none_is_red():
    shown = report([1.0, 0.3, -1.0, np.inf, np.nan, 0.5], [0.4, 0.2, 0.1, np.nan, np.nan, 0.25])
    colors = [line[0][1] for line in runs(shown)]
    assert colors[2:7] == ["green", "red", "red", "green", None]
    assert colors[8] == "red"


@pytest.mark.parametrize("width", [140, 100, 80, 40])
def test_columns_without_room_are_left_out_and_named(width):
    names = ("blocks/0/attention/query/kernel", "[red]a layer[/red] :smile:")
    shown = lines(report([1.0, 0.1, 0.5], names=names), width)
    assert max(map(len, shown)) <= width
    assert ("no room for" in " ".join(shown)) == ("gradient_norm" not in shown[1])
    assert shown[3].startswith("[red]a layer[/red] :smile:  ")
    if width >= 80:
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
    text = str(history.sparklines(width=4))
    assert text.split("\n")[2].endswith("  █▆▃▁")
    assert "the median of up to 25 reports" in text
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
