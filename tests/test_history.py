"""A history gives back what was appended, also from a file, and refuses reports that do not belong to it."""

import io
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
from fake_reports import QUANTITIES, fake_reports

from snr_adam import History

FILES = ("run.npz", "run.jsonl")


def assert_same(a: History, b: History):
    assert a.names == b.names
    np.testing.assert_array_equal(a.steps, b.steps)
    for mine, other in ((a.columns, b.columns), (a.total, b.total)):
        assert list(mine) == list(other)
        for key in mine:
            assert mine[key].dtype == other[key].dtype == np.float64
            np.testing.assert_array_equal(mine[key].view(np.uint64), other[key].view(np.uint64), strict=True)


def one(step=1, names=("a", "b"), **columns):
    columns = columns or {"noise": [1.0, 2.0]}
    return SimpleNamespace(step=step, names=names, columns=columns, total={key: 1.0 for key in columns})


def test_it_holds_what_was_appended():
    reports = list(fake_reports(7, 3))
    history = History()
    for report in reports:
        history.append(report)
    assert len(history) == 7
    assert history.names == reports[0].names
    np.testing.assert_array_equal(history.steps, np.arange(10, 80, 10))
    assert set(history.columns) == set(history.total) == set(QUANTITIES)
    for key in QUANTITIES:
        np.testing.assert_array_equal(history.columns[key], [report.columns[key] for report in reports])
        np.testing.assert_array_equal(history.total[key], [report.total[key] for report in reports])
    assert_same(history, History(reports))


def test_rows_are_a_flat_table():
    history = History(fake_reports(3, 4))
    rows = history.rows
    assert [(row["step"], row["name"]) for row in rows] == [(10 * t, name) for t in (1, 2, 3) for name in history.names]
    for key, values in history.columns.items():
        np.testing.assert_array_equal([row[key] for row in rows], values.ravel())
    assert {type(x) for row in rows for x in row.values()} == {int, str, float}
    assert all(tuple(row) == ("step", "name", *history.columns) for row in rows)
    assert History().rows == []


@pytest.mark.parametrize("file", FILES)
def test_batch_sizes_are_kept(file, tmp_path):
    reports = [one(step) for step in (1, 2, 3)]
    reports[1].batch_size, reports[2].batch_size = 32, None
    history = History(reports)
    np.testing.assert_array_equal(history.batch_size, [np.nan, 32, np.nan])
    history.save(tmp_path / file)
    np.testing.assert_array_equal(History.load(tmp_path / file).batch_size, [np.nan, 32, np.nan])
    history.append(one(2))
    np.testing.assert_array_equal(history.batch_size, [np.nan, np.nan])
    history.save(tmp_path / file)  # the file says nothing of batches
    np.testing.assert_array_equal(History.load(tmp_path / file).batch_size, [np.nan, np.nan])


def test_a_quantity_that_comes_later_was_not_known_before(tmp_path):
    """As when a run goes on with a newer version of this package."""
    history = History([one(1), one(2)])
    history.append(one(3, signal=[5.0, 6.0], noise=[1.0, 2.0]))
    np.testing.assert_array_equal(history.columns["signal"], [[np.nan] * 2, [np.nan] * 2, [5, 6]])
    np.testing.assert_array_equal(history.total["signal"], [np.nan, np.nan, 1])
    history.save(tmp_path / "run.npz")
    assert_same(History.load(tmp_path / "run.npz"), history)
    history.append(one(3, signal=[5.0, 6.0], noise=[1.0, 2.0]))
    assert len(history) == 3


def test_it_keeps_a_copy():
    noise = np.ones(2)
    history = History([one(noise=noise)])
    noise[:] = 7
    history.columns["noise"][:] = 8
    np.testing.assert_array_equal(history.columns["noise"], [[1, 1]])


