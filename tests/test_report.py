"""`fastssl report`: one page that needs nothing else, with the numbers, whatever the runs lack or are called."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from fastssl import report as module
from fastssl.cli import main
from fastssl.report import POINTS, read_run

HOSTILE = '<script>alert("1")</script><img src=http://x.example/y.png>'
VOID = {"meta", "img", "path", "circle", "br"}


class Page(HTMLParser):
    """Texts, tags and references of a page; every tag must be closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [
            value for name, value in attributes if name in ("src", "href", "srcset", "data", "xlink:href")
        ]
        self.references += [word for name, value in attributes for word in re.findall(r"url\(([^)]*)", value or "")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def row(self, head):
        """The cells of the first table row that begins with `head`, joined."""
        text = "\x00".join(self.texts)
        return text[text.index(f"\x00{head}\x00") + len(head) + 2 :].split("\x00")


def make_run(folder, lr=0.1, k=20, method="mae", lines=20):
    """A run of `lines` log lines: loss 10 / step, k-NN at two steps, a warning, pictures, an evaluation."""
    (folder / "pictures").mkdir(parents=True)
    config = {"method": method, "model": {"name": "vit_tiny"}, "optim": {"lr": lr}, "monitor": {"k": k}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"schedule": {"epochs": 2}}))
    rows = [
        {"step": s, "epoch": s / 10, "loss": 10 / s, "lr": lr, "grad_norm": float(s), "time": 1e9 + 360 * s}
        for s in range(1, lines + 1)
    ]
    rows += [{"step": 10, "epoch": 1.0, "knn_top1": 61.25}, {"step": lines, "epoch": lines / 10, "knn_top1": 57.5}]
    rows.append({"step": 15, "health": f"step 15: features have collapsed {HOSTILE}"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "starts.jsonl").write_text(
        json.dumps({"time": 1e9, "command": f"fastssl {HOSTILE}", "gpu": "H200"}) + "\n"
    )
    for step in (2, 4, 6, 8, 20):
        Image.new("RGB", (1200, 600), (250, 0, 250)).save(folder / "pictures" / f"attention-{step:07d}.png")
    one = {"protocol": "knn", "checkpoint": str(folder / "last.pt"), "step": 20, "data": "tr", "val": "te", "time": 1e9}
    one |= {
        "options": {"blocks": 1, "device": "cpu"},
        "results": {"top1": 71.5 + lr, "top1_interval": [70.25, 73.5], "seconds": 3.25},
    }
    (folder / "evaluations.jsonl").write_text(json.dumps(one) + "\n")
    return folder


def make_page(tmp_path, *runs, options=()):
    out = tmp_path / "page.html"
    assert main(["report", *map(str, runs), f"--out={out}", *options]) == 0
    return out, Page(out.read_text())


def test_a_page_of_two_runs_needs_nothing_else_and_has_the_numbers(tmp_path):
    first, second = make_run(tmp_path / "a", lr=0.1), make_run(tmp_path / "b", lr=0.2)
    out, page = make_page(tmp_path, first, second)
    assert "script" not in page.tags
    assert page.references
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)
    assert "default-src 'none'" in out.read_text()
    text = " ".join(page.texts)
    assert page.row("optim.lr")[:2] == ["0.1", "0.2"]
    assert "optim.lr" in text[text.index("Settings that differ") : text.index("Curves")]
    assert "schedule.epochs" not in text[text.index("Settings that differ") : text.index("Curves")]
    assert page.row("loss at the end")[:2] == ["0.5000", "0.5000"]
    assert page.row("online k-NN, top-1 %")[:2] == ["57.5", " (best 61.2 in epoch 1)"]
    assert page.row("evaluate knn, top1")[:2] == ["71.6", "71.7"]
    assert "<b>71.7</b>" in out.read_text()
    assert page.texts.count("(70.25 to 73.5)") == 2
    assert "H200" in text
    assert page.tags.count("img") == 2 * 4
    assert [f"step {step}, epoch {step / 10:g}" in text for step in (2, 4, 6, 8, 20)] == [True, True, False, True, True]
    assert "0.5 at 2" in text.replace("  ", " ")  # of the loss: the lowest, and where
    assert HOSTILE in text


