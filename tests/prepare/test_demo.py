import json

from fastssl.cli import main


def test_the_whole_walk_ends_with_a_table_and_a_summary_and_continues(tmp_path, capsys):
    command = ["demo", "--dir", str(tmp_path), "--train", "128", "--val", "32", "--steps", "1", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {"knn_random", "knn_pixels", "knn_pretrained", "seconds", "step"} <= set(summary)
    for name in ("random weights", "raw pixels", "pretrained without labels"):
        assert name in printed
    assert (tmp_path / "train.beton").exists()
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr().out
    assert "using the images" in printed
    assert json.loads(printed.splitlines()[-1])["knn_pixels"] == summary["knn_pixels"]