@pytest.mark.parametrize("file", FILES)
def test_the_same_bits_come_back(file, tmp_path):
    history = History(fake_reports(5, 4))
    awkward = [np.nan, np.inf, -np.inf, -0.0, 5e-324, 0.1 + 0.2, np.pi * 1e300, 1.0]
    names = tuple('ab/"[ü]~,\n'[i:] + str(i) for i in range(len(awkward)))
    odd = History(
        SimpleNamespace(step=2**40 + t, names=names, columns={"x": awkward}, total={"x": x})
        for t, x in enumerate(awkward)
    )
    for i, each in enumerate((history, odd, History(), History([one(names=(), noise=[])]))):
        path = tmp_path / "new" / "folder" / f"{i}-{file}"
        each.save(path)
        assert_same(History.load(path), each)
        assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_the_lines_are_strict_json(tmp_path):
    path = tmp_path / "run.jsonl"
    History([one(noise=[np.nan, np.inf])]).save(str(path))

    def refuse(constant):
        raise AssertionError(constant)

    first, line = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert first["names"] == ["a", "b"]
    assert line == {"step": 1, "total": {"noise": 1.0}, "columns": {"noise": [None, "inf"]}}


@pytest.mark.parametrize("file", FILES)
def test_a_saved_history_goes_on(file, tmp_path):
    reports = list(fake_reports(6, 2))
    History(reports[:3]).save(tmp_path / file)
    history = History.load(tmp_path / file)
    for report in reports[3:]:
        history.append(report)
    history.save(tmp_path / file)
    assert_same(History.load(tmp_path / file), History(reports))


@pytest.mark.parametrize("again", [3, 2, 1])
def test_going_on_from_an_older_step_replaces_what_came_after(again):
    history = History(one(step, noise=[step, step]) for step in (1, 2, 3))
    history.append(one(again, noise=[9, 9]))
    np.testing.assert_array_equal(history.steps, np.arange(1, again + 1))
    np.testing.assert_array_equal(history.columns["noise"][:, 0], [*range(1, again), 9])
    assert len(history.total["noise"]) == len(history) == again


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (one(2, ("a", "c")), r"other layers \(new: c; gone: b\)"),
        (one(2, ("a", "b", "c"), noise=[1, 2, 3]), r"new: c\)"),
        (one(2, ("b", "a")), "another order: b, a was a, b"),
        (one(2, signal=[1, 2]), r"other quantities \(gone: noise\)"),
        (
            SimpleNamespace(step=2, names=("a", "b"), columns={"noise": [1, 2]}, total={}),
            r"other totals \(gone: noise\)",
        ),
        (one(2, noise=[1, 2, 3]), r"\(3,\) of 'noise' for 2 layers"),
    ],
)
def test_a_report_of_another_model_is_refused(report, message):
    history = History([one()])
    with pytest.raises(ValueError, match=message):
        history.append(report)
    assert_same(history, History([one()]))


@pytest.mark.parametrize("noise", [1.0, [1.0], [1.0, 2.0, 3.0], [[1.0], [2.0]], np.ones((2, 3)), np.ones((1, 2))])
@pytest.mark.parametrize("before", [0, 1])
def test_a_quantity_is_one_number_for_each_layer(noise, before):
    """Also in the first report, which says for all what a row looks like."""
    history = History(one(step) for step in range(before))
    shape = re.escape(str(np.shape(noise)))
    with pytest.raises(ValueError, match=rf"{shape} of 'noise' for 2 layers"):
        history.append(one(7, noise=noise))
    assert_same(history, History(one(step) for step in range(before)))


@pytest.mark.parametrize("total", [[1.0], [1.0, 2.0], np.ones((1, 1)), []])
def test_a_total_is_one_number(total):
    report = one()
    report.total["noise"] = total
    with pytest.raises(ValueError, match=rf"{re.escape(str(np.shape(total)))} of 'noise' in total: give one number"):
        History([report])
    for number in (2.0, np.float32(2.0), np.array(2.0)):
        report.total["noise"] = number
        assert History([report]).total["noise"].shape == (1,)


