"""
The order in which a run visits its tokens: a function of the seed and of a number, without a state to save.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence

import numpy as np

GROUP = 2**31  # tokens of the shards that are mixed, 4 GB: most machines hold them in memory
VERSION = 2  # of this order; version 1 visited the shards one after another


def permutation(n: int, *seed: int) -> np.ndarray:
    """The numbers 0 .. n - 1 in the random order that `seed` stands for: (n,) uint32, 8 MB for a group's
    windows of 1,024 tokens."""
    return np.random.default_rng(seed).permutation(np.arange(n, dtype=np.uint32))


class WindowOrder:
    """The order in which the windows of some shards are visited, epoch after epoch.

    A window is `T + 1` consecutive tokens of one shard, starting at a multiple of T. Neighbouring shards, and
    neighbouring texts in a shard, are about the same things, and a step should see the mean of all. So every
    epoch takes the shards in an order drawn from (seed, epoch), in groups of at most GROUP tokens, and visits
    the windows of a group in one order drawn from (seed, epoch, group). Without a seed, shards and windows
    are visited as they lie.
    """

    def __init__(self, lengths: list[int], T: int, seed: int | None = None):
        """`lengths`: the tokens of each shard."""
        self.lengths, self.T, self.seed = lengths, T, seed
        self.windows_per_shard = np.maximum(0, np.array(lengths) - 1) // T
        self.n_windows = int(self.windows_per_shard.sum())  # in an epoch
        # Both serve many steps: a whole epoch, a whole group.
        self.groups = functools.lru_cache(maxsize=2)(self.draw_groups)
        self.permutation = functools.lru_cache(maxsize=2)(permutation)

    def draw_groups(self, epoch: int) -> list[tuple[list[int], list[int]]]:
        """An epoch's groups: the shards of each, and the windows up to the end of each of its shards."""
        if self.seed is None:
            groups = [list(range(len(self.lengths)))]
        else:
            groups, size = [[]], 0
            for shard in permutation(len(self.lengths), self.seed, epoch).tolist():
                size += self.lengths[shard]
                if size > GROUP and groups[-1]:
                    groups.append([])
                    size = self.lengths[shard]
                groups[-1].append(shard)
        return [(group, np.cumsum(self.windows_per_shard[group]).tolist()) for group in groups]

    def find_group(self, index: int) -> tuple[int, int, int]:
        """The epoch and the group of window `index` of the run, and the window's place in that group."""
        epoch, place = divmod(index, self.n_windows)
        group = 0
        while place >= (n := self.groups(epoch)[group][1][-1]):
            group, place = group + 1, place - n
        return epoch, group, place

    def locate(self, index: int) -> tuple[int, int]:
        """Window `index` of the run: its shard, and the offset where it starts."""
        epoch, group, window = self.find_group(index)
        shards, ends = self.groups(epoch)[group]
        if self.seed is not None:  # counted from 1: for NumPy, (seed, epoch) and (seed, epoch, 0) are equal
            window = int(self.permutation(ends[-1], self.seed, epoch, 1 + group)[window])
        i = bisect.bisect_right(ends, window)
        before = ends[i - 1] if i else 0  # windows in the shards before
        return shards[i], (window - before) * self.T


class Order:
    """The order in which the steps of a run take the windows of a split.

    There is one part, all shards; or the parts of a mix, of which every step takes its share: its first rows
    from part 0, its last from the last. Each part has its own epochs.
    """

    def __init__(self, parts: list[WindowOrder], rows_per_step: int, shares: Sequence[float] = (1.0,)):
        """`shares` of the parts, of sum 1."""
        self.parts, self.rows_per_step = parts, rows_per_step
        self.shares_up_to = np.cumsum(shares)  # of part 0, of parts 0 and 1, ...
        self.shares_up_to[-1] = 1.0
        self.first_shards = np.cumsum([0, *(len(part.lengths) for part in parts)]).tolist()
        self.n_windows = sum(part.n_windows for part in parts)
        self.begun: set[tuple[int, int, int]] = set()  # groups: part, epoch, number

    def taken(self, step: int) -> np.ndarray:
        """How many windows of each part the steps before `step` take: (parts,) int64."""
        ends = np.floor(step * self.rows_per_step * self.shares_up_to).astype(np.int64)
        return np.diff(ends, prepend=0)

    def locate(self, index: int) -> tuple[int, int]:
        """Window `index` of the run: its shard, and the offset where it starts."""
        part = 0
        if len(self.parts) > 1:
            step, row = divmod(index, self.rows_per_step)
            taken = self.taken(step + 1)
            ends = np.cumsum(taken - self.taken(step))
            part = int(np.searchsorted(ends, row, side="right"))
            index = int(taken[part] - (ends[part] - row))
        shard, start = self.parts[part].locate(index)
        return self.first_shards[part] + shard, start

    def begun_by(self, step: int) -> Iterator[list[int]]:
        """The shards of each group to which `step` comes, once."""
        for number, (part, index) in enumerate(zip(self.parts, self.taken(step).tolist(), strict=True)):
            epoch, group, _ = part.find_group(index)
            if (number, epoch, group) not in self.begun:
                self.begun.add((number, epoch, group))
                shards, _ = part.groups(epoch)[group]
                yield [self.first_shards[number] + shard for shard in shards]
