"""`puna doctor loss` on runs whose difference is known."""

import json

import pytest

from puna.cli import main


@pytest.fixture
def run(tmp_path):
    def make(name, losses, first=1):
        folder = tmp_path / name
        folder.mkdir()
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, first)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)

    return make


def doctor(*words):
    return main(["doctor", "loss", *words])


def test_runs_that_agree(run, capsys, tmp_path):
    a, b = run("a", [2.0, 1.5, 1.0]), run("b", [2.003, 1.498, 1.0])
    plot = tmp_path / "both.png"
    assert doctor(a, b, "--plot", str(plot)) == 0
    said = capsys.readouterr().out
    assert "The losses agree." in said and "largest 0.00300 at step 1; 3 steps compared" in said
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("losses", "relative", "absolute", "first"),
    [
        ([2.006, 1.506, 1.006], "ok", "DIFFERS", 1),  # 0.4 %, 0.006
        ([2.0, 1.5, 1.1], "DIFFERS", "DIFFERS", 3),
        (["nan", 1.5, 1.0], "DIFFERS", "DIFFERS", 1),
    ],
)
def test_runs_that_differ(run, capsys, losses, relative, absolute, first):
    assert doctor(run("a", [2.0, 1.5, 1.0]), run("b", losses)) == 3
    said = capsys.readouterr().out.splitlines()
    assert said[3].split()[1] == relative and said[4].split()[1] == absolute
    assert f"first above the absolute limit at step {first}" in said[6] and said[-1] == "The losses differ."


def test_limits_and_json(run, capsys):
    a, b = run("a", [2.0, 2.0]), run("b", [2.0, 2.1], first=1)
    assert doctor(a, b, "--absolute", "0.1", "--relative", "0.1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["absolute"] == pytest.approx(0.05) and said["relative"] == pytest.approx(0.025)
    assert said["largest_step"] == 2 and said["same"]


def test_only_common_steps_count(run, capsys):
    assert doctor(run("a", [5.0, 2.0, 1.0]), run("b", [2.0, 1.0, 9.0], first=2)) == 0
    assert "2 steps compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda run, tmp: (run("a", [1.0]), str(tmp)), "is not a run of puna train: it has no metrics.jsonl"),
        (lambda run, tmp: (run("a", [1.0]), run("b", [])), "has no step with a loss yet"),
        (lambda run, tmp: (run("a", [1.0]), run("b", [1.0], first=7)), "have no step in common"),
    ],
)
def test_refusals(run, tmp_path, capsys, make, says):
    assert doctor(*make(run, tmp_path)) == 2
    assert says in capsys.readouterr().err
