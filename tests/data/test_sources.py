"""Every format gives the rows that stand in it, at constant memory, and whatever the cuts are."""

import csv
import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.data import records, sources
from puna.data.json_stream import json_texts
from puna.data.source_files import Source, find
from puna.data.sources import BadRow, chunks, rows
from puna.errors import UserError

ROWS = [{"text": f"row {i}: naïve café 高原 \U0001f999", "n": i, "more": {"a": [i, None]}} for i in range(300)]
LINES = "\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(ROWS))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few rows, so that every test has many cuts."""
    monkeypatch.setattr(records, "CHUNK_BYTES", 500)
    monkeypatch.setattr(sources, "CHUNK_ROWS", 7)


def read(name, documents="line", **kw):
    return [row for source in find([str(name)], **kw) for chunk in chunks(source, documents) for row in rows(chunk)]


def pack(path, data: bytes):
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", LINES),
        ("b.jsonl", LINES.replace("\n", "\r\n") + "\r\n\r\n"),
        ("c.json", json.dumps(ROWS)),
        ("d.json", json.dumps(ROWS, indent=1, ensure_ascii=False)),
        ("e.json", json.dumps({"version": "1.1", "about": {"data": [1]}, "data": ROWS, "end": 1}, indent=2)),
        ("f.json", LINES),  # JSON lines under the wrong name
        ("g.json", json.dumps(ROWS[0])),
    ],
)
def test_json(tmp_path, name, text, end):
    path = pack(tmp_path / (name + end), ("\ufeff" + text).encode())
    assert read(path) == (ROWS if name != "g.json" else ROWS[:1])


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_csv(tmp_path, name):
    table = [{"text": f'line {i},\nsecond "line"\tend', "n": str(i)} for i in range(50)]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text", "n"], delimiter="\t" if "tsv" in name else ",")
    writer.writeheader()
    writer.writerows(table)
    assert read(pack(tmp_path / name, text.getvalue().encode())) == table
    path = pack(tmp_path / "bad.csv", b"a,b\n1,2\n1,2,3\n4\n")
    assert read(path) == [{"a": "1", "b": "2"}, BadRow("more fields than the header names"), {"a": "4", "b": None}]


def test_parquet_and_arrow(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert read(tmp_path / name) == ROWS, name
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path / "a.parquet")


TEXT = "one\n\n two \r\n\n\n three\nfour\n\n= = Head = =\nfive"


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_a_text_file_is_cut_into_documents(tmp_path, monkeypatch, end, size):
    monkeypatch.setattr(records, "CHUNK_BYTES", size)
    path = pack(tmp_path / f"a.txt{end}", TEXT.encode())
    lines = ["one", " two ", " three", "four", "= = Head = =", "five"]
    assert [row["text"] for row in read(path)] == lines
    paragraphs = ["one", " two ", " three\nfour", "= = Head = =\nfive"]
    assert [row["text"] for row in read(path, "paragraph")] == paragraphs
    assert [row["text"] for row in read(path, "file")] == [TEXT]


ARTICLES = [
    " = Homarus gammarus = \n \n A lobster . \n \n = = Description = = \n \n Large . \n \n",
    " = The = sign = \n \n = = = Deep = = = \n \n a = b \n \n",
    " = Third = \n \n Text . \n",
]


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_wikitext_is_cut_into_articles(tmp_path, monkeypatch, size):
    monkeypatch.setattr(records, "CHUNK_BYTES", size)
    text = " \n" + "".join(ARTICLES)
    for name in ("wiki.valid.tokens", "wiki.txt.gz"):
        found = read(pack(tmp_path / name, text.encode()), "article")
        assert [row["text"] for row in found] == ARTICLES
    # as the Hub has it: a row for each line
    table = [{"text": line} for line in text.splitlines(keepends=True)]
    path = pack(tmp_path / "wiki.json", json.dumps(table).encode())
    assert [row["text"] for row in read(path, "article")] == ARTICLES


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=30),
    st.integers(1, 60),
    st.sampled_from([None, 1, 2]),
)
def test_a_json_stream_is_what_json_reads(texts, block, indent):
    table = [{"a": text, "b": [text, {"c": 1.5e3}]} for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puna.data.json_stream.READ", block)
        for whole in (table, {"x": "]", "data": table}):
            found = json_texts(io.StringIO(json.dumps(whole, indent=indent)), 1 << 20)
            assert [json.loads(text) for text in found] == table


def test_rows_that_cannot_be_read_are_named_and_skipped(tmp_path):
    good = b'{"text": "a"}'
    path = pack(
        tmp_path / "a.jsonl", b"\n".join([good, b'{"text": ', b"[1]", b'{"text": "\xff"}', b"", good, b"{" * 5000])
    )
    bad = [BadRow("malformed JSON"), BadRow("not a JSON object"), BadRow("not UTF-8")]
    assert read(path) == [{"text": "a"}, *bad, {"text": "a"}, BadRow("malformed JSON")]
    assert read(pack(tmp_path / "b.json", b'[{"text": "a"}, 3, {"text": "\xff"}]')) == [{"text": "a"}, *bad[1:]]
    assert read(pack(tmp_path / "empty.json", b"")) == read(pack(tmp_path / "empty.jsonl", b"")) == []


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.zst", "a.json", "b.json", "c.json", "a.csv", "a.csv.gz"]
)
def test_a_truncated_file_is_refused(tmp_path, name):
    """Every format that can tell: wherever the file is cut, its rows are never taken for all."""
    whole = {"a.json": json.dumps(ROWS), "b.json": json.dumps({"data": ROWS}), "c.json": json.dumps(ROWS, indent=2)}
    quoted = "a,b\n" + "".join(f'"{i}","line {i}\nand more"\n' for i in range(50))
    text = quoted if "csv" in name else whole.get(name, LINES)
    path = pack(tmp_path / name, text.encode())
    data = path.read_bytes()
    assert read(path)
    ends = [len(data) // 3, len(data) // 2, len(data) - 20]
    if name.endswith("json"):
        ends += [data.index(b"},") + 1, data.index(b"},") + 2, data.rindex(b"]")]  # between two rows
    if name == "a.csv":
        ends = [data.rindex(b"and"), data.index(b'"line 7') + 3]
    for end in ends:
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="damaged or cut short"):
            read(path)


