"""A history gives back what was appended, also from a file, and refuses reports that do not belong to it."""

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
        (one(2, signal=[1, 2]), r"other quantities \(new: signal; gone: noise\)"),
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
