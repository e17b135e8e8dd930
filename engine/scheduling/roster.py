"""Which requests exist and where each one stands. Every change of status happens here.

Knows nothing of tokens, blocks or rows: whoever changes a status sees to what the request holds.
"""

from __future__ import annotations

from bisect import insort

from engine.scheduling.queue import WaitingQueue
from engine.scheduling.request import Family, Request, Status


class Roster:
    """Families by id, the queue of the waiting, the running ones in order.

    Of a new family only the first choice waits for its turn; the others are parked until its prompt is computed and
    then start from its blocks. Should it leave before that, the next choice takes its part.
    """

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}
        self.queue = WaitingQueue()
        self.running: list[Request] = []  # by Request.order: the most urgent and oldest first
        self.num_parked = 0

    @property
    def num_waiting(self) -> int:
        return len(self.queue) + self.num_parked

    def requests(self) -> list[Request]:
        """All that are not finished. Takes time with their number."""
        return [request for family in self.families.values() for request in family.choices.values()]

    def add(self, family: Family, now: float) -> None:
        """A new family, its choices parked."""
        self.families[family.request_id] = family
        self.num_parked += len(family.choices)
        self._unpark(next(iter(family.choices.values())), now)

    def start(self, request: Request) -> None:
        """The head of the queue runs."""
        self.queue.take(request)
        request.status = Status.RUNNING
        insort(self.running, request, key=lambda other: other.order)

    def requeue(self, request: Request, now: float) -> None:
        """A running request waits again."""
        self.running.remove(request)
        self._enqueue(request, now)

    def unpark_all(self, family: Family, now: float) -> None:
        """The prompt is computed: every choice may start."""
        for request in family.choices.values():
            if request.status is Status.PARKED:
                self._unpark(request, now)

    def leave(self, request: Request, now: float) -> Status:
        """The request is over, wherever it is. Returns where it was."""
        family, status = request.family, request.status
        request.status = Status.FINISHED
        del family.choices[request.choice]
        if status is Status.RUNNING:
            self.running.remove(request)
        elif status is Status.WAITING:
            self.queue.discard(request)
        else:
            self.num_parked -= 1
        if not family.choices:
            del self.families[family.request_id]
        elif all(other.status is Status.PARKED for other in family.choices.values()):
            self._unpark(next(iter(family.choices.values())), now)
        return status

    def _unpark(self, request: Request, now: float) -> None:
        self.num_parked -= 1
        self._enqueue(request, now)

    def _enqueue(self, request: Request, now: float) -> None:
        request.status = Status.WAITING
        request.waiting_since_s = now
        self.queue.push(request)
