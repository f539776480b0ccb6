"""Rows hold what the stores hold, documents never leak, no kill, ranks or batch size loses or doubles a sample."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.data.indexed_dataset import IndexedDatasetBuilder, open_dataset
from puna.data.loader import PackedLoader, collate
from puna.errors import UserError

SEQ = 32


def make(prefix, lengths, *, chat: bool = False, seed: int = 0):
    """A dataset whose token ids are all different, so that each can be told from all others."""
    rng, first = np.random.default_rng(seed), 1000 * seed + 1
    with IndexedDatasetBuilder(f"{prefix}_{'input_ids' if chat else 'text'}_document", np.int32) as ids:
        for length in lengths:
            ids.add(np.arange(first, first + length))
            first += length
    if chat:
        with IndexedDatasetBuilder(f"{prefix}_labels_document", np.int32) as labels:
            first = 1000 * seed + 1
            for length in lengths:
                tokens = np.arange(first, first + length)
                labels.add(np.where(tokens >= first + rng.integers(0, length), tokens, -100))
                first += length
    return open_dataset(prefix)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "text", np.random.default_rng(1).integers(1, 90, 60))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    lengths = np.random.default_rng(2).integers(1, SEQ + 1, 50)
    return make(tmp_path_factory.mktemp("data") / "chat", lengths, chat=True, seed=5)


def rows_of(loader, count):
    return [loader.row(index) for index in range(count)]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_row_holds_documents_that_do_not_see_one_another(request, kind, packing):
    data = request.getfixturevalue(kind)
    loader = PackedLoader([(data, None)], SEQ, 7, packing=packing)
    follows = {}  # token -> its label in the store
    for index in range(len(data)):
        ids, labels = data.sample(index)
        follows |= dict(zip(ids[:-1].tolist(), labels[1:].tolist(), strict=True)) | {int(ids[-1]): -100}
    seen = Counter()
    for row in rows_of(loader, loader.epoch_rows):
        used = row.ids > 0
        seen.update(row.ids[used].tolist())
        assert [follows[token] for token in row.ids[used].tolist()] == row.labels[used].tolist()
        assert (row.labels[~used] == -100).all()
        for number in np.unique(row.documents):
            inside = row.documents == number
            assert np.array_equal(row.positions[inside], np.arange(inside.sum()))
            if row.ids[inside].all():
                store, sample = row.samples[number]
                assert np.isin(row.ids[inside], data.sample(sample)[0]).all() and store == 0
            else:
                assert not row.ids[inside].any() and number == len(row.samples)  # padding stands alone
        assert (np.diff(row.documents) >= 0).all()
        assert packing == "best_fit" or len(row.samples) == 1
    assert seen == Counter(dict.fromkeys(follows, 1))


def test_long_text_goes_on_in_the_next_piece(tmp_path):
    data = make(tmp_path / "long", [SEQ * 2 + 5])
    rows = rows_of(PackedLoader([(data, None)], SEQ, 0), 3)
    tokens = [(t, n) for row in rows for t, n in zip(row.ids.tolist(), row.labels.tolist(), strict=True) if t]
    assert sorted(tokens) == [(t, t + 1) for t in range(1, SEQ * 2 + 5)] + [(SEQ * 2 + 5, -100)]


def test_concatenation_is_one_stream(text):
    loader = PackedLoader([(text, None)], SEQ, 3, packing="concat")
    for row in rows_of(loader, loader.epoch_rows):
        used = int((row.ids > 0).sum())
        assert np.array_equal(row.labels[: used - 1], row.ids[1:used])  # over the borders of documents too
        assert np.array_equal(row.positions[:used], np.arange(used)) and not row.documents[:used].any()


def test_samples_longer_than_a_row(tmp_path):
    data = make(tmp_path / "chat", [10, SEQ, SEQ + 1, 3 * SEQ], chat=True)
    with pytest.raises(UserError, match=r"2 of 4 samples of .* do not fit a row of 32 tokens \(the longest has 96"):
        PackedLoader([(data, None)], SEQ, 0)
    for long, docs in (("cut", {0, 1, 2, 3}), ("drop", {0, 1})):
        loader = PackedLoader([(data, None)], SEQ, 0, long=long)
        rows = rows_of(loader, loader.epoch_rows)
        assert {sample for row in rows for _, sample in row.samples} == docs
        assert loader.too_long == {data.prefix: 2}
        tokens = np.concatenate([row.ids[row.ids > 0] for row in rows])
        assert len(tokens) == 10 + SEQ + (2 * SEQ if long == "cut" else 0)
    only = make(tmp_path / "only", [SEQ + 1], chat=True)
    with pytest.raises(UserError, match="no sample that fits"):
        PackedLoader([(only, None)], SEQ, 0, long="drop")


def instructions(folder, samples):
    """A dataset of (prompt tokens, answer tokens) samples."""
    with (
        IndexedDatasetBuilder(f"{folder}_input_ids_document", np.int32) as ids,
        IndexedDatasetBuilder(f"{folder}_labels_document", np.int32) as labels,
    ):
        for prompt, answer in samples:
            tokens = np.arange(1, prompt + answer + 1)
            ids.add(tokens)
            labels.add(np.where(np.arange(len(tokens)) < prompt, -100, tokens))
    return open_dataset(folder)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_sample_whose_answer_is_cut_off_is_dropped_and_counted(tmp_path, packing):
    data = instructions(tmp_path / "some", [(4, 4), (SEQ, 4), (SEQ + 1, 4), (SEQ - 1, 9)])
    loader = PackedLoader([(data, None)], SEQ, 0, long="cut", packing=packing)
    rows = rows_of(loader, loader.epoch_rows)
    # The second one's first answer token is still predicted by the last token of the row
    assert sorted(sample for row in rows for _, sample in row.samples) == [0, 1, 3]
    assert loader.too_long == {data.prefix: 3} and loader.cut_empty == {data.prefix: 1}


@pytest.mark.parametrize(
    ("samples", "long"),
    [([(SEQ + 1, 4), (2 * SEQ, 9)], "cut"), ([(SEQ + 1, 4), (9, 0)], "cut"), ([(SEQ, 4), (9, 0)], "drop")],
)
def test_nothing_left_to_train_is_refused(tmp_path, samples, long):
    data = instructions(tmp_path / "none", samples)
    with pytest.raises(UserError, match=r"none has nothing left to train on: \d of 2 samples are longer than"):
        PackedLoader([(data, None)], SEQ, 0, long=long)


def test_labels_that_are_all_masked_are_refused(tmp_path):
    make(tmp_path / "m", [5, 6], chat=True)
    with IndexedDatasetBuilder(tmp_path / "m_labels_document", np.int32) as labels:
        labels.extend(np.full(11, -100), np.array([5, 6]))
    with pytest.raises(UserError, match="all labels are masked"):
        PackedLoader([(open_dataset(tmp_path / "m"), None)], SEQ, 0)


def test_epochs_are_shuffled_each_in_its_own_order(text):
    loader = PackedLoader([(text, None)], SEQ, 3)
    count = loader.epoch_rows
    first, second = ([tuple(loader.row(e * count + i).ids) for i in range(count)] for e in range(2))
    assert first != second and sorted(first) == sorted(second)
    assert first == [tuple(row.ids) for row in rows_of(PackedLoader([(text, None)], SEQ, 3), count)]
    assert first != [tuple(row.ids) for row in rows_of(PackedLoader([(text, None)], SEQ, 4), count)]


def test_a_mixture_has_its_weights_everywhere(text, chat):
    loader = PackedLoader([(text, 3), (chat, 1)], SEQ, 0)
    share = np.array([row.samples[0][0] for row in rows_of(loader, 10 * loader.epoch_rows)])
    for start in range(0, len(share) - 40, 7):
        assert abs(share[start : start + 40].mean() - 0.25) <= 0.06
    # each dataset comes round evenly: no sample twice before all others were there
    for number, data in enumerate((text, chat)):
        own = [row for row in rows_of(loader, 10 * loader.epoch_rows) if row.samples[0][0] == number]
        turn = len({tuple(row.ids) for row in own})
        for start in range(0, len(own) - turn + 1, turn):
            tokens = np.concatenate([row.ids[row.ids > 0] for row in own[start : start + turn]])
            assert len(tokens) == data.lengths.sum() == len(np.unique(tokens))
    whole = PackedLoader([(text, None), (chat, None)], SEQ, 0)
    seen = np.concatenate([row.ids[row.ids > 0] for row in rows_of(whole, whole.epoch_rows)])
    assert len(np.unique(seen)) == len(seen) == text.lengths.sum() + chat.lengths.sum()


@pytest.mark.parametrize("weights", [(1, None), (0, 1), (-1, 2), (1e-9, 1)])
def test_weights_that_mean_nothing_are_refused(text, chat, weights):
    with pytest.raises(UserError, match="weight"):
        PackedLoader([(text, weights[0]), (chat, weights[1])], SEQ, 0)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=5))
def test_kills_and_other_ranks_lose_and_double_nothing(text, chat, runs):
    """Each run: (ranks, rows per rank, steps). It saves after every step and is killed after computing one more."""
    data = [(text, None), (chat, None)]
    reference = PackedLoader(data, SEQ, 11)
    state, taken = None, []
    for size, n_rows, steps in runs:
        loaders = [PackedLoader(data, SEQ, 11, rank=rank, size=size) for rank in range(size)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(steps):
            batch = [row for loader in loaders for row in loader.next_batch(n_rows)]
            taken += sorted(tuple(row.ids) for row in batch)
            assert len({str(loader.state_dict()) for loader in loaders}) == 1
            state = loaders[0].state_dict()
        loaders[0].next_batch(n_rows)  # computed, never saved
    wanted, start = [], 0
    for size, n_rows, steps in runs:
        for _ in range(steps):
            wanted += sorted(tuple(reference.row(i).ids) for i in range(start, start + size * n_rows))
            start += size * n_rows
    assert taken == wanted and (state is None or state["cursor"] == start)


@pytest.mark.parametrize("size", [1, 3])
def test_validation_sees_every_row_once(text, size):
    loaders = [PackedLoader([(text, None)], SEQ, 0, rank=rank, size=size) for rank in range(size)]
    passes = [list(loader.validation_batches(4)) for loader in loaders]
    assert len({len(batches) for batches in passes}) == 1 and all(loader.cursor == 0 for loader in loaders)
    rows = [row for batches in passes for batch in batches for row in batch]
    assert all(len(batch) == 4 for batches in passes for batch in batches)
    tokens = np.concatenate([row.ids[row.ids > 0] for row in rows])
    assert len(np.unique(tokens)) == len(tokens) == text.lengths.sum()
    for row in rows:
        assert row.samples or (row.labels == -100).all() and not row.documents.any()


def test_other_data_is_no_resume(text, chat, tmp_path):
    state = PackedLoader([(text, None)], SEQ, 0).state_dict()
    for other in (
        PackedLoader([(chat, None)], SEQ, 0),
        PackedLoader([(text, None)], SEQ * 2, 0),
        PackedLoader([(text, None)], SEQ, 1),
        PackedLoader([(text, None)], SEQ, 0, packing="none"),
        PackedLoader([(text, 1), (chat, 1)], SEQ, 0),
    ):
        with pytest.raises(UserError, match="not those that the checkpoint was trained on"):
            other.load_state_dict(state)


def test_collated_rows_are_tensors(text):
    rows = PackedLoader([(text, None)], SEQ, 0).next_batch(3)
    batch = collate(rows)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (3, SEQ))
    assert all(np.array_equal(batch[name][1].numpy(), getattr(rows[1], name)) for name in batch)
