"""Random operations over a pool and the lender of its slots, beside the obvious version of both.

The pool's memory is a list of pages, each marked with the slot whose bytes it holds. Consumers
read marks whenever they like, leased or not; what must never happen is that a read of anything but
the slot's own marks is called valid.
"""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.transfer_model import (
    LEASE_S,
    PAGE,
    PAGES,
    QUARANTINE_S,
    REQUESTS,
    SESSIONS,
    START,
    WAIT_S,
    Claim,
    Clock,
    Counts,
    Lent,
    Waiting,
    pick,
)
from triptych import wire
from triptych.errors import BadMedia, Cancelled
from triptych.refs import EmbeddingRef
from triptych.states import SlotState
from triptych.transfer.pool import BYPASS, Extent, Pool
from triptych.transfer.session import Lender

NUMBER = st.integers(0, 1 << 16)
SIZE = st.integers(1, 7)
GROUP = st.lists(st.integers(1, 3), min_size=2, max_size=3)


class Machine(RuleBasedStateMachine):
    counts = Counts()

    def __init__(self) -> None:
        super().__init__()
        self.loop = Clock()
        self.pool = Pool(START, PAGES * PAGE)
        self.lender = Lender("http://here:1", "nonce", LEASE_S)
        self.marks = [0] * PAGES
        self.owner: list[Extent | None] = [None] * PAGES
        self.quarantined: list[tuple[float, Extent]] = []
        self.lent: dict[int, Lent] = {}
        self.old: list[EmbeddingRef] = []
        self.claims: dict[tuple[str, int], Claim] = {}
        self.sessions = [f"s{index}" for index in range(SESSIONS)]
        self.numbers = SESSIONS
        self.router = "router"
        self.waiting: list[Waiting] = []

    # ------------------------------------------------------------------ memory

    def pages(self, extent: Extent) -> range:
        first = (extent.offset - START) // PAGE
        return range(first, first + extent.nbytes // PAGE)

    def granted(self, extent: Extent, request: str) -> None:
        """The pool gave memory: nobody else may have it. It becomes a slot."""
        for page in self.pages(extent):
            assert self.owner[page] is None, "one page in two hands"
            self.owner[page] = extent
        shape = (1, 1, extent.nbytes)
        ref = self.lender.lend_embedding(
            extent.nbytes, "key", "uint8", shape, (self.router, request), self.loop.now
        )
        assert ref.slot not in self.lent
        self.lent[ref.slot] = Lent(ref, extent)

    def settle(self, taken: list[Extent] | None = None, request: str = "") -> None:
        """After every operation: grants in their order, messages, idle slots."""
        self.counts.operations += 1
        self.loop.turn()
        grants: list[tuple[list[Extent], str, Waiting | None]] = []
        if taken:
            grants.append((taken, request, None))
        ended = [waiting for waiting in self.waiting if waiting.task.done()]
        for waiting in ended:
            if not waiting.task.cancelled() and waiting.task.exception() is None:
                extents = waiting.task.result()
                assert [extent.nbytes for extent in extents] == waiting.sizes, "half a group"
                grants.append((extents, waiting.request, waiting))
        for extents, who, served in sorted(grants, key=lambda grant: grant[0][0].generation):
            for ahead in self.waiting[: self.waiting.index(served) if served else None]:
                if ahead not in ended:  # who left may have left before
                    ahead.passed += 1
                    self.counts.passed += 1
                    assert ahead.passed <= BYPASS, "somebody waits for ever"
            self.counts.groups += len(extents) > 1
            for extent in extents:
                self.granted(extent, who)
        self.waiting = [waiting for waiting in self.waiting if waiting not in ended]
        self.deliver()

    def deliver(self) -> None:
        outbox, self.lender.outbox = self.lender.outbox, []
        for session, message in outbox:
            claim = self.claims.get((session, message.claim))  # type: ignore[attr-defined]
            match message:
                case wire.Ready():
                    assert claim is not None
                    assert not claim.ready and self.lent[claim.slot].filled
                    claim.ready = True
                case wire.Denied():
                    self.counts.denied += 1
                    self.claims.pop((session, message.claim), None)
                case wire.Expired():
                    self.counts.expired += 1
                    self.claims.pop((session, message.claim), None)
                case wire.Valid():
                    assert claim is not None and claim.marks is not None
                    assert set(claim.marks) == {claim.slot}, "another generation was accepted"
                    self.counts.valid += 1

    # ------------------------------------------------------------------ the producer's owner

    @rule(size=SIZE, request=NUMBER)
    def lend(self, size: int, request: int) -> None:
        extent = self.pool.try_allocate(size * PAGE - 1)
        self.settle([] if extent is None else [extent], f"r{request % REQUESTS}")

    @rule(size=SIZE, request=NUMBER)
    def lend_or_wait(self, size: int, request: int) -> None:
        self.take([size], f"r{request % REQUESTS}")

    @rule(sizes=GROUP, request=NUMBER)
    def lend_many_or_wait(self, sizes: list[int], request: int) -> None:
        self.take(sizes, f"r{request % REQUESTS}")

    def take(self, pages: list[int], request: str) -> None:
        sizes = [size * PAGE for size in pages]
        free = self.pool.free_nbytes
        task = self.loop.create_task(self.pool.allocate_all(sizes, WAIT_S))
        self.loop.turn()
        if task.done():
            self.settle(task.result(), request)
        else:
            self.counts.waited += 1
            assert self.pool.free_nbytes == free, "somebody holds a part while he waits"
            self.waiting.append(Waiting(task, request, sizes))
            self.settle()

    @rule(number=NUMBER)
    def many_small_ones(self, number: int) -> None:
        """As long as somebody waits: each of these may pass, but not for ever."""
        for _ in range(BYPASS + 2):
            if not self.waiting or (extent := self.pool.try_allocate(PAGE)) is None:
                break
            self.settle([extent], "small")
            self.lender.cancel("small", Cancelled("gone"))
            self.take_back(quarantine=False)
        self.settle()

    @rule(number=NUMBER)
    def lend_to_who_has_gone(self, number: int) -> None:
        if (slot := pick(list(self.lent), number)) is not None:
            self.lender.session_lost("late")
            before = self.lender.n_leases
            self.lender.lend_again(slot, ("late", "r0"), self.loop.now)
            assert self.lender.n_leases == before + 1
            self.lender.expire(self.loop.now)
            assert self.lender.n_leases <= before
        self.settle()

    @rule(number=NUMBER)
    def give_up_waiting(self, number: int) -> None:
        if (waiting := pick(self.waiting, number)) is not None:
            waiting.task.cancel()
        self.settle()

    @rule(number=NUMBER, request=NUMBER)
    def lend_again(self, number: int, request: int) -> None:
        if (slot := pick(list(self.lent), number)) is not None:
            holder = (self.router, f"r{request % REQUESTS}")
            assert self.lender.lend_again(slot, holder, self.loop.now) == self.lent[slot].ref
        self.settle()

    @rule(number=NUMBER)
    def fill(self, number: int) -> None:
        filling = [s for s in self.lent if self.lender.state(s) is SlotState.FILLING]
        if (slot := pick(filling, number)) is not None:
            lent = self.lent[slot]
            for page in self.pages(lent.extent):
                self.marks[page] = slot
            lent.filled = True
            piece = wire.Piece(lent.extent.offset, lent.extent.nbytes)
            self.lender.ready(slot, [piece], last=True, note=b"")
        self.settle()

    @rule(number=NUMBER)
    def fail(self, number: int) -> None:
        filling = [s for s in self.lent if self.lender.state(s) is SlotState.FILLING]
        if (slot := pick(filling, number)) is not None:
            self.lender.fail(slot, BadMedia("broken"))
        self.settle()

    @rule(quarantine=st.booleans())
    def take_back(self, quarantine: bool) -> None:
        """Slots without leases: their memory is free, or kept away from for a while."""
        self.lender.idle.clear()
        for slot in [slot for slot in self.lent if self.lender.leases(slot) == 0]:
            self.lender.close_slot(slot)
            lent = self.lent.pop(slot)
            self.old.append(lent.ref)
            if quarantine:
                self.loop.call_soon(self.pool.quarantine, lent.extent, QUARANTINE_S)
                self.quarantined.append((self.loop.now + QUARANTINE_S, lent.extent))
                self.loop.turn()
            else:
                self.let_go(lent.extent)
            self.pool.free(lent.extent)  # once more, or too early: no harm
        self.settle()

    def let_go(self, extent: Extent) -> None:
        for page in self.pages(extent):
            assert self.owner[page] == extent
            self.owner[page] = None
        self.pool.free(extent)

    # ------------------------------------------------------------------ consumers

    def ask(self, ref: EmbeddingRef, request: str, session: int) -> None:
        self.numbers += 1
        name = self.sessions[session % SESSIONS]
        self.claims[name, self.numbers] = Claim(name, self.numbers, ref.slot, request)
        self.lender.claim(name, wire.Claim(self.numbers, ref, request), self.loop.now)

    @rule(number=NUMBER, session=NUMBER)
    def claim(self, number: int, session: int) -> None:
        """As the router tells consumers to: what their request has a lease on."""
        leases = [
            (lent.ref, lease.request_id)
            for slot, lent in self.lent.items()
            for lease in self.lender._slots[slot].leases
            if lease.claim is None
        ]
        if (lease := pick(sorted(leases, key=str), number)) is not None:
            self.ask(*lease, session)
        self.settle()

    @rule(number=NUMBER, request=NUMBER, session=NUMBER)
    def claim_anything(self, number: int, request: int, session: int) -> None:
        refs = [*self.old, *(lent.ref for lent in self.lent.values())]
        if (ref := pick(refs, number)) is not None:
            self.ask(ref, f"r{request % REQUESTS}", session)
            if ref in self.old:
                assert isinstance(self.lender.outbox[-1][1], wire.Denied)
        self.settle()

    @rule(number=NUMBER, session=NUMBER)
    def claim_what_is_not_ours(self, number: int, session: int) -> None:
        if (lent := pick(list(self.lent.values()), number)) is not None:
            change: dict[str, object] = [
                {"nonce": "other"},
                {"generation": lent.ref.generation + 1},
                {"slot": 1 << 40},
                {"nbytes": lent.ref.nbytes + PAGE},
            ][number % 4]
            self.numbers += 1
            message = wire.Claim(self.numbers, msgspec.structs.replace(lent.ref, **change), "r0")
            self.lender.claim(self.sessions[session % SESSIONS], message, self.loop.now)
            assert isinstance(self.lender.outbox[-1][1], wire.Denied)
        self.settle()

    @rule(number=NUMBER)
    def read(self, number: int) -> None:
        """One-sided: nobody asks whether there is still a lease."""
        ready = [claim for claim in self.claims.values() if claim.ready]
        if (claim := pick(ready, number)) is not None:
            claim.marks = [self.marks[page] for page in self.pages(self.lent[claim.slot].extent)]
        self.settle()

    @rule(number=NUMBER, size=SIZE)
    def read_what_another_tenant_wrote(self, number: int, size: int) -> None:
        """The lease is lost, the memory given away and written, and only then read."""
        ready = [claim for claim in self.claims.values() if claim.ready]
        if (claim := pick(ready, number)) is None:
            return self.settle()
        extent = self.lent[claim.slot].extent
        for waiting in self.waiting:  # or the memory would be theirs
            waiting.task.cancel()
        self.settle()
        self.lender.cancel(claim.request, Cancelled("gone"))
        self.take_back(quarantine=False)
        self.lend(size, number)
        for newest in range(len(self.lent)):
            self.fill(newest)
        claim.marks = [self.marks[page] for page in self.pages(extent)]
        self.counts.stale_reads += set(claim.marks) != {claim.slot}
        self.claims[claim.session, claim.number] = claim
        self.lender.validate(claim.session, wire.Validate(claim.number, 0, 1))
        assert isinstance(self.lender.outbox[-1][1], wire.Expired)
        self.settle()

    @rule(number=NUMBER)
    def read_and_validate(self, number: int) -> None:
        self.read(number)
        self.validate(number)

    @rule(number=NUMBER, size=SIZE)
    def everything_in_order(self, number: int, size: int) -> None:
        self.lend(size, number)
        self.claim(number, number)
        self.fill(number)
        self.read_and_validate(number)

    @rule(number=NUMBER)
    def validate(self, number: int) -> None:
        """Of what was read some time ago."""
        read = [claim for claim in self.claims.values() if claim.marks is not None]
        if (claim := pick(read, number)) is not None:
            self.lender.validate(claim.session, wire.Validate(claim.number, 0, 1))
        self.settle()

    @rule(number=NUMBER)
    def release(self, number: int) -> None:
        if (claim := pick(list(self.claims.values()), number)) is not None:
            self.lender.release(claim.session, wire.Release(claim.number))
            self.lender.release(claim.session, wire.Release(claim.number))
            del self.claims[claim.session, claim.number]
        self.settle()

    # ------------------------------------------------------------------ ends

    @rule(request=NUMBER)
    def cancel(self, request: int) -> None:
        self.lender.cancel(f"r{request % (4 * REQUESTS)}", Cancelled("gone"))
        self.settle()

    @rule(session=NUMBER)
    def lose(self, session: int) -> None:
        index = session % (4 * SESSIONS)
        if index > SESSIONS:
            return self.settle()  # not that often: something is to happen in between
        lost = self.router if index == SESSIONS else self.sessions[index]
        self.lender.session_lost(lost)
        self.claims = {key: claim for key, claim in self.claims.items() if key[0] != lost}
        self.numbers += 1
        if index == SESSIONS:
            self.router = f"router{self.numbers}"
        else:
            self.sessions[index] = f"s{self.numbers}"
        self.settle()

    @rule(seconds=st.sampled_from([1.0, 5.0, 40.0, 61.0]), silent=NUMBER)
    def time_passes(self, seconds: float, silent: int) -> None:
        """All but one of the sessions were heard of meanwhile."""
        self.loop.now += seconds
        for end, extent in [q for q in self.quarantined if q[0] <= self.loop.now]:
            self.quarantined.remove((end, extent))
            for page in self.pages(extent):
                self.owner[page] = None
        everybody = [*self.sessions, self.router]
        for index, session in enumerate(everybody):
            if index != silent % len(everybody):
                self.lender.heard(session, self.loop.now)
        self.lender.expire(self.loop.now)
        self.settle()

    # ------------------------------------------------------------------ always

    @invariant()
    def the_books_agree(self) -> None:
        assert set(self.lender._claims) == set(self.claims)
        assert self.pool.free_nbytes == self.owner.count(None) * PAGE
        quarantined = sum(extent.nbytes for _, extent in self.quarantined)
        assert self.pool.quarantined_nbytes == quarantined
        assert self.lender.n_leases == sum(map(self.lender.leases, self.lent))

    def teardown(self) -> None:
        """Everybody leaves: nothing may be left behind."""
        for waiting in self.waiting:
            waiting.task.cancel()
        self.settle()
        for session in [*self.sessions, self.router]:
            self.lender.session_lost(session)
        self.claims.clear()
        self.loop.now += LEASE_S + 1
        self.lender.expire(self.loop.now)
        assert self.lender.n_leases == 0
        assert not self.lender._claims and not self.lender._by_holder
        assert not self.lender._by_request and not self.lender._heard
        self.take_back(quarantine=False)
        self.time_passes(QUARANTINE_S, 0)
        assert self.pool.free_nbytes == self.pool.nbytes
        assert self.pool.try_allocate(PAGES * PAGE) is not None
        self.loop.close()