def test_an_unknown_quantity_is_told():
    with pytest.raises(KeyError, match="no quantity 'nose'; there are noise"):
        History([one()]).columns["nose"]


def test_other_files_are_refused(tmp_path):
    for verb in (History().save, History.load):
        with pytest.raises(ValueError, match=r"run.csv: .* \.npz or \.jsonl"):
            verb(tmp_path / "run.csv")
    np.savez(tmp_path / "x.npz", a=1)
    (tmp_path / "x.jsonl").write_text('{"format": "snr_adam history, version 7"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("x.npz", "x.jsonl", "empty.jsonl"):
        with pytest.raises(ValueError, match="not a snr_adam history, version 1"):
            History.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "none.npz")


def lines_of(text, *numbers):
    lines = text.splitlines(keepends=True)
    return "".join(lines[n] for n in numbers)


def old(text):
    """As it was written before the first line said what follows."""
    first, *rest = text.splitlines(keepends=True)
    said = json.loads(first)
    return json.dumps({key: said[key] for key in ("format", "names")}) + "\n" + "".join(rest)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, format="snr_adam history, version 1", **arrays)
    return file.getvalue()


def npy():
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


TWO = {"steps": [1, 2], "names": ["a"], "columns/noise": np.ones((2, 1)), "total/noise": np.ones(2)}
IN_PIECES = {
    "run.npz": {
        "cut": (lambda data: data[: len(data) // 2], "no zip file"),
        "cut at the end": (lambda data: data[:-1], "no zip file|"),
        "empty": (lambda _: b"", "no zip file"),
        "another kind of file": (lambda _: b"steps,noise", "no zip file"),
        "an array": (lambda _: npy(), "no zip file"),
        "one bit": (lambda data: data[:582] + bytes([data[582] ^ 1]) + data[583:], ""),
        "nothing in it": (lambda _: npz(), "names"),
        "steps that fall": (lambda _: npz(**TWO | {"steps": [2, 1]}), "step 1 comes after step 2"),
        "a step twice": (lambda _: npz(**TWO | {"steps": [2, 2]}), "step 2 comes after step 2"),
        "steps that are none": (lambda _: npz(**TWO | {"steps": [1.5, 2.0]}), "1.5 is no step"),
        "a column cut": (lambda _: npz(**TWO | {"columns/noise": np.ones((1, 1))}), r"noise has shape \(1, 1\) for 2"),
        "a total too long": (lambda _: npz(**TWO | {"total/noise": np.ones(3)}), r"total/noise has shape \(3,\) for 2"),
        "words": (lambda _: npz(**TWO | {"columns/noise": np.array([["x"], ["y"]])}), "columns/noise is of <U1"),
        "objects": (lambda _: npz(**TWO | {"steps": np.array([{}], object)}), "Object arrays cannot be loaded"),
    },
    "run.jsonl": {
        "cut": (lambda text: text[:-20], "has crc32 .* where its first line says"),
        "cut after a line": (lambda text: lines_of(text, 0, 1, 2), "has reports 2 where its first line says 3"),
        "cut in the first line": (lambda text: text[:9], "Unterminated string|Expecting"),
        "one digit": (lambda text: text.replace("2.5", "2.6"), "has crc32"),
        "lines exchanged": (lambda text: lines_of(text, 0, 2, 1, 3), "has crc32"),
        "no text": (lambda _: b"\xff\xfe\x00", "utf-8"),
        "names that are none": (lambda text: old(text).replace('["a", "b"]', '"ab"'), "names are 'ab'"),
        "an old file, cut": (lambda text: old(text)[:-20], "Unterminated string|Expecting"),
        "an old file, lines exchanged": (lambda text: lines_of(old(text), 0, 2, 1), "step 1 comes after step 2"),
        "an old file, a line twice": (lambda text: lines_of(old(text), 0, 1, 1), "step 1 comes after step 1"),
        "an old file, a key less": (lambda text: old(text).replace('"total"', '"totals"'), "total"),
        "an old file, a list": (lambda text: lines_of(old(text), 0) + "[]\n", "list indices"),
        "an old file, a word": (lambda text: old(text).replace("2.5", '"x"'), "could not convert string"),
        "an old file, no step": (lambda text: old(text).replace('"step": 2', '"step": 2.5'), "2.5 is no step"),
    },
}


@pytest.mark.parametrize(("file", "kind"), [(file, kind) for file, kinds in IN_PIECES.items() for kind in kinds])
def test_a_file_in_pieces_is_one_error(file, kind, tmp_path):
    """With its path, what is wrong and what to do."""
    change, wrong = IN_PIECES[file][kind]
    path = tmp_path / file
    History(one(step, noise=[2.5, step]) for step in (1, 2, 3)).save(path)
    whole = path.read_bytes() if file == "run.npz" else path.read_text()
    changed = change(whole)
    assert changed != whole
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))} is damaged or was cut short \(.*{wrong}.*\): take an"
    ):
        History.load(path)


