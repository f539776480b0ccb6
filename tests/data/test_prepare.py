"""`puna data prepare`: the same bytes whatever the workers, kills and engine; a card that says what is in them."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from puna.cli import main
from puna.data import prepare, records, sources, worker, writer
from puna.data.indexed_dataset import open_dataset
from puna.data.options import PrepareOptions
from puna.data.prepare import prepare as run
from puna.data.source_files import find
from puna.errors import UserError
from puna.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return str(tiny_checkpoint())


@pytest.fixture
def corpus(tmp_path):
    """Documents as lines of JSON, and their texts."""
    rng = np.random.default_rng(0)
    words = ["the", "puna", "is", "high", "grassland", "where", "llamas", "live"]
    texts = [f"{i}: " + " ".join(rng.choice(words, rng.integers(3, 40))) for i in range(400)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path, texts


@pytest.fixture
def small(monkeypatch):
    """Many chunks, and workers for them however little there is to do."""
    monkeypatch.setattr(records, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(prepare, "SMALL", 0)


def options(tmp_path, src, tokenizer, **kw):
    given = {"out": tmp_path / "out" / "P", "workers": 1} | kw
    return PrepareOptions(src=tuple(map(str, src if isinstance(src, list) else [src])), tokenizer=tokenizer, **given)


def files(folder):
    """Every file below a folder by its path, hidden ones too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_documents_become_a_store_and_a_card(tmp_path, corpus, tokenizer):
    path, texts = corpus
    card = run(options(tmp_path, path, tokenizer, validation=0.2))
    loaded = Tokenizer.load(tokenizer)
    found = {}
    for split in ("train", "validation"):
        data = open_dataset(tmp_path / f"out/P_{split}")
        assert data.metadata == card and data.ids.dtype == np.uint16
        data.check_tokenizer(loaded)
        found[split] = [data.sample(i)[0].tolist() for i in range(len(data))]
        counts = card["splits"][split]
        tokens = sum(map(len, found[split]))
        longest = max(map(len, found[split]))
        assert counts == {"samples": len(data), "tokens": tokens, "trained": tokens, "longest": longest}
    assert 40 < len(found["validation"]) < 120
    wanted = [[*loaded.encode(text, special=False), loaded.eos_id] for text in texts]
    assert sorted(found["train"] + found["validation"]) == sorted(wanted)
    assert [ids for ids in wanted if ids in found["train"]] == found["train"]  # in their order
    assert card["sources"] == [
        {
            "name": str(path),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": 400,
        }
    ]
    assert (card["handler"], card["kind"], card["rejected"]) == ("text", "text", {})
    again = json.loads(path.read_text().splitlines()[7])
    (tmp_path / "one.jsonl").write_text(json.dumps(again))
    split = "validation" if wanted[7] in found["validation"] else "train"
    card = run(options(tmp_path, tmp_path / "one.jsonl", tokenizer, validation=0.2, out=tmp_path / "one"))
    assert list(card["splits"]) == [split]  # the hash of a sample, not its place, decides