def test_frames_of_zstandard_follow_one_another(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = LINES.encode().splitlines(keepends=True)
    frames = [zstandard.compress(b"".join(lines[start : start + 100])) for start in range(0, len(lines), 100)]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert read(path) == ROWS
    path.write_bytes(b"".join(frames)[:-5])
    with pytest.raises(UserError, match="cut short"):
        read(path)
    path.write_bytes(zstandard.compress(b" " * (64 << 20) + LINES.encode()))
    tracemalloc.start()
    read(path, "line")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20  # a line of 64 MiB, and no more than a few copies of it


def test_what_is_no_archive_is_refused(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"no archive at all")
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / name)


def save_to_disk(folder, rows_, cache=False):
    """What datasets.save_to_disk writes; `cache` adds a file of the same rows that `map` leaves behind."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows_)
    for name in ["data-00000-of-00001.arrow", *(["cache-0123456789abcdef.arrow"] if cache else [])]:
        with pyarrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "x" * 99_999}))
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))


def test_a_dataset_saved_to_disk_is_its_tables(tmp_path, capsys):
    save_to_disk(tmp_path / "one", ROWS[:5], cache=True)
    assert read(tmp_path / "one") == ROWS[:5] and capsys.readouterr().err == ""
    for split in ("train", "test"):
        save_to_disk(tmp_path / "both" / split, ROWS[:3])
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path / "both") == ROWS[:3] * 2
    assert "several splits (test, train)" in capsys.readouterr().err
    (tmp_path / "one/state.json").write_text("{")
    assert read(tmp_path / "one") == ROWS[:5] * 2


def test_what_a_folder_leaves_out_is_said(tmp_path, capsys):
    for name, size in (("train.jsonl", 1), ("a.json", 0), ("b.json", 0), ("validation.jsonl", 1), ("x.xz", 1)):
        (tmp_path / name).write_text("{}\n" * 50 * size)
    (tmp_path / "README.md").write_text("about")
    assert [Path(source.name).name for source in find([str(tmp_path)])] == ["train.jsonl", "validation.jsonl"]
    notes = capsys.readouterr().err
    assert "the 2 jsonl files are read, a.json, b.json, x.xz skipped" in notes
    assert "several splits (train, valid)" in notes and "README" not in notes


def test_files_folders_and_globs(tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "b/c/3.jsonl", "b/info.json", "b/.hidden.jsonl", "4.txt", "5.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pack(tmp_path / name, b"{}")

    def names(*given):
        return [source.name.removeprefix(f"{tmp_path}/") for source in find([str(tmp_path / name) for name in given])]

    assert names("b") == ["b/1.jsonl.gz", "b/2.jsonl", "b/c/3.jsonl"]
    assert names("*.txt", "4.txt") == ["4.txt", "5.txt"]
    assert names("**/*.jsonl") == ["b/2.jsonl", "b/c/3.jsonl"]
    (tmp_path / "x.zip").write_bytes(b"")
    (tmp_path / "none").mkdir()
    for wrong, message in (
        ("x.zip", "format"),
        ("no*.txt", "No file matches"),
        ("no.txt", "There is no file"),
        ("none", "holds no file"),
    ):
        with pytest.raises(UserError, match=message):
            names(wrong)


def test_a_hub_dataset_is_streamed(monkeypatch):
    asked = {}

    def load_dataset(name, subset, **kw):
        asked.update(kw, name=name, subset=subset)
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("org/name", subset="en", split="train[:5]", revision="v1") == ROWS
    assert asked == {"name": "org/name", "subset": "en", "split": "train[:5]", "revision": "v1", "streaming": True}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'puna\[data\]'"):
        read("org/name")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Reading a\.parquet needs the package pyarrow: pip install 'puna\[data\]'"):
        list(chunks(Source("a.parquet", "parquet")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "CHUNK_BYTES", 1 << 16)
    row = json.dumps({"text": "x" * 1000}).encode()
    count = 20_000
    data = b"[" + b",\n".join([row] * count) + b"]" if name == "a.json" else b"\n".join([row] * count)
    path = pack(tmp_path / name, data)
    del data
    tracemalloc.start()
    seen = sum(1 for chunk in chunks(find([str(path)])[0]) for _ in rows(chunk))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count and peak < 8 << 20, f"{peak:,} bytes for a file of 20 MB"
