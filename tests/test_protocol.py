"""Models of who waits for whom, run in random orders. Of the barriers in a block of the Hopper convolution
(kernels/conv_sm90.cuh): nobody waits forever, nobody overwrites what another still reads. A publisher, loaders, storers and consumer warpgroups, as they are there; a
tile is a list of taps, True where a tap opens a new box. Keep it in step with Publisher, Loader, Storer, multiply and finish.
And of the blocks that normalize beside those that multiply (kernels/conv_normalizer.cuh)."""

import random

import pytest

SLOTS, BOXES = 4, 2


class Barrier:
    """An mbarrier: waiting for a parity ends when the phase of that parity is not the current one."""

    def __init__(self, count):
        self.count = self.missing = count
        self.phase = 0

    def arrive(self):
        self.missing -= 1
        if self.missing == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def passed(self, parity):
        return self.phase & 1 != parity


class Ring:
    def __init__(self, stages):
        self.stages, self.stage, self.phase = stages, 0, 0

    def advance(self):
        self.stage += 1
        if self.stage == self.stages:
            self.stage, self.phase = 0, self.phase ^ 1


class Block:
    def __init__(self, tiles, consumers, rings, keeps_weights, weight_stages, buffers, lag):
        self.queue, self.consumers, self.rings, self.weight_stages, self.buffers = list(tiles), consumers, rings, weight_stages, buffers
        self.lag = lag
        self.loaders = 1 if keeps_weights else 2
        self.box_loader = 0 if keeps_weights or rings == 2 else 1
        self.tiles = [None] * SLOTS
        self.box_full, self.box_empty = ([Barrier(count) for _ in range(BOXES)] for count in (1, consumers))
        self.weight_full, self.weight_empty = ([[Barrier(count) for _ in range(weight_stages)] for _ in range(rings)] for count in (1, consumers // rings))
        self.tile_full, self.tile_empty = ([Barrier(count) for _ in range(SLOTS)] for count in (1, consumers + 2 + self.loaders))
        self.buffer_free, *self.staged = ([Barrier(1) for _ in range(consumers)] for _ in range(3))
        self.in_use = [None] * consumers         # which consumer's outputs a buffer holds
        self.second_may_begin = False

    def buffer(self, me):
        return me if self.buffers > 1 else 0

    def publisher(self):
        """Yields what it waits for, and None when a tile is published, or told that there are no more."""
        slot = Ring(SLOTS)
        more = True
        while more:
            yield from waiting_for(lambda: self.tile_empty[slot.stage].passed(slot.phase ^ 1))
            more = bool(self.queue)
            self.tiles[slot.stage] = self.queue.pop(0) if more else None
            self.tile_full[slot.stage].arrive()
            slot.advance()
            yield None

    def publishing_alone(self):
        for step in self.publisher():
            if step is not None:
                yield step

    def storer(self, me):
        slot, tiles, consumer = Ring(SLOTS), 0, me
        publisher = self.publisher() if me == 1 and self.loaders == 2 else iter(())

        def publish():
            for step in publisher:
                if step is None:
                    return
                yield step

        yield from publish()
        yield from publish()
        while True:
            yield lambda: self.tile_full[slot.stage].passed(slot.phase)
            if self.tiles[slot.stage] is None:
                break
            yield from publish()
            while consumer < self.consumers:
                yield lambda: self.staged[tiles % 2][consumer].passed(tiles // 2 % 2)
                yield lambda: True
                assert self.in_use[self.buffer(consumer)] == consumer
                self.in_use[self.buffer(consumer)] = None
                self.buffer_free[consumer].arrive()
                consumer += 2
            self.tile_empty[slot.stage].arrive()
            slot.advance()
            consumer -= self.consumers
            tiles += 1

    def loader(self, me):
        slot, box, weight = Ring(SLOTS), Ring(BOXES), Ring(self.weight_stages)
        while True:
            yield lambda: self.tile_full[slot.stage].passed(slot.phase)
            tile = self.tiles[slot.stage]
            if tile is None:
                break
            for opens_box in tile:
                if opens_box and me == self.box_loader:
                    yield lambda: self.box_empty[box.stage].passed(box.phase ^ 1)
                    self.box_full[box.stage].arrive()
                    box.advance()
                if me < self.rings:
                    yield lambda: self.weight_empty[me][weight.stage].passed(weight.phase ^ 1)
                    self.weight_full[me][weight.stage].arrive()
                    weight.advance()
            self.tile_empty[slot.stage].arrive()
            slot.advance()

    def consumer(self, me):
        slot, box, weight, ring = Ring(SLOTS), Ring(BOXES), Ring(self.weight_stages), me if self.rings == 2 else 0
        staged = 0
        while True:
            yield lambda: self.tile_full[slot.stage].passed(slot.phase)
            tile = self.tiles[slot.stage]
            if tile is None:
                break
            if me == 1 and self.consumers == 2:
                yield lambda: self.second_may_begin
            done_weight = done_box = weight_stage = box_stage = None
            for taps, opens_box in enumerate(tile):
                before = box_stage    # the tap before is half carried out
                yield lambda: self.weight_full[ring][weight.stage].passed(weight.phase)
                weight_stage = weight.stage
                weight.advance()
                if opens_box:
                    yield lambda: self.box_full[box.stage].passed(box.phase)
                    box_stage = box.stage
                    box.advance()
                    done_box = before
                self.second_may_begin |= me == 0 and taps > 0 and (taps == self.lag or done_box is not None)
                yield lambda: True    # begin_tap: the tap before is done
                if done_weight is not None:
                    self.weight_empty[ring][done_weight].arrive()
                if done_box is not None:
                    self.box_empty[done_box].arrive()
                done_weight, done_box = weight_stage, None
            for barriers, stage in ((self.weight_empty[ring], done_weight), (self.box_empty, box_stage)):
                if stage is not None:
                    barriers[stage].arrive()
            self.second_may_begin |= me == 0
            one = self.buffers == 1
            releaser, release = me ^ one, staged if one and me == 1 else staged - 1
            yield lambda: self.buffer_free[releaser].passed(release & 1)
            staged += 1
            assert self.in_use[self.buffer(me)] is None
            self.in_use[self.buffer(me)] = me
            yield lambda: True
            self.staged[1 - staged % 2][me].arrive()
            self.tile_empty[slot.stage].arrive()
            slot.advance()


def waiting_for(passed):
    while not passed():
        yield passed


def run(block, order):
    carry_out([block.loader(0), block.loader(1) if block.loaders == 2 else block.publishing_alone(), block.storer(0), block.storer(1), *(block.consumer(me) for me in range(block.consumers))], order)


def carry_out(roles, order):
    waiting = {role: lambda: True for role in roles}
    speed = {role: 1.0 for role in waiting}
    while waiting:
        ready = [role for role, passed in waiting.items() if passed()]
        assert ready, "everybody waits"
        if order.random() < 0.01:
            speed = {role: order.random() ** 3 + 1e-3 for role in waiting}
        role = order.choices(ready, [speed[r] for r in ready])[0]
        try:
            waiting[role] = next(role)
        except StopIteration:
            del waiting[role]


@pytest.mark.parametrize("consumers, buffers", [(2, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("rings, keeps_weights, weight_stages", [*((2, False, stages) for stages in (3, 4, 8)), *((1, keeps, stages) for keeps in (False, True) for stages in (2, 6, 8, 16))])
def test_nobody_waits_forever(rings, keeps_weights, weight_stages, consumers, buffers):
    if consumers > 2 and rings > 1:
        pytest.skip("rings are of two consumers")
    order = random.Random(weight_stages * 2 + buffers)
    for _ in range(500):
        tiles = []
        for _ in range(order.randint(0, 7)):
            boxes, most = order.choice([0, 1, 1, 2, 3, 5, 9]), order.choice([1, 1, 2, 3, 4, 9])
            tiles.append([i == 0 for _ in range(boxes) for i in range(order.randint(1, most))])
        run(Block(tiles, consumers, rings, keeps_weights, weight_stages, buffers, 4 if rings == 2 else order.randint(1, max(1, weight_stages - 3))), order)


class Grid:
    """Blocks of which some take two tiles and then normalize, and of which so many run at a time."""

    def __init__(self, multiplying, normalizing, running, samples, tiles, groups, pieces):
        self.blocks, self.running = multiplying + normalizing, running
        self.tiles, self.groups, self.pieces = ([(n, i) for n in range(samples) for i in range(count)] for count in (tiles, groups, pieces))
        self.sizes = tiles, groups
        self.stored, self.ready, self.normalized = [0] * samples, [0] * samples, []
        self.ended = [0] * self.blocks           # warpgroups of a block
        self.most = [len(self.tiles) if block < multiplying else 2 for block in range(self.blocks)]
        self.tiles_left = [True] * self.blocks

    def begins(self, block):
        return lambda: sum(ended < 2 for ended in self.ended[:block]) < self.running

    def producers(self, me):
        yield self.begins(me)
        while self.most[me] > 0 and self.tiles:
            self.most[me] -= 1
            sample, _ = self.tiles.pop(0)
            yield lambda: True
            self.stored[sample] += 1
        self.tiles_left[me] = False
        while self.groups:
            sample, _ = self.groups.pop(0)
            yield lambda: self.stored[sample] == self.sizes[0]
            self.ready[sample] += 1
        self.ended[me] += 1

    def consumers(self, me):
        yield self.begins(me)
        yield lambda: not self.tiles_left[me]
        while self.pieces:
            sample, _ = piece = self.pieces.pop(0)
            yield lambda: self.ready[sample] == self.sizes[1]
            self.normalized.append(piece)
        self.ended[me] += 1


@pytest.mark.parametrize("running", [1, 2, 3, 5, 8])
def test_blocks_wait_only_for_those_that_run(running):
    order = random.Random(running)
    for _ in range(300):
        samples, tiles, groups, pieces = (order.randint(1, most) for most in (5, 7, 4, 6))
        grid = Grid(order.randint(1, 5), order.randint(1, 3), running, samples, tiles, groups, pieces)
        carry_out([role for block in range(grid.blocks) for role in (grid.producers(block), grid.consumers(block))], order)
        assert sorted(grid.normalized) == [(n, i) for n in range(samples) for i in range(pieces)]