def test_without_a_split_the_prefix_is_the_name(tmp_path, corpus, tokenizer):
    run(options(tmp_path, corpus[0], tokenizer, validation=0.0, append_eos=False))
    data = open_dataset(tmp_path / "out/P")
    loaded = Tokenizer.load(tokenizer)
    assert [data.sample(i)[0].tolist() for i in range(3)] == [loaded.encode(text) for text in corpus[1][:3]]
    names = {"P.json", "P_text_document.bin", "P_text_document.idx"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


CHATS = [
    {
        "messages": [{"role": "user", "content": f"Ask {i}?"}, {"role": "assistant", "content": f"Say {i}."}]
        * (i % 3 + 1)
    }
    for i in range(120)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json.gz"])
def test_the_bytes_do_not_depend_on_the_workers(tmp_path, tokenizer, small, name):
    text = "\n".join(map(json.dumps, CHATS)) if name.endswith("l") else json.dumps(CHATS)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    seen = []
    for workers in (1, 3):
        out = tmp_path / f"w{workers}"
        card = run(options(tmp_path, tmp_path / name, tokenizer, workers=workers, out=out / "P", validation=0.1))
        seen.append(files(out))
        assert card["splits"]["train"]["samples"] + card["splits"]["validation"]["samples"] == 120
    assert seen[0] == seen[1] and len(seen[0]) == 9


@pytest.mark.slow
def test_workers_take_special_tokens_for_plain_text_too(tmp_path, tokenizer, small):
    loaded = Tokenizer.load(tokenizer)
    text = "The puna{0} is {0}high.{0}".format(loaded.token(loaded.eos_id))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"{i} {text}"}) for i in range(100)))
    seen = []
    for workers in (1, 2):
        out = tmp_path / f"w{workers}"
        run(options(tmp_path, tmp_path / "texts.jsonl", tokenizer, workers=workers, out=out / "P", validation=0.0))
        seen.append(files(out))
    assert seen[0] == seen[1]


def test_a_preference_has_four_stores(tmp_path, tokenizer):
    rows = [{"prompt": f"Ask {i}", "chosen": "Good.", "rejected": "Bad, bad."} for i in range(5)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = run(options(tmp_path, tmp_path / "p.jsonl", tokenizer, validation=0.0))
    chosen, rejected = (open_dataset(tmp_path / f"out/P_{side}") for side in ("chosen", "rejected"))
    assert len(chosen) == len(rejected) == card["splits"]["train"]["samples"] == 5 and chosen.metadata == card
    loaded = Tokenizer.load(tokenizer)
    for data, answer in ((chosen, "Good."), (rejected, "Bad, bad.")):
        ids, labels = data.sample(3)
        assert loaded.decode(labels[labels >= 0], skip_special=False) == answer + "<|im_end|>"
        assert loaded.decode(ids).count("Ask 3") == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from puna.data import prepare, records, writer
from puna.data.options import PrepareOptions
writer.SAVE_SECONDS, prepare.SMALL, records.CHUNK_BYTES = 0, 0, 2000
count, original = 0, writer.Output.add
def add(self, source, result):
    global count
    count += 1
    if count == int(sys.argv[1]):
        key, (ids, lengths) = next(iter(result.stores.items()))
        self._writers[key].extend(ids, lengths)  # in the middle of its work
        self._writers[key]._tokens.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, source, result)
writer.Output.add = add
if __name__ == "__main__":
    prepare.prepare(PrepareOptions(src=(sys.argv[2],), out=Path(sys.argv[3]), tokenizer=sys.argv[4], workers=1))
