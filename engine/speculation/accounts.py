"""What drafters cost and what they brought, in seconds, so that trying them out never takes more than a small share.

Knows names and seconds; no request, no draft, no model. Every second that a drafter takes beyond plain steps is drawn
from its account: learning texts, guessing, thinking about guesses, checking them. What accepted tokens would have taken
without it is paid in, and so is SHARE of the time that passes. Who has nothing left is not asked. So over any stretch
of T seconds the engine loses at most SHARE * T, MOST plain steps, and what two steps overdrew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

SHARE = 0.01  # of the engine's time that may be lost to drafters that bring nothing, all of them together
FIRST = 24.0  # plain steps that a new drafter may lose: first calls are slow
MOST = 24.0  # plain steps that may be put by, however much was gained before
DEBT = 6.0  # plain steps: what was overdrawn beyond is let go, as first calls are slow; a price that lasts is saved for
REOPENS = 1.0  # plain steps that must have been put by after an account was empty: a try is several guesses
MAX_STALL = 2.0  # times what something is known to take, from which on it may have been the machine
_RATE = 0.25  # of a new time in an average
_TOKEN_S = 3e-6  # to learn a token, before it was measured
_MANY = 16  # tokens to learn per guess from which on a time tells what learning takes, not what guessing takes


@dataclass(slots=True)
class Stalls:
    """Times of one kind. What is far longer than it should be is the machine's, unless the next is as well."""

    held: float = 0.0

    def charge(self, seconds: float, most: float) -> float:
        """What of a time counts."""
        if seconds <= most:
            self.held = 0.0
            return seconds
        before, self.held = self.held, seconds - most
        return most + before


@dataclass(slots=True)
class Account:
    """Of one drafter. Seconds."""

    balance: float = 0.0
    is_open: bool = False
    is_funded: bool = False  # whether it has got what new drafters get
    num_users: int = 0  # running requests
    guess_s: float = 0.0  # average of a guess for one request
    token_s: float = _TOKEN_S  # average of learning a token
    left: float = 0.0  # what may still be spent on guesses for the step at hand
    num_asked: int = 0  # requests in that step
    refused: float = 0.0  # price of the cheapest guess that was too dear in it
    wanted: float = 0.0  # what is saved up for, where all was too dear
    guessing: Stalls = field(default_factory=Stalls)
    reopens: float = 0.0  # balance at which a closed account opens again

    def draw(self, seconds: float) -> None:
        self.balance -= seconds
        if self.balance <= 0.0:
            self.is_open = False


class Accounts:
    """Of all drafters. One thread calls everything."""

    def __init__(self) -> None:
        self._of: dict[str, Account] = {}
        self._used: list[Account] = []  # of the drafters that running requests use
        self._plain_s = self._most = 0.0
        self._thinking = Stalls()

    def begin(self, names: Collection[str]) -> None:
        """A request begins that uses these drafters."""
        for name in names:
            account = self._of.setdefault(name, Account())
            account.num_users += 1
            if account.num_users == 1:
                self._used.append(account)

    def end(self, names: Collection[str]) -> None:
        for name in names:
            account = self._of[name]
            account.num_users -= 1
            if account.num_users == 0:
                self._used.remove(account)

    def pass_time(self, seconds: float, plain_s: float) -> None:
        """The engine has run for so long. plain_s: of a plain step, as the load is now."""
        self._plain_s, self._most = plain_s, MOST * plain_s
        for account in self._used:
            account.balance = max(account.balance, -DEBT * plain_s) + SHARE * seconds / len(self._used)
            if not account.is_funded:
                account.is_funded = account.is_open = True
                account.balance += FIRST * plain_s
            account.balance = min(account.balance, self._most)
            account.reopens = min(self._most, max(REOPENS * plain_s, account.guess_s, account.wanted))
            if account.balance >= account.reopens:
                account.is_open = True

    @property
    def are_closed(self) -> bool:
        """Whether no drafter in use may be asked."""
        return not any(account.is_open for account in self._used)

    def seconds_closed(self) -> float:
        """For how much longer nobody may be asked."""
        if not self._used or not self.are_closed:
            return 0.0
        each = SHARE / len(self._used)
        return min([(account.reopens - account.balance) / each for account in self._used])

    def is_open(self, name: str) -> bool:
        account = self._of.get(name)
        return account is not None and account.is_open

    def begin_step(self) -> None:
        """Guesses for another step are about to be asked for."""
        for account in self._used:
            account.left, account.num_asked, account.refused = account.balance, 0, 0.0

    def end_step(self) -> None:
        """All guesses for the step were asked for. Who could afford none saves up for one, in peace."""
        for account in self._used:
            account.wanted = account.refused if account.num_asked == 0 else 0.0
            if account.wanted > 0.0:
                account.is_open = False
                account.reopens = min(self._most, max(account.reopens, account.wanted))

    def affords(self, name: str, num_unread: int) -> bool:
        """Whether a drafter may guess for one more request, of which it has yet to learn so many tokens. A text that
        takes more than can be put by is learnt when the account is full.
        """
        account = self._of.get(name)
        if account is None or not account.is_open or account.left <= 0.0:
            return False
        price = account.guess_s + num_unread * account.token_s
        if price > account.left and account.left < self._most:
            account.refused = min(account.refused or price, price)
            return False
        account.left -= price
        account.num_asked += 1
        return True

    def guessed(self, name: str, seconds: float, num_requests: int, num_learnt: int) -> None:
        """A drafter has guessed for so many requests, and learnt so many tokens for it."""
        account = self._of[name]
        expected = num_requests * account.guess_s + num_learnt * account.token_s
        seconds = account.guessing.charge(seconds, MAX_STALL * (expected + self._plain_s))
        account.draw(seconds)
        if num_requests == 0:
            return
        if num_learnt > _MANY * num_requests:
            rest = max(0.0, seconds - num_requests * account.guess_s)
            account.token_s += _RATE * (rest / num_learnt - account.token_s)
        else:
            account.guess_s += _RATE * (seconds / num_requests - account.guess_s)

    def thought(self, shares: Mapping[str, int], seconds: float) -> None:
        """What all else took that goes with guessing, shared as by `draw`."""
        self.draw(shares, self._thinking.charge(seconds, MAX_STALL * self._plain_s))

    def draw(self, shares: Mapping[str, int], seconds: float) -> None:
        """Seconds that several have caused, in these proportions; all who are in use where it was nobody's fault."""
        total = sum(shares.values())
        if total == 0:
            for account in self._used:
                account.draw(seconds / len(self._used))
        for name, share in shares.items():
            if name in self._of and total > 0:
                self._of[name].draw(seconds * share / total)

    def pay_in(self, tokens: Counter[str], seconds: float) -> None:
        """Each accepted token of a drafter would have taken so long without it."""
        for name, count in tokens.items():
            account = self._of.get(name)
            if account is not None:
                account.balance = min(account.balance + count * seconds, self._most)
                account.is_open = account.is_open or account.balance > account.wanted