def test_what_was_not_measured_alike_is_not_compared(tmp_path):
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", k=10, method="dino")
    path = runs[1] / "evaluations.jsonl"
    path.write_text(path.read_text().replace('"blocks": 1', '"blocks": 4'))
    out, page = make_page(tmp_path, *runs)
    assert page.texts.count("(not measured alike)") == 2
    assert "<b>71" not in out.read_text()
    assert {"loss (mae)", "loss (dino)"} <= set(page.texts)  # no common scale


def test_what_only_some_runs_have_stands_apart(tmp_path):
    """A setting of one run, and an evaluation of an earlier checkpoint."""
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.2)
    with open(runs[0] / "config.yaml", "a") as file:
        file.write("mae: {mask_ratio: 0.75}\n")
    path = runs[1] / "evaluations.jsonl"
    path.write_text(path.read_text().replace('"step": 20', '"step": 10'))
    _, page = make_page(tmp_path, *runs, options=["--pictures=0"])
    text = "\x00".join(page.texts)
    differing, partly = text[text.index("Settings that differ") :].split("1 settings that not all of the runs have")
    assert "optim.lr" in differing
    assert "mae.mask_ratio" in partly
    assert "mae.mask_ratio" not in differing
    assert page.row("evaluate knn, top1")[:3] == ["71.6", "71.7", " "]
    assert page.texts.count("at step 10") == 1


def test_hostile_names_are_text(tmp_path):
    name = HOSTILE.replace("/", "_")
    run = make_run(tmp_path / name)
    config = {"method": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE, "\ud800"]}, "model": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    rows = [{"step": 1, HOSTILE: 1.0, "epoch": 1}, {"step": 2, HOSTILE: 3.0, "epoch": 2}]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    one = {
        "protocol": HOSTILE,
        "options": {HOSTILE: HOSTILE},
        "results": {HOSTILE: 1.5},
        "time": HOSTILE,
        "val": HOSTILE,
    }
    (run / "evaluations.jsonl").write_text(json.dumps(one) + "\n")
    _, page = make_page(tmp_path, run)
    assert not {"script"} & set(page.tags)
    assert all(reference.startswith("data:") for reference in page.references)
    assert page.texts[:3].count(name) == 1
    assert sum(HOSTILE in text for text in page.texts) > 8


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", None, "metrics.jsonl is not there: no curves"),
        ("metrics.jsonl", b"", "metrics.jsonl is empty: no curves"),
        (
            "metrics.jsonl",
            b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo',
            "damaged (the last line is cut off); the other 1",
        ),
        ("metrics.jsonl", b'\xff\xfe\n[1]\n{"step": 3, "loss": 2.0}\n', "2 lines, the first is line 1"),
        ("config.yaml", None, "config.yaml is not there: its settings are not known"),
        ("config.yaml", b"a: [", "config.yaml cannot be read"),
        ("summary.json", b"[]", "summary.json cannot be read (it holds no keys)"),
        ("evaluations.jsonl", b'{"protocol": "knn", "results": null}\n{', "evaluations.jsonl is damaged"),
        ("evaluations.jsonl", None, ""),
    ],
)
def test_what_is_missing_or_damaged_is_one_line(tmp_path, capsys, file, content, words):
    run = make_run(tmp_path / "a")
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
    _, page = make_page(tmp_path, run, options=["--pictures=0"])
    notes = [text for text in page.texts if text.startswith("Note: ")]
    assert len(notes) == bool(words)
    assert all(words in note for note in notes)
    assert capsys.readouterr().out.count("note: ") == bool(words)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "needs RUNS"),
        (["none"], 1, "none does not exist"),
        (["."], 1, "is no run folder"),
        (["a", "--out=none/page.html"], 1, "none/page.html cannot be written"),
    ],
)
def test_messages(tmp_path, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    assert main(["report", *arguments]) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.html")) + list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize("x", ["epoch", "step", "hours"])
def test_odd_numbers_break_no_curve(tmp_path, x):
    """Broken, huge, tiny and wrong values in every place of a log."""
    run = make_run(tmp_path / "a")
    odd = ["NaN", "Infinity", "-1e308", "1e308", "1" + "0" * 400, "5e-324", "true", "null", '"text"', "[1]", "-0.0"]
    with open(run / "metrics.jsonl", "a") as file:
        for i, value in enumerate(odd):
            for key in ("step", "epoch", "time", "loss", "grad_norm", "knn_top1", "lr"):
                line = json.dumps({"step": 21 + i, "epoch": 2.1, "time": 1e9, "loss": 1.0})
                file.write(f'{line[:-1]}, "{key}": {value}}}\n')  # the last of two equal keys counts
            file.write(f'{{"step": {30 + i}, "epoch": 3, "only{i}": {value}}}\n')
    one = '{"protocol": "knn", "step": 1e400, "time": 1e300, "results": {"top1": %s, "top1_interval": [NaN, %s]}}\n'
    (run / "evaluations.jsonl").write_text("".join(one % (value, value) for value in odd))
    out, page = make_page(tmp_path, run, options=[f"--x={x}", "--pictures=0"])
    assert page.row("loss at the end")[0] == "1.0000"
    drawn = re.findall(r'(?:d|cx|cy|x|y)="([^"]*)"', out.read_text())
    assert drawn
    assert not [where for where in drawn if re.search("nan|inf|e\\+", where)]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / name / "last" / "run") for name in ("a", "b")]
    _, page = make_page(tmp_path, *runs, options=["--pictures=0"])
    assert {"a/last/run", "b/last/run"} <= set(page.texts)