"""


@pytest.mark.slow
def test_killed_it_goes_on(tmp_path, corpus, tokenizer, small, monkeypatch, capsys):
    plain = run(options(tmp_path, corpus[0], tokenizer, out=tmp_path / "plain/P"))
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "killed"
    for place in ("1", "6", "4"):
        command = [sys.executable, str(tmp_path / "killed.py"), place, str(corpus[0]), str(out / "P"), tokenizer]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        assert not (out / "P.json").exists()
    asked = []
    monkeypatch.setattr(worker, "encode_chunk", lambda *a, f=worker.encode_chunk: asked.append(1) or f(*a))
    assert run(options(tmp_path, corpus[0], tokenizer, out=out / "P")) == plain
    assert files(out) == files(tmp_path / "plain")
    chunks = len(list(sources.chunks(find([str(corpus[0])])[0])))
    assert len(asked) == chunks - 8 + 1  # 5 and 3 were done, and the first rows are tried
    assert "resuming after" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0, 100])
def test_stopped_by_the_user_it_keeps_what_is_saved(tmp_path, corpus, tokenizer, small, monkeypatch, seconds):
    monkeypatch.setattr(writer, "SAVE_SECONDS", seconds)
    original, count = worker.encode_chunk, []

    def stop(*args):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(worker, "encode_chunk", stop)
    with pytest.raises(KeyboardInterrupt):
        run(options(tmp_path, corpus[0], tokenizer))
    assert bool(files(tmp_path / "out")) == (seconds == 0)
    monkeypatch.setattr(worker, "encode_chunk", original)
    card = run(options(tmp_path, corpus[0], tokenizer))
    assert card == run(options(tmp_path, corpus[0], tokenizer, out=tmp_path / "plain/P"))
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_rejected_rows_survive_a_save(tmp_path, tokenizer, small, monkeypatch):
    """A save in the middle holds the counts of rejected rows, and a resumed preparation goes on with them."""
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    lines = [line for i, chat in enumerate(CHATS) for line in (json.dumps(chat), "{" if i % 2 else '{"messages": []}')]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    plain = run(options(tmp_path, tmp_path / "a.jsonl", tokenizer, out=tmp_path / "plain/P"))
    assert sorted(plain["rejected"].values()) == [60, 60]
    with monkeypatch.context() as stopped:
        stopped.setattr(
            writer.Stats, "add", lambda self, *a, f=writer.Stats.add: f(self, *a) or _stop(self.chunks == 5)
        )
        with pytest.raises(KeyboardInterrupt):
            run(options(tmp_path, tmp_path / "a.jsonl", tokenizer))
    assert run(options(tmp_path, tmp_path / "a.jsonl", tokenizer)) == plain
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_another_job_starts_over(tmp_path, corpus, tokenizer, small, monkeypatch, capsys):
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(
        writer.Stats, "add", lambda self, *a, f=writer.Stats.add: f(self, *a) or _stop(self.chunks == 5)
    )
    with pytest.raises(KeyboardInterrupt):
        run(options(tmp_path, corpus[0], tokenizer))
    monkeypatch.undo()
    run(options(tmp_path, corpus[0], tokenizer, append_eos=False))
    assert "starting over" in capsys.readouterr().err
    run(options(tmp_path, corpus[0], tokenizer, append_eos=False, out=tmp_path / "plain/P"))
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def _stop(now):
    if now:
        raise KeyboardInterrupt


def test_killed_while_all_is_put_in_place(tmp_path, corpus, tokenizer, small, monkeypatch):
    """The next run of any kind completes the move, whatever had been moved, and the same command is done then."""
    plain = run(options(tmp_path, corpus[0], tokenizer, out=tmp_path / "plain/P"))
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    for moved in range(5):
        run(options(tmp_path, tmp_path / "chats.jsonl", tokenizer, overwrite=True))
        replaced = []

        def replace(source, target, f=os.replace, replaced=replaced, moved=moved):
            if len(replaced) == moved:
                os._exit(9)
            replaced.append(target)
            f(source, target)

        child = os.fork()
        if not child:
            writer.os = SimpleNamespace(**{**vars(os), "replace": replace})
            writer.write_json = lambda path, content, f=writer.write_json: (
                os._exit(9) if path.name == "P.json" else f(path, content)
            )
            run(options(tmp_path, corpus[0], tokenizer, overwrite=True))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if moved % 2:
            assert run(options(tmp_path, corpus[0], tokenizer)) == plain
        else:
            with pytest.raises(UserError, match="exists already"):
                run(options(tmp_path, tmp_path / "chats.jsonl", tokenizer))
        assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_finished_data_stay_until_their_replacement_is_complete(tmp_path, corpus, tokenizer, small, monkeypatch):
    """A preparation that fails at any point before the publication leaves the data that it was to replace."""
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    run(options(tmp_path, tmp_path / "chats.jsonl", tokenizer))
    before = files(tmp_path / "out")
    for name, fail in (
        ("finalize", lambda self, f=writer.IndexedDatasetBuilder.finalize: f(self) or _stop(self.bin.name[2] == "v")),
        ("extend", lambda self, *args: _stop(True)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(writer.IndexedDatasetBuilder, name, fail)
            with pytest.raises(KeyboardInterrupt):
                run(options(tmp_path, corpus[0], tokenizer, overwrite=True))
        assert files(tmp_path / "out") == before
    run(options(tmp_path, corpus[0], tokenizer, overwrite=True))
    assert files(tmp_path / "out").keys() == {"P.json"} | {
        f"P_{split}_text_document.{end}" for split in ("train", "validation") for end in ("bin", "idx")
    }


def test_two_preparations_of_one_name(tmp_path, corpus, tokenizer, small, monkeypatch):
    """The second is refused while the first is at work; what appears meanwhile by other means is not overwritten."""
    original, calls = worker.encode_chunk, []

    def second(*args):
        monkeypatch.setattr(worker, "encode_chunk", original)
        with pytest.raises(UserError, match="Another process is preparing data under"):
            run(options(tmp_path, corpus[0], tokenizer, overwrite=True))
        run(options(tmp_path, corpus[0], tokenizer, out=tmp_path / "out/Q"))  # another name in the same folder
        return original(*args)

    monkeypatch.setattr(worker, "encode_chunk", second)
    run(options(tmp_path, corpus[0], tokenizer))
    after = files(tmp_path / "out")
    assert len(after) == 10 and all(after[name] == after["Q" + name[1:]] for name in after if name[0] == "P")

    def appears(*args):
        calls.append(1)
        if len(calls) == 1:  # the first rows are tried
            return original(*args)
        monkeypatch.setattr(worker, "encode_chunk", original)
        run(options(tmp_path, corpus[0], tokenizer, out=tmp_path / "out/R_train", validation=0.0, append_eos=False))
        return original(*args)

    monkeypatch.setattr(worker, "encode_chunk", appears)
    with pytest.raises(UserError, match="R_train_text_document.bin appeared"):
        run(options(tmp_path, corpus[0], tokenizer, out=tmp_path / "out/R"))
    assert len(open_dataset(tmp_path / "out/R_train")) == len(corpus[1])


ORPHANS = """
import sys, time
from pathlib import Path
from puna.data import prepare, records, worker
from puna.data.options import PrepareOptions
prepare.SMALL, records.CHUNK_BYTES = 0, 2000
def slow(chunk):
    Path(sys.argv[4], str(worker.os.getpid())).touch()
    time.sleep(600)
