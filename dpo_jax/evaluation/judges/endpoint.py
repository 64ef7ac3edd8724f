"""A judge behind OpenAI's chat API, of any server: asked of many contests at a time, and of nothing twice.

Every call that ends is a row of a ledger before its verdict counts, under a digest of what was asked. So a run that is
killed loses the calls that were in flight and nothing else, and a verdict counts once however often it was paid for.
"""

import functools
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import anyio
import httpx2
from anyio.from_thread import start_blocking_portal

from dpo_jax.errors import UserError, printable, redacted
from dpo_jax.evaluation.judges.asking import Template
from dpo_jax.evaluation.judges.replies import content_of, end_of, tokens_of
from dpo_jax.evaluation.judges.settings import JudgeSettings, named
from dpo_jax.evaluation.judging import UNJUDGED, Contest, Verdict
from dpo_jax.evaluation.ledger import Ledger
from dpo_jax.files import digest_of

AGAIN = frozenset({408, 409, 425, 429, *range(500, 600)})
"""Answers of a server that may be others later."""
LONGEST_PAUSE, LONGEST_WAIT = 60.0, 900.0
"""Seconds between attempts; seconds that a server may ask us to wait."""
LARGEST = 4 << 20
"""Bytes of an answer that are read."""
TRIES = 3
"""How often a judge is asked that says nothing that can be understood."""


class ServerFault(UserError):
    """A server cannot be reached, or refuses; what it said before is kept."""


class _Question(NamedTuple):
    """One order of a contest, as it is asked; `key` is a digest of it and of where it goes."""

    key: str
    body: dict[str, Any]


class _Failure(NamedTuple):
    """A call that may be made again: why it ended, and how many seconds the server asks to wait, if it says so."""

    status: str
    why: str
    wait: float | None = None


