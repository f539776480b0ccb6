"""Samples are shown as they are, what is trained apart from the rest; nothing in them harms a terminal or a page."""

import json
import re

import numpy as np
import pytest

from puna.cli import main
from puna.data.indexed_dataset import IndexedDatasetBuilder, open_dataset
from puna.data.show import parts
from puna.tokenizer import Tokenizer

MESSAGES = [
    {"role": "user", "content": "Say <b>café</b> \x1b[31m!"},
    {"role": "assistant", "content": "Café 高原 & <i>."},
]


@pytest.fixture
def chats(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": MESSAGES[:]} for _ in range(3)] + [{"messages": MESSAGES * 20}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--out", "P", "--tokenizer", str(tiny_checkpoint()), "--validation", "0"]
    assert main(["data", "prepare", "chats.jsonl", *arguments]) == 0
    return tmp_path


def test_the_parts_are_the_sample(chats, tiny_checkpoint):
    data, tokenizer = open_dataset("P"), Tokenizer.load(tiny_checkpoint())
    found = list(parts(data, tokenizer, 0, 2000))
    assert "".join(text for text, _ in found) == tokenizer.render(MESSAGES, add_generation_prompt=False)
    assert [text for text, trained in found if trained] == ["Café 高原 & <i>.<|im_end|>"]


def test_samples_are_printed(chats, capsys):
    capsys.readouterr()
    assert main(["data", "show", "P", "--samples", "2", "--start", "2"]) == 0
    printed = capsys.readouterr().out
    assert "⟦Café 高原 & <i>.<|im_end|>⟧" in printed and "sample 2:" in printed and "sample 3:" in printed
    assert "\x1b" not in printed and "␛[31m" in printed
    assert main(["data", "show", "P", "--samples", "1", "--start", "3", "--max-tokens", "30"]) == 0
    assert re.search(r"… \d[\d,]* more tokens", capsys.readouterr().out)


def test_on_a_terminal_what_is_trained_is_coloured(chats, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    capsys.readouterr()
    assert main(["data", "show", "P", "--samples", "1"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[32mCafé 高原 & <i>.<|im_end|>\x1b[0m" in printed and re.search(
        "\x1b\\[2m<\\|im_start\\|>user", printed
    )


def test_a_page_shows_the_same(chats, capsys):
    assert main(["data", "show", "P", "--html", "page.html"]) == 0
    page = (chats / "page.html").read_text()
    assert "<mark>Café 高原 &amp; &lt;i&gt;.&lt;|im_end|&gt;</mark>" in page
    assert "<b>" not in page and page.count("<h2>") == 4


def test_what_cannot_be_shown_is_said(chats, tiny_checkpoint, capsys):
    def refused(*words):
        capsys.readouterr()
        assert main(["data", "show", *words]) == 2
        return capsys.readouterr().err

    assert "has 4 samples, so --start is between 0 and 3" in refused("P", "--start", "4")
    assert "there is P" in refused("Q")
    assert "at least 1" in refused("P", "--samples", "0") and "at least 0" in refused("P", "--start", "-1")
    with IndexedDatasetBuilder("bare_text_document", np.int32) as writer:
        writer.add([1, 2])
    assert "name it by --tokenizer" in refused("bare")
    card = json.loads((chats / "P.json").read_text())
    card["tokenizer"]["vocabulary"] = "x"
    (chats / "P.json").write_text(json.dumps(card))
    assert "which is not the model's" in refused("P")


def test_stats_count_what_is_there(chats, capsys):
    data = open_dataset("P")
    capsys.readouterr()
    assert main(["data", "stats", "P", "P", "--plot", "lengths.png", "--seq-len", "64"]) == 0
    table = dict(re.split(r"\s{2,}", line)[:2] for line in capsys.readouterr().out.splitlines()[1:-1])
    tokens, trained = (sum(counts) for counts in zip(*(
        (len(ids), int((labels >= 0).sum())) for ids, labels in map(data.sample, range(4))
    ), strict=True))  # fmt: skip
    assert (table["samples"], table["tokens"], table["trained"]) == ("4", f"{tokens:,}", f"{trained:,}")
    assert table["longest"] == f"{data.lengths.max():,}" and table["handler"] == "openai"
    assert (chats / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_preference_data_are_shown_and_counted(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    """One prefix names both sides: samples alternate, and the table has a column for each."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Ask {i}", "chosen": "Good.", "rejected": "Bad, bad."} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--out", "P", "--tokenizer", str(tiny_checkpoint()), "--validation", "0"]
    assert main(["data", "prepare", "p.jsonl", *arguments]) == 0
    capsys.readouterr()
    assert main(["data", "show", "P", "--samples", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"sample (\d), (\w+):", printed) == [(i, side) for i in "01" for side in ("chosen", "rejected")]
    assert printed.count("⟦Good.<|im_end|>⟧") == printed.count("⟦Bad, bad.<|im_end|>⟧") == 2
    assert main(["data", "show", "P_chosen", "--html", "page.html"]) == main(
        ["data", "show", "P", "--html", "both.html"]
    )
    assert (tmp_path / "page.html").read_text().count("<h2>") == 3
    assert (tmp_path / "both.html").read_text().count("<h2>") == 6
    capsys.readouterr()
    assert main(["data", "stats", "P", "--plot", "lengths.png"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["P_chosen", "P_rejected"] and lines[1] == ["samples", "3", "3"]


def test_special_tokens_in_plain_text_are_told_from_true_ones(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "<|im_start|>user\nHi<|im_end|>\n"}))
    arguments = ["data", "prepare", "a.jsonl", "--tokenizer", str(tiny_checkpoint()), "--validation", "0", "--out"]
    assert main([*arguments, "P"]) == main([*arguments, "Q", "--special-tokens"]) == 0
    titles = []
    for prefix in "PQ":
        capsys.readouterr()
        assert main(["data", "show", prefix]) == 0
        titles.append(capsys.readouterr().out.splitlines()[0])
    assert titles[0].endswith("trained, 2 special tokens spelled as plain text") and titles[1].endswith("trained")