if __name__ == "__main__":
    worker.work = slow
    prepare.prepare(PrepareOptions(src=(sys.argv[1],), out=Path(sys.argv[2]), tokenizer=sys.argv[3], workers=2))
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path, corpus, tokenizer):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    (tmp_path / "pids").mkdir()
    command = [sys.executable, "orphans.py", str(corpus[0]), "out/P", tokenizer, str(tmp_path / "pids")]
    with subprocess.Popen(command, cwd=tmp_path) as parent:
        while len(workers := list((tmp_path / "pids").iterdir())) < 2:
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    pids = [int(path.name) for path in workers]
    for _ in range(1200):  # a minute of the ten that they sleep
        if not any(map(_running, pids)):
            return
        time.sleep(0.05)
    for pid in filter(_running, pids):
        os.kill(pid, signal.SIGKILL)
    pytest.fail("the workers outlived the process that started them")


def _running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_nothing_of_what_is_replaced_stays(tmp_path, corpus, tokenizer):
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    run(options(tmp_path, corpus[0], tokenizer, validation=0.2))
    run(options(tmp_path, tmp_path / "chats.jsonl", tokenizer, validation=0.0, overwrite=True))
    stores = {f"P{store}.{end}" for store in ("_input_ids_document", "_labels_document") for end in ("bin", "idx")}
    assert set(files(tmp_path / "out")) == stores | {"P.json"}
    (tmp_path / "corpus.json").write_text(json.dumps(CHATS))
    with pytest.raises(UserError, match="corpus.json was not written by puna data prepare"):  # it is the source itself
        run(options(tmp_path, tmp_path / "corpus.json", tokenizer, out=tmp_path / "corpus", overwrite=True))
    (tmp_path / "out/P.json").unlink()
    with pytest.raises(UserError, match="exists already"):
        run(options(tmp_path, corpus[0], tokenizer))


