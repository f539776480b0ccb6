"""Every format gives the rows that stand in it, at constant memory, and whatever the cuts are."""

import csv
import gzip
import io
import json
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.data import records, sources
from puna.data.json_stream import json_texts
from puna.data.sources import Bad, Source, chunks, find, rows
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
    assert read(path) == [{"a": "1", "b": "2"}, Bad("more fields than the header names"), {"a": "4", "b": None}]


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
    bad = [Bad("malformed JSON"), Bad("not a JSON object"), Bad("not UTF-8")]
    assert read(path) == [{"text": "a"}, *bad, {"text": "a"}, Bad("malformed JSON")]
    whole = json.dumps(ROWS).encode()
    cut = read(pack(tmp_path / "cut.json", whole[: len(whole) // 2]))
    assert cut[:-1] == ROWS[: len(cut) - 1] and len(cut) > 140 and cut[-1] == Bad("malformed JSON")
    assert read(pack(tmp_path / "b.json", b'[{"text": "a"}, 3, {"text": "\xff"}]')) == [{"text": "a"}, *bad[1:]]
    assert read(pack(tmp_path / "empty.json", b"")) == read(pack(tmp_path / "empty.jsonl", b"")) == []


def test_a_cut_archive_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:-20])
    with pytest.raises(UserError, match="cut short"):
        read(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match="damaged"):
        read(path)


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
        ("no*.txt", "no file matches"),
        ("no.txt", "no file"),
        ("none", "folder"),
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
    with pytest.raises(UserError, match=r"reading a\.parquet needs the package pyarrow: pip install 'puna\[data\]'"):
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