class EndpointJudge:
    """A server's model as a judge."""

    def __init__(
        self,
        settings: JudgeSettings,
        template: Template,
        ledger: Ledger,
        *,
        key: str | None = None,
        pause: float = 1.0,
    ):
        """Nothing is sent yet.

        Args:
          settings: of a judge that is a server.
          template: what it is asked.
          ledger: what it said before, and what it will say.
          key: sent as a bearer token, and never written or printed.
          pause: seconds before the second attempt; each is twice the one before, times something random.
        """
        self.name = redacted(settings.name)
        self._settings, self._template, self._ledger, self._key, self._pause = settings, template, ledger, key, pause
        self._url = named(settings.name).where
        self._random = random.Random(0)
        self._ends: dict[str, float] = {}
        self._reasons: dict[str, str] = {}
        self._tries: dict[str, int] = {}
        self._calls = self._tokens = 0
        self._flying = 0
        self._fault: Exception | None = None
        self._not_before = 0.0
        for row in ledger.rows:
            self._count(row)

    def compare(self, contests: Sequence[Contest]) -> list[Verdict]:
        """A verdict for each contest; UNJUDGED where the server was asked TRIES times and was not understood.

        Raises:
          ServerFault: the server fails again and again, or refuses, or the budget is used up. All that was said is
            kept, and the next call goes on from there.
        """
        pairs = [(self._question(contest, False), self._question(contest, True)) for contest in contests]
        missing = {question.key: question for pair in pairs for question in pair if not self._settled(question.key)}
        if missing:
            self._fault = None
            with start_blocking_portal() as portal:  # an interrupt cancels all that is in flight
                portal.call(self._settle_all, iter(missing.values()))
            if isinstance(self._fault, OSError):
                raise self._fault
            if self._fault is not None:
                left = sum(not self._settled(key) for key in missing)
                raise ServerFault(f"{self._fault}; {left:,} verdicts are missing, and the others are kept")
        return [self._verdict(shown.key, swapped.key) for shown, swapped in pairs]

    def reach(self) -> None:
        """Ask the server for its models, to learn early that it is there and takes the key.

        Raises:
          ServerFault: it is not, or does not.
        """

        async def look() -> None:
            async with self._client() as client:
                failure = await self._attempt(lambda: self._answer(client, "GET", "/models", None))
                if isinstance(failure, _Failure) and failure.status in ("connection", "timeout"):
                    raise ServerFault(f"{self.name}: {failure.why}; start the server, or correct the address")

        with start_blocking_portal() as portal:
            portal.call(look)

    @property
    def spent(self) -> dict[str, int]:
        """Calls that ended, tokens by the server's count, and orders that were not understood."""
        unread = sum(tries >= TRIES for key, tries in self._tries.items() if key not in self._ends)
        return {"calls": self._calls, "tokens": self._tokens, "no_verdict": unread}

    # ------------------------------------------------------------------------------------------ what is known

    def _question(self, contest: Contest, swapped: bool) -> _Question:
        text = self._template.question(contest, swapped=swapped, reply="json")
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 1024,
        } | self._settings.body
        body = {name: value for name, value in body.items() if value is not None}
        return _Question(digest_of(f"{self._url}\n{_json(body)}"), body)

    def _settled(self, key: str) -> bool:
        return key in self._ends or self._tries.get(key, 0) >= TRIES

    def _verdict(self, shown: str, swapped: str) -> Verdict:
        ends = (self._ends.get(shown, UNJUDGED), 1 - self._ends.get(swapped, UNJUDGED))
        said = [self._reasons[key] for key in (shown, swapped) if self._reasons.get(key)]
        return Verdict(*ends, " | ".join(said))

    def _count(self, row: Mapping[str, Any]) -> None:
        """What a row of the ledger says."""
        self._calls += 1
        self._tokens += row.get("tokens") or 0
        said, key = row.get("said"), row["key"]
        if said is None or key in self._ends:
            return
        end = end_of(said)
        if end is None:
            self._tries[key] = self._tries.get(key, 0) + 1
        else:
            self._ends[key], self._reasons[key] = end, said[:500]

    # ------------------------------------------------------------------------------------------ calls

    async def _settle_all(self, questions: Iterator[_Question]) -> None:
        async with self._client() as client, anyio.create_task_group() as group:
            for _ in range(self._settings.calls_at_once):
                group.start_soon(self._work, client, questions)

    async def _work(self, client: httpx2.AsyncClient, questions: Iterator[_Question]) -> None:
        """Ask one question after the other. After a fault, what is in flight ends, and nothing new is asked."""
        for question in questions:
            while self._fault is None and not self._settled(question.key):
                try:
                    await self._ask(client, question)
                except (UserError, OSError) as fault:  # the second is of the ledger
                    self._fault = self._fault or fault
            if self._fault is not None:
                return

    async def _ask(self, client: httpx2.AsyncClient, question: _Question) -> None:
        """One reply, after as many attempts as it takes."""
        send = functools.partial(self._answer, client, "POST", "/chat/completions", question.body)
        for attempt in range(self._settings.attempts):
            await anyio.sleep(max(0.0, self._not_before - anyio.current_time()))
            if self._fault is not None:
                return
            self._check_budget()
            self._flying += 1
            try:
                reply = await self._attempt(send)
                failure = reply if isinstance(reply, _Failure) else self._said(question, reply)
            finally:
                self._flying -= 1
            if failure is None:
                return
            self._keep({"key": question.key, "status": failure.status})
            if (failure.wait or 0) > LONGEST_WAIT:
                raise ServerFault(f"{self.name}: asks to wait {failure.wait:,.0f} s; run the same command then")
            if attempt + 1 == self._settings.attempts:
                raise ServerFault(f"{self.name}: failed {attempt + 1} times, the last time: {failure.why}")
            pause = min(self._pause * 2**attempt, LONGEST_PAUSE) * (0.5 + self._random.random())
            if failure.wait is None:
                await anyio.sleep(pause)
            else:  # of all calls, not of this one alone
                self._not_before = max(self._not_before, anyio.current_time() + failure.wait)

    def _said(self, question: _Question, reply: object) -> _Failure | None:
        """Keep what a reply says; a failure if it is none."""
        said, tokens = content_of(reply), tokens_of(reply)
        if said is None:
            return _Failure("no reply", "what it sent is no chat completion")
        if self._settings.token_budget is not None and tokens is None:
            raise ServerFault(f"{self.name}: does not say how many tokens a call took; give call_budget instead")
        self._keep({"key": question.key, "status": "200", "said": self._hidden(said[:20_000]), "tokens": tokens})
        return None

    def _keep(self, row: dict[str, Any]) -> None:
        self._ledger.add(row)
        self._count(row)

    def _check_budget(self) -> None:
        calls, tokens = self._settings.call_budget, self._settings.token_budget
        if calls is not None and self._calls + self._flying >= calls:
            raise ServerFault(f"{self.name}: the budget of {calls:,} calls is used up; raise call_budget to go on")
        if tokens is not None and self._tokens >= tokens:
            raise ServerFault(f"{self.name}: the budget of {tokens:,} tokens is used up; raise token_budget to go on")

    async def _attempt(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """What `send` gives, or why it gave nothing."""
        try:
            with anyio.fail_after(self._settings.timeout):
                return await send()
        except (TimeoutError, httpx2.TimeoutException):
            return _Failure("timeout", f"no answer within {self._settings.timeout:g} s")
        except httpx2.ConnectError as error:
            return _Failure("connection", f"nothing answers there ({self._hidden(str(error))})")
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            return _Failure("transport", self._hidden(f"{type(error).__name__} {error}"))

    async def _answer(self, client: httpx2.AsyncClient, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON that the server answers with, or a failure that may pass."""
        content = None if body is None else _json(body).encode()
        async with client.stream(method, self._url + path, content=content) as response:
            data = await _read(response)
            status = response.status_code
            if status in AGAIN:
                why = f"status {status} {self._message(data)}"
                return _Failure(str(status), why, waiting(response.headers.get("retry-after"), datetime.now(UTC)))
            if status == 200:
                return self._parsed(data)
            if method == "POST" or status in (401, 403):  # not every server lists its models
                raise ServerFault(f"{self.name}: status {status} {self._message(data)}; {self._remedy(status)}")
            return None

    def _parsed(self, data: bytes) -> Any:
        try:
            return httpx2.Response(200, content=data).json()
        except (ValueError, RecursionError):
            return _Failure("no JSON", "what it sent is no JSON, or was cut off")

    def _remedy(self, status: int) -> str:
        """What to do about an answer that will be the same next time."""
        variable = self._settings.key_variable
        if status in (401, 403):
            return f"look at {variable}" if variable else "name the variable that holds a key by key_variable"
        if status == 404:
            return "the address ends in /v1 with most servers, or there is no such model"
        return "give the address that it leads to" if 300 <= status < 400 else "change what is sent by body"

    def _message(self, data: bytes) -> str:
        return self._hidden(" ".join(data[:1000].decode("utf-8", "replace").split())[:300])

    def _hidden(self, text: str) -> str:
        """A server's text without secrets, and without the key should it send that back."""
        if self._key:
            text = text.replace(self._key, "***")
        return printable(redacted(text))

    def _client(self) -> httpx2.AsyncClient:
        headers = {"content-type": "application/json", "accept": "application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        most = httpx2.Limits(max_connections=self._settings.calls_at_once)
        return httpx2.AsyncClient(headers=headers, timeout=self._settings.timeout, limits=most)


async def _read(response: httpx2.Response) -> bytes:
    data = bytearray()
    async for part in response.aiter_bytes():
        data += part
        if len(data) > LARGEST:
            break
    return bytes(data)


def waiting(header: str | None, now: datetime) -> float | None:
    """Seconds that a `Retry-After` asks for, as a number or a date; None where it says nothing that is one.

    >>> waiting("2", datetime(2026, 1, 1, tzinfo=UTC)), waiting("soon", datetime(2026, 1, 1, tzinfo=UTC))
    (2.0, None)
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - now).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), 1e9) if seconds == seconds else None


def _json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True)