def test_malformed_rows_are_counted_and_named(tmp_path, tokenizer, capsys):
    good = json.dumps(CHATS[0])
    rows = [good, "{", '{"messages": []}', good, "[]", '{"messages": [{"role": "robot", "content": "x"}]}', good]
    rows += ['{"messages": [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]}'] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    card = run(options(tmp_path, tmp_path / "a.jsonl", tokenizer, validation=0.0))
    assert card["splits"]["train"]["samples"] == 3 and sum(card["rejected"].values()) == 7
    assert card["rejected"]["malformed JSON"] == card["rejected"]["not a JSON object"] == 1
    assert card["rejected"]["the text holds the special token <|im_end|>"] == 3
    assert card["rejected"]["the unknown role 'robot'"] == 1
    assert f"{tmp_path}/a.jsonl, row 2: malformed JSON" in card["rejected_rows"]
    assert len(card["rejected_rows"]) == len(card["rejected"]) == 5  # an example of every reason
    notes = capsys.readouterr().err
    assert f"3 rejected for the text holds the special token <|im_end|> (first {tmp_path}/a.jsonl, row 8)" in notes
    assert "7 rejected of 10 rows" in notes


def test_the_reasons_of_rejected_rows_are_bounded(tmp_path, tokenizer):
    rows = [{"messages": [{"role": f"r{i}", "content": "x"}]} for i in range(150)] + [CHATS[0]]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = run(options(tmp_path, tmp_path / "a.jsonl", tokenizer, validation=0.0))
    assert len(card["rejected"]) == 101 and card["rejected"]["other reasons"] == 50


def test_what_messages_ask_for_is_done_or_noted(tmp_path, tokenizer, capsys):
    rows = [json.loads(json.dumps(CHATS[0])) for _ in range(3)]
    rows[0]["messages"][1]["reasoning_content"] = "Hm."
    rows[1]["messages"][1]["reasoning_content"] = ""
    rows[1]["messages"][0]["weight"] = 1
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = run(options(tmp_path, tmp_path / "a.jsonl", tokenizer, validation=0.0))
    assert card["rejected"] == {} and card["notes"] == {
        "messages have the key 'reasoning_content', which the chat template does not read": 1,
        "user messages ask to be trained, but only answers are": 1,
    }
    assert "note: 1 messages have the key 'reasoning_content'" in capsys.readouterr().err


