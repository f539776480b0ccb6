"""The demo from end to end, on a tiny model in place of the real one."""

import json

import pytest

from puna.cli import main


@pytest.mark.slow
def test_demo(tiny_checkpoint, tmp_path, capsys):
    model = str(tiny_checkpoint(max_position_embeddings=256, torch_dtype="bfloat16"))
    out = tmp_path / "demo"
    assert main(["demo", "--model", model, "--out", str(out)]) == 0
    text, _ = capsys.readouterr()
    verbs = ("convert", "verify", "chat", "generate", "bench latency", "data prepare", "train", "lora merge")
    for step in (*(f"$ puna {verb} " for verb in verbs), "before: ", "after: ", "Next:"):
        assert step in text
    assert (out / "character-run/loss.png").exists() and (out / "merged/puna.json").exists()
    assert (out / "smollm2/config.json").exists() and (out / "times.png").read_bytes().startswith(b"\x89PNG")
    assert len([json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines()]) == 8

    assert main(["demo", "--model", model, "--out", str(out)]) == 0
    assert "is there from an earlier run" in capsys.readouterr().out
