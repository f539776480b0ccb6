"""The token store is Megatron-LM's format, byte for byte, and damage never gets through."""

import json
import struct

import numpy as np
import pytest

from puna.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, open_dataset, token_dtype
from puna.errors import UserError
from puna.tokenizer import Tokenizer


def documents(seed: int = 0, count: int = 20, low: int = 0, high: int = 300) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 60000, rng.integers(low, high)) for _ in range(count)]


def write(prefix, docs, dtype=np.int32) -> IndexedDataset:
    with IndexedDatasetBuilder(prefix, dtype) as writer:
        for doc in docs:
            writer.add(doc)
    return IndexedDataset(prefix)


def same(store, docs) -> bool:
    return len(store) == len(docs) and all(np.array_equal(store.doc(i), doc) for i, doc in enumerate(docs))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_what_is_written_is_read(tmp_path, dtype):
    docs = documents() + [[], [1, 2]]
    store = write(tmp_path / "new" / "a", docs, dtype)
    assert same(store, docs) and store.dtype == dtype
    assert [int(n) for n in store.lengths] == [len(doc) for doc in docs]


def test_the_bytes_are_those_of_the_format(tmp_path):
    write(tmp_path / "a", [[1, 2, 3], [65499]], np.uint16)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 65499)
    assert (tmp_path / "a.idx").read_bytes() == b"MMIDIDX\x00\x00" + struct.pack(
        "<QBQQ 2i 2q 3q", 1, 8, 2, 3, 3, 1, 0, 6, 0, 1, 2
    )


def test_several_sequences_can_make_a_document(tmp_path):
    (tmp_path / "a.bin").write_bytes(struct.pack("<5i", 1, 2, 3, 4, 5))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 4)
    (tmp_path / "a.idx").write_bytes(header + struct.pack("<3i 3q 4q", 2, 1, 2, 0, 8, 12, 0, 2, 2, 3))
    assert same(IndexedDataset(tmp_path / "a"), [[1, 2, 3], [], [4, 5]])


def test_a_writer_goes_on_from_its_mark(tmp_path):
    docs = documents()
    writer = IndexedDatasetBuilder(tmp_path / "a", np.int32)
    for doc in docs[:8]:
        writer.add(doc)
    mark = writer.mark()
    for doc in docs[3:6]:  # written after the mark, then the process is killed
        writer.add(doc)
    writer.close()
    again = IndexedDatasetBuilder(tmp_path / "a", np.int32, at=mark)
    for doc in docs[8:]:
        again.add(doc)
    again.finalize()
    assert same(IndexedDataset(tmp_path / "a"), docs)


def test_a_failed_writer_leaves_the_older_store(tmp_path):
    write(tmp_path / "a", [[1]])
    with pytest.raises(KeyboardInterrupt), IndexedDatasetBuilder(tmp_path / "a", np.int32) as writer:
        writer.add([2])
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert same(IndexedDataset(tmp_path / "a"), [[1]])


def test_an_id_that_does_not_fit_is_refused(tmp_path):
    writer = IndexedDatasetBuilder(tmp_path / "a", np.uint16)
    with pytest.raises(ValueError, match="fit"):
        writer.add([70000])
    writer.discard()
    assert token_dtype(32000) == np.uint16 and token_dtype(128256) == np.int32


def test_damage_is_named(tmp_path):
    write(tmp_path / "a", documents(1, low=5))
    index, tokens = (tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(index), 40):
        (tmp_path / "a.idx").write_bytes(index[:cut])
        with pytest.raises(UserError, match=r"a\.idx"):
            IndexedDataset(tmp_path / "a")
    for place in rng.integers(0, len(index), 200):  # a flipped byte is found, or gives no wrong document
        changed = bytearray(index)
        changed[place] ^= 0x40
        (tmp_path / "a.idx").write_bytes(changed)
        with pytest.raises(UserError):
            IndexedDataset(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(tokens[:-4])
    with pytest.raises(UserError, match="cut short"):
        IndexedDataset(tmp_path / "a")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match="can't be read"):
        IndexedDataset(tmp_path / "a")


def test_a_dataset_is_text_or_ids_with_labels(tmp_path):
    docs = documents(2, low=1)
    write(tmp_path / "t_text_document", docs)
    text = open_dataset(tmp_path / "t")
    assert len(text) == len(docs)
    assert all(np.array_equal(text.sample(i)[k], docs[i]) for i in range(len(docs)) for k in (0, 1))
    assert open_dataset(tmp_path / "t_text_document").fingerprint() == text.fingerprint()

    labels = [np.where(np.arange(len(doc)) < len(doc) // 2, -100, doc) for doc in docs]
    write(tmp_path / "c_input_ids_document", docs)
    write(tmp_path / "c_labels_document", labels)
    chat = open_dataset(tmp_path / "c")
    assert all(np.array_equal(chat.sample(i)[1], labels[i]) for i in range(len(docs)))
    assert chat.sample(0)[0].dtype == chat.sample(0)[1].dtype == np.int32
    before = chat.fingerprint()
    write(tmp_path / "c_labels_document", list(docs))
    assert open_dataset(tmp_path / "c").fingerprint() != before

    write(tmp_path / "c_labels_document", labels[:-1])
    with pytest.raises(UserError, match="different lengths"):
        open_dataset(tmp_path / "c")


def test_what_is_not_there_is_said(tmp_path):
    write(tmp_path / "p_train_text_document", [[1]])
    with pytest.raises(UserError, match="there is p_train"):
        open_dataset(tmp_path / "p")
    write(tmp_path / "empty_text_document", [])
    with pytest.raises(UserError, match="no samples"):
        open_dataset(tmp_path / "empty")


def test_another_tokenizer_is_refused(tmp_path, tiny_checkpoint):
    tokenizer = Tokenizer.load(tiny_checkpoint())
    write(tmp_path / "p_train_text_document", [[1, 2]])
    card = {"tokenizer": {"source": "tiny", "vocabulary": tokenizer.fingerprint(template=False)}}
    (tmp_path / "p.json").write_text(json.dumps(card))
    data = open_dataset(tmp_path / "p_train")
    assert data.metadata == card
    data.check_tokenizer(tokenizer)
    data.check_tokenizer(tokenizer.with_template("vicuna"))  # the template changes no id
    card["tokenizer"]["vocabulary"] = "another"
    (tmp_path / "p.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="made with the tokenizer of tiny"):
        open_dataset(tmp_path / "p_train").check_tokenizer(tokenizer)
    (tmp_path / "p.json").write_text("[")
    with pytest.raises(UserError, match="damaged"):
        open_dataset(tmp_path / "p_train")


def test_megatron_reads_ours_and_we_read_theirs(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core (extra bench)")
    docs = documents(3, low=1)
    for dtype in (np.uint16, np.int32):
        ours = write(tmp_path / "ours", docs, dtype)
        theirs = indexed.IndexedDataset(str(tmp_path / "ours"))
        assert len(theirs) == len(docs) and all(np.array_equal(theirs[i], docs[i]) for i in range(len(docs)))
        assert np.array_equal(theirs.document_indices, np.arange(len(docs) + 1))

        builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        import torch

        for doc in docs:
            builder.add_document(torch.from_numpy(doc.astype(np.int64)), [len(doc)])
        builder.finalize(str(tmp_path / "theirs.idx"))
        assert same(IndexedDataset(tmp_path / "theirs"), docs)
        for end in (".bin", ".idx"):
            assert (tmp_path / f"ours{end}").read_bytes() == (tmp_path / f"theirs{end}").read_bytes()
        assert ours.dtype == dtype