def test_curves(tmp_path):
    """What cannot be drawn breaks a curve; many points become means with their range; numbers at the axes are round."""
    where = [float(i) for i in range(6)]
    first, second = module._pieces(where, [1.0, 2.0, float("nan"), float("inf"), 3.0, 4.0])
    assert [point[2] for point in first + second] == [1, 2, 3, 4]
    many = [float(i % 2) for i in range(10 * POINTS)]
    (piece,) = module._pieces([float(i) for i in range(len(many))], many)
    assert len(piece) == POINTS
    assert piece[0] == (4.5, 0.0, 0.5, 1.0)
    assert module._ticks(0.03, 1.02) == [(pytest.approx(k / 5), f"{k / 5:g}") for k in range(1, 6)]
    assert [text for _, text in module._log_ticks(-1.2, 1.1)] == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    run = read_run(str(make_run(tmp_path / "a")))
    assert run.series("loss", "hours")[0][:3] == pytest.approx([0, 0.1, 0.2])
    text = module._chart([run], "loss", "", [(run, *run.series("grad_norm", "step"))], "step", "lr")
    points = re.search(r'd="M([^"Z]*)" fill="none"', text)[1]
    places = np.array([[float(number) for number in point.split()] for point in points.split("L")])
    assert len(places) == 20
    np.testing.assert_allclose(np.diff(places, axis=0), np.diff(places, axis=0)[:1].repeat(19, 0), atol=0.11)
    assert (np.diff(places, axis=0) * [1, -1] > 5).all()  # rightwards, upwards
    short = read_run(str(make_run(tmp_path / "b", lines=2)))  # all of it lies in the first tenth of the other one
    text = module._chart(
        [run, short], "", "", [(one, *one.series("loss", "step")) for one in (run, short)], "step", "loss"
    )
    heights = [
        [float(point.split()[1]) for point in found.split("L")] for found in re.findall(r'd="M([^"Z]*)" fill', text)
    ]
    assert heights[0][0] < 0 < heights[0][2]  # the fall at the beginning is outside the frame
    assert heights[1][1] > 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_curves_and_pictures(tmp_path):
    out, _ = make_page(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.2))
    shot = tmp_path / "shot.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"]
    command += [f"--screenshot={shot}", "--window-size=400,6000", out.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)})
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (6000, 400, 3)

    def count(colour):
        return (abs(pixels - np.array(colour)).max(-1) < 12).sum()

    assert count((0, 114, 178)) > 500  # curves of the first run
    assert count((213, 94, 0)) > 500  # and of the second
    assert count((250, 0, 250)) > 20000  # pictures
