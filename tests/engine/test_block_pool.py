"""The block pool: every block has one state, content is found when it is there and never when it is not."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from puna.engine.block_pool import BlockPool

BLOCKS, SIZE = 9, 2


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks of a sequence of these tokens, computed from its beginning."""
    blocks = pool.allocate(-(-len(tokens) // pool.block_size))
    assert blocks is not None
    pool.register(tokens, blocks, [], len(tokens))
    return blocks


def test_blocks_are_given_out_once_and_in_order():
    pool = BlockPool(4, SIZE)
    assert pool.allocate(3) == [0, 1, 2]  # neighbours, so that they can be read in place
    assert pool.allocate(2) is None
    assert pool.available == 1
    pool.free([0, 1, 2])
    assert pool.available == 4
    pool.check()


def test_a_prefix_is_found_by_its_tokens_and_never_whole():
    pool = BlockPool(BLOCKS, SIZE)
    blocks = fill(pool, [1, 2, 3, 4, 5])
    assert pool.match([1, 2, 3, 4, 9]) == (blocks[:2], [1, 2])
    assert pool.match([1, 2, 3, 4])[0] == blocks[:1]  # its last token is computed again, to get logits
    assert pool.match([1, 2, 9, 4, 5])[0] == blocks[:1]
    assert pool.match([3, 4, 5, 6]) == ([], [])  # the same tokens in another place
    pool.check([blocks, blocks[:2], blocks[:1], blocks[:1]])


def test_a_block_is_named_only_when_full_and_computed():
    pool = BlockPool(BLOCKS, SIZE)
    blocks = pool.allocate(2)
    content_ids: list[int] = []
    pool.register([1, 2, 3, 4], blocks, content_ids, 3)
    assert len(content_ids) == 1
    assert pool.match([1, 2, 3, 4, 5])[0] == blocks[:1]


def test_the_end_of_the_oldest_sequence_is_forgotten_first():
    pool = BlockPool(4, SIZE)
    old, new = fill(pool, [1, 2, 3, 4]), fill(pool, [5, 6, 7, 8])
    pool.free(old)
    pool.free(new)
    taken = pool.allocate(1)
    assert taken == [old[1]]
    pool.check([taken])
    assert pool.match([1, 2, 3, 4, 0])[0] == old[:1]
    assert pool.match([5, 6, 7, 8, 0])[0] == new


def test_content_computed_twice_has_one_name():
    pool = BlockPool(BLOCKS, SIZE)
    first, second = fill(pool, [1, 2, 3]), fill(pool, [1, 2, 3])
    pool.free(second)
    pool.check([first])
    assert pool.match([1, 2, 3])[0] == first[:1]


def test_forgotten_content_is_not_found():
    pool = BlockPool(BLOCKS, SIZE)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.forget(blocks)
    pool.free(blocks)
    pool.check()
    assert pool.match([1, 2, 3, 4, 5]) == ([], [])
    assert pool.available == BLOCKS


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(BLOCKS, SIZE, prefix_caching=False)
    pool.free(fill(pool, [1, 2, 3, 4]))
    assert pool.match([1, 2, 3, 4, 5]) == ([], [])
    pool.check()


@pytest.mark.parametrize("broken", ["lost", "twice", "held by nobody"])
def test_check_finds_what_is_wrong(broken: str):
    pool = BlockPool(BLOCKS, SIZE)
    blocks = pool.allocate(2)
    tables = [blocks]
    if broken == "lost":
        pool.users[blocks[0]] = 0
    elif broken == "twice":
        pool.free(blocks)
        pool.fork(blocks)
    else:
        tables = []
    with pytest.raises(AssertionError):
        pool.check(tables)


class PoolMachine(RuleBasedStateMachine):
    """Sequences over a tiny alphabet come, grow, fork and go. `content` is what was really written into each block."""

    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=7)

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.held: list[tuple[list[int], list[int], list[int]]] = []  # tokens, blocks, serials

    def write(self, tokens: list[int], blocks: list[int], content_ids: list[int], start: int) -> None:
        for i in range(start, len(blocks)):
            self.content[blocks[i]] = tuple(tokens[: (i + 1) * SIZE])
        self.pool.register(tokens, blocks, content_ids, len(tokens))

    @rule(tokens=tokens)
    def enter(self, tokens: list[int]) -> None:
        blocks, content_ids = self.pool.match(tokens)
        assert len(blocks) * SIZE < len(tokens)
        for i, block in enumerate(blocks):
            assert self.content[block] == tuple(tokens[: (i + 1) * SIZE])
        found = len(blocks)
        new = self.pool.allocate(-(-len(tokens) // SIZE) - found)
        if new is None:
            self.pool.free(blocks)
            return
        blocks += new
        self.write(tokens, blocks, content_ids, found)
        self.held.append((tokens, blocks, content_ids))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=tokens)
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        tokens, blocks, content_ids = data.draw(st.sampled_from(self.held))
        if len(tokens) % SIZE and self.pool.users[blocks[-1]] > 1:
            return  # the scheduler would copy it first
        new = self.pool.allocate(-(-(len(tokens) + len(more)) // SIZE) - len(blocks))
        if new is not None:
            start = len(tokens) // SIZE
            tokens += more
            blocks += new
            self.write(tokens, blocks, content_ids, start)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tokens, blocks, content_ids = data.draw(st.sampled_from(self.held))
        self.pool.fork(blocks)
        self.held.append((list(tokens), list(blocks), list(content_ids)))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), spoiled=st.booleans())
    def leave(self, data: st.DataObject, spoiled: bool) -> None:
        leaving = data.draw(st.integers(0, len(self.held) - 1))
        _, blocks, _ = self.held.pop(leaving)
        if spoiled:
            self.pool.forget([block for block in blocks if self.pool.users[block] == 1])
        self.pool.free(blocks)

    @invariant()
    def sound(self) -> None:
        self.pool.check(blocks for _, blocks, _ in self.held)
        assert self.pool.available == BLOCKS - len({block for _, blocks, _ in self.held for block in blocks})


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
test_any_history = PoolMachine.TestCase
