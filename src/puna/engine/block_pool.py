"""The blocks of the paged KV cache: allocation, sharing and reuse of prefixes. Holds no tensors.

A block is free, cached (unused, but findable by its content) or used (by one sequence or several). A full block has a
content id: (content id of the block before it, its tokens) -> content id. Tokens are compared, not hashes of them, so a
hit is never a collision.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

Key = tuple[int, tuple[int, ...]]
ROOT = 0  # content id of the empty prefix


class BlockPool:
    """`num_blocks` blocks of `block_size` token positions each."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self.users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers first, so that runs are contiguous
        self._cached: OrderedDict[int, None] = OrderedDict()  # unused blocks with known content, oldest first
        self._by_key: dict[Key, tuple[int, int]] = {}  # content -> (block, content id)
        self._key_of: dict[int, Key] = {}
        self._next_content_id = ROOT + 1

    @property
    def available(self) -> int:
        """Blocks that could be allocated now."""
        return len(self._free) + len(self._cached)

    def match(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """(blocks, content ids) of the longest cached prefix of whole blocks, now also used by the caller.

        At least the last token is left out: something must be computed to get logits.
        """
        blocks: list[int] = []
        content_ids: list[int] = []
        if not self.prefix_caching:
            return blocks, content_ids
        size, content_id = self.block_size, ROOT
        for start in range(0, len(tokens) - size, size):
            entry = self._by_key.get((content_id, tuple(tokens[start : start + size])))
            if entry is None:
                break
            block, content_id = entry
            blocks.append(block)
            content_ids.append(content_id)
        self.fork(blocks)
        return blocks, content_ids

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of unknown content, or None (and nothing happens) when there are not as many."""
        if count > self.available:
            return None
        out = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self.users[block] = 1
            out.append(block)
        return out

    def fork(self, blocks: Iterable[int]) -> None:
        """One more user for each of these blocks."""
        for block in blocks:
            self._cached.pop(block, None)
            self.users[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One user less. Blocks with known content stay findable, the end of a sequence going before its beginning."""
        for block in reversed(blocks):
            self.users[block] -= 1
            if self.users[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def register(self, tokens: Sequence[int], blocks: Sequence[int], content_ids: list[int], computed: int) -> None:
        """Make findable the content of a sequence's blocks that are full up to `computed`; extends `content_ids`."""
        if not self.prefix_caching:
            return
        size = self.block_size
        for i in range(len(content_ids), computed // size):
            key = (content_ids[-1] if content_ids else ROOT, tuple(tokens[i * size : (i + 1) * size]))
            if key not in self._by_key:  # otherwise the same content was computed twice; the first block keeps the key
                self._by_key[key] = (blocks[i], self._next_content_id)
                self._key_of[blocks[i]] = key
                self._next_content_id += 1
            content_ids.append(self._by_key[key][1])

    def forget(self, blocks: Iterable[int]) -> None:
        """Make the content of these used blocks unfindable."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._by_key[key]

    def check(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless every block has exactly one state and `tables` explain all users."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, users in enumerate(self.users) if users}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached and not free & used and not cached & used, "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is lost"
        assert all(block in self._key_of for block in cached), "a cached block has no name"
        assert not any(block in self._key_of for block in free), "a free block has a name"
        assert {block: self._by_key[key][0] for block, key in self._key_of.items()} == {b: b for b in self._key_of}
        assert len(self._by_key) == len(self._key_of), "a name points to nothing"
        users = Counter(block for table in tables for block in table)
        assert users == Counter({block: n for block, n in enumerate(self.users) if n}), "users are not the holders"