def test_rendered_conversations_are_text_or_tokens(tmp_path, tokenizer, capsys):
    """Special tokens that documents spell: noted and plain text, or recognised and not doubled."""
    loaded = Tokenizer.load(tokenizer)
    texts = ["<|im_start|>user\nHi<|im_end|>\n", f"{loaded.token(loaded.bos_id)}Hello", "plain"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    card = run(options(tmp_path, tmp_path / "a.jsonl", tokenizer, validation=0.0))
    assert list(card["notes"].values()) == [2] and "--special-tokens" in capsys.readouterr().err
    data = open_dataset(tmp_path / "out/P")
    assert data.sample(0)[0].tolist() == [*loaded.encode(texts[0], special=False), loaded.eos_id]
    given = options(tmp_path, tmp_path / "a.jsonl", tokenizer, validation=0.0, overwrite=True, special_tokens=True)
    assert run(given)["notes"] == {}
    data = open_dataset(tmp_path / "out/P")
    ids = [data.sample(i)[0].tolist() for i in range(3)]
    assert ids[0] == loaded.encode(texts[0]) and ids[0].count(loaded.id("<|im_end|>")) == 1
    assert ids[1].count(loaded.bos_id) == 1 and ids[1][-1] == loaded.eos_id
    assert ids[2] == [*loaded.encode("plain"), loaded.eos_id]


@pytest.mark.parametrize(
    "name, content, reasons",
    [
        ("a.txt", "good\nb\0d\n".encode("utf-16"), {"not UTF-8", "holds a zero byte, as UTF-16 does"}),
        ("b.txt", "caf\xe9\n".encode("latin-1"), {"not UTF-8"}),
        ("c.jsonl", b'{"text": "\\ud800 half"}', {"half of a surrogate pair"}),
        ("d.jsonl", b'{"text": ' + b"[" * 9999 + b"]" * 9999 + b"}", {"malformed JSON"}),
        ("e.jsonl", json.dumps({"messages": [{**turn, "content": "\ud800"} for turn in CHATS[0]["messages"]]}).encode(),
         {"half of a surrogate pair"}),
        ("f.jsonl", b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]}',
         {"tool calls, which the chat template does not render"}),
    ],
)  # fmt: skip
def test_a_bad_row_never_stops_the_others(tmp_path, tokenizer, name, content, reasons):
    good = json.dumps(CHATS[0] if b"messages" in content else {"text": "good"}).encode()
    (tmp_path / name).write_bytes((b"good" if name.endswith("txt") else good) + b"\n" + content)
    if name == "a.txt":
        (tmp_path / name).write_bytes(content + b"\n\0good\n" + b"good")
    card = run(options(tmp_path, tmp_path / name, tokenizer, validation=0.0))
    assert set(card["rejected"]) == reasons and card["splits"]["train"]["samples"] == 1


def test_what_cannot_be_prepared_is_said(tmp_path, corpus, tokenizer):
    def refused(match, *rows, name="a.jsonl", **kw):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(UserError, match=match):
            run(options(tmp_path, tmp_path / name, tokenizer, **kw))
        assert not (tmp_path / "out").exists() or not files(tmp_path / "out")

    refused("no readable row")
    refused("must be a positive integer", {"text": "x"}, workers=-3)
    refused("must be a positive integer", {"text": "x"}, workers=0)
    refused("it has no rows", handler="text")
    refused(
        "no field 'output', which the handler alpaca needs; there are instruction",
        {"instruction": "x"},
        handler="alpaca",
    )
    refused("No handler reads rows with the fields a", {"a": 1})
    refused("did you mean 'alpaca'", {"a": 1}, handler="alpca")
    refused("1 rejected for an empty text .first .*a.jsonl, row 1", {"text": " "})
    refused("at least 0 and below 1", {"text": "x"}, validation=1.0)
    refused("leaves out or rewrites an answer", CHATS[1], template=str(_bad_template(tmp_path)))
    bare = tmp_path / "bare"
    bare.mkdir()
    settings = json.loads((Path(tokenizer) / "tokenizer_config.json").read_text())
    (bare / "tokenizer.json").write_bytes((Path(tokenizer) / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    with pytest.raises(UserError, match="no chat template: choose the one to train it with by --template"):
        (tmp_path / "a.jsonl").write_text(json.dumps(CHATS[0]))
        run(options(tmp_path, tmp_path / "a.jsonl", str(bare)))
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for out, match in (
        (Path("."), "is a folder"),
        (Path(".."), "is a folder"),
        (Path("/"), "is a folder"),
        (corpus[0] / "P", "No file can be written under"),
        (tmp_path / "dangling/P", "No file can be written under"),
    ):
        with pytest.raises(UserError, match=match):
            run(options(tmp_path, corpus[0], tokenizer, out=out))
    run(options(tmp_path, corpus[0], tokenizer))
    with pytest.raises(UserError, match="exists already"):
        run(options(tmp_path, corpus[0], tokenizer))
    run(options(tmp_path, corpus[0], tokenizer, overwrite=True))


def _bad_template(tmp_path):
    path = tmp_path / "bad.jinja"
    path.write_text("{{ messages | length }}{{ messages[-1].content }}{{ eos_token }}")
    return path


@pytest.mark.slow
def test_a_killed_worker_is_one_sentence(tmp_path, corpus, tokenizer, small, monkeypatch):
    monkeypatch.setattr(prepare.worker, "work", _die)
    with pytest.raises(UserError, match="A worker process was killed"):
        run(options(tmp_path, corpus[0], tokenizer, workers=2))


def _die(chunk):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_memory_does_not_grow_with_the_input(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(records, "CHUNK_BYTES", 1 << 14)
    peaks = []
    for copies in (200, 2000):
        (tmp_path / "a.jsonl").write_text('{"text": "the puna is the high grassland"}\n' * copies)
        tracemalloc.start()
        run(options(tmp_path, tmp_path / "a.jsonl", tokenizer, overwrite=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)


def test_the_command_line(tmp_path, corpus, tokenizer, capsys):
    out = tmp_path / "P"
    assert main(["data", "prepare", str(corpus[0]), "--out", str(out), "--tokenizer", tokenizer]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}_train: ") and "handler text" in captured.err
    assert main(["data", "prepare", str(corpus[0]), "--out", str(out), "--tokenizer", tokenizer]) == 2
    for wrong in (["--out", "."], ["--out", f"{tmp_path}/new/"], ["--out", str(out), "--workers", "-3"]):
        capsys.readouterr()
        assert main(["data", "prepare", str(corpus[0]), "--tokenizer", tokenizer, *wrong]) == 2
        assert wrong[-1] in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path, corpus, tokenizer, small):
    pytest.importorskip("ray", reason="needs ray (extra ray)")
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in corpus[1][:50]]))
    for engine in ("local", "ray"):
        given = options(tmp_path, [corpus[0], tmp_path / "b.json"], tokenizer, out=tmp_path / engine / "P", workers=2)
        given.engine = engine
        run(given)
    assert files(tmp_path / "local") == files(tmp_path / "ray")