@pytest.mark.parametrize("file", FILES)
def test_a_changed_byte_changes_no_number(file, tmp_path):
    """At every place: it is told, or nobody reads it."""
    history, path = History(one(step, noise=[2.5, step]) for step in (1, 2, 3)), tmp_path / file
    history.save(path)
    whole, told = path.read_bytes(), 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        try:
            read = History.load(path)
        except ValueError as error:
            told += str(error).startswith(str(path))
            continue
        read.names = history.names  # of which a .jsonl file keeps no checksum
        assert_same(read, history)
    assert told > len(whole) / 14, "a few bytes are read by nobody"


def test_an_older_file_is_read(tmp_path):
    path, history = tmp_path / "run.jsonl", History(one(step) for step in (1, 2))
    history.save(path)
    path.write_text(old(path.read_text()))
    assert_same(History.load(path), history)


def test_a_users_home_is_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    History([one()]).save("~/run.npz")
    assert_same(History.load("~/run.npz"), History([one()]))
    assert (tmp_path / "run.npz").exists()


@pytest.mark.parametrize("state", [{"w": 1.0}, [one()], None, 3.0], ids=["dict", "list", "None", "number"])
def test_what_is_no_report_is_refused(state):
    match = (
        rf"takes a report and got a {type(state).__name__}, which has no step: write history.append\(snr_adam.report"
    )
    with pytest.raises(TypeError, match=match):
        History().append(state)


@pytest.mark.parametrize("file", FILES)
def test_two_that_save_under_one_name_do_not_share_what_is_unfinished(file, tmp_path):
    """While one is about to finish, another begins and finishes: both are whole, the last to finish is read.

    The other may be a thread, a process or, on a disk that hosts share, one of the same process id.
    """
    short, long, path, unfinished = History([one()]), History(fake_reports(9, 4)), tmp_path / file, []

    def meanwhile(source, target):
        unfinished.append(source)
        if len(unfinished) == 1:
            long.save(path)
            assert_same(History.load(path), long)
            assert [p.name for p in tmp_path.iterdir() if p not in unfinished] == [file]
        assert source.exists()
        rename(source, target)

    rename = os.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", meanwhile)
        short.save(path)
    assert_same(History.load(path), short)
    assert len(set(unfinished)) == 2
    assert all(each.parent == tmp_path for each in unfinished)  # on one disk, so that it appears at once
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("file", FILES)
def test_a_failed_save_leaves_the_old_file(file, tmp_path, monkeypatch):
    History([one()]).save(tmp_path / file)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        History(fake_reports(2, 2)).save(tmp_path / file)
    assert_same(History.load(tmp_path / file), History([one()]))
    assert [path.name for path in tmp_path.iterdir()] == [file]