@pytest.mark.full
@pytest.mark.parametrize(
    "name, handler, template, rejected",
    [
        ("alpaca/alpaca_en_demo.json", "alpaca", "alpaca", 0),
        ("alpaca/alpaca_tiny.derived.parquet", "alpaca", None, 0),
        ("moss/moss-003-sft-no-tools.sample.jsonl", "moss", None, 0),
        ("sharegpt/sharegpt_v3_first800.json", "sharegpt", None, 19),
        # one conversation has two questions in a row, which this template refuses
        ("sharegpt/sharegpt_v3_first800.json", "vicuna", "vicuna", 20),
        ("squad/xquad.en.json", "squad", None, 0),
        ("squad/xquad.zh.json", "squad-first", None, 0),
        ("c4/c4_demo.jsonl", "text", None, 0),
        ("c4/wiki_demo.txt", "text", None, 0),
        ("tinystories/sample.txt", "text", None, 0),
        ("tinyshakespeare/input.txt", "text", None, 0),
        ("wikitext2/valid.txt", "wikitext", None, 0),
        ("wikitext2/valid.txt", "wikitext-clean", None, 0),
    ],
)
def test_real_files_are_prepared(tmp_path, shared_data, name, handler, template, rejected):
    model = str(shared_data / "tokenizers/llama3")
    card = run(options(tmp_path, shared_data / name, model, handler=handler, template=template))
    assert sum(card["rejected"].values()) == rejected, card["rejected"]
    tokenizer = Tokenizer.load(model)
    for split, counts in card["splits"].items():
        data = open_dataset(tmp_path / f"out/P_{split}")
        assert len(data) == counts["samples"] and int(data.lengths.sum()) == counts["tokens"]
        for index in range(0, len(data), max(1, len(data) // 20)):
            ids, labels = data.sample(index)
            assert labels[-1] == ids[-1] or labels[-2] == ids[-2] == tokenizer.eos_id or handler == "sharegpt"
            assert ((labels == ids) | (labels == -100)).all() and (labels != -100).any()
