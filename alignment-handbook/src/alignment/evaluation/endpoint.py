"""Sends many requests to an OpenAI-compatible endpoint: no reply is paid for twice, and no failure loses one.

Replies are saved as they come (`alignment.resumable`), each under a hash of its request. A request that fails for a
while is sent again; one that a budget or a dead server prevents is sent by the next run.
"""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from alignment.errors import UserError
from alignment.resumable import Entry, PartFile, content_hash

#: Seconds before a request is sent again: the first wait, which doubles, and the longest.
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
#: After this many requests in a row that fail for good, no more are sent.
_MAX_FAILURES = 3
#: Statuses after which a request is sent again, besides 500 and above; and those after which none is sent any more.
_RETRYABLE, _FATAL = (408, 409, 425, 429), (401, 403, 404, 405)
#: Settings of a request that some endpoints refuse, and the flag that leaves them out.
_REFUSED = {
    "max_tokens": "--max_completion_tokens",
    "temperature": "--judge_temperature none",
    "logprobs": "--no_logprobs",
}


@dataclass(frozen=True)
class EndpointConfig:
    """Address and budget of the judge.

    Attributes:
        base_url: As for OpenAI's clients, such as http://localhost:8000/v1.
        model: Name of the model there.
        api_key_env: Environment variable with the key; where it is not set, none is sent.
        max_calls: Most requests of this run, retries included. None: no bound.
        max_cost: Tokens of prompts and replies in this run after which no request is sent; those under way are still
            received. None: no bound.
        threads: Concurrent requests.
        max_retries: Retries of a request.
        timeout: Seconds to wait for a reply.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    max_calls: int | None = None
    max_cost: int | None = None
    threads: int = 4
    max_retries: int = 8
    timeout: float = 120.0

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.netloc:
            raise UserError(f"--base_url: {self.base_url!r} is no URL; write http://host:port/v1")
        if "@" in url.netloc:
            raise UserError(f"--base_url: a password in it would be written to logs; set {self.api_key_env}")
        for name, minimum in (("max_calls", 0), ("max_cost", 0), ("threads", 1), ("max_retries", 0), ("timeout", 0.1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"--{name}: must be at least {minimum}, got {value}")

    def key(self) -> str | None:
        """The API key; None where there is none.

        Raises:
            UserError: It cannot be sent. (http.client's own error would print it.)
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.api_key_env}: holds characters that no key has; set it anew")
        return key or None


class _Retryable(Exception):
    """A failure after which the request is sent again.

    Attributes:
        wait: Seconds that the server asks to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Rejected(Exception):
    """The server will not answer this request, however often it is sent."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Turns redirects into errors: one would carry the key to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """Sends requests and saves the replies.

    Args:
        config: Address and budget.
        cache: The replies so far, as entries `key`, `text`, `top_logprobs`, `tokens`, `tstamp`.

    Attributes:
        calls: Requests that this run has sent.
        cost: Tokens of the replies to them.
        stopped: Why this run sends no more requests; None while it does.
        failure: Why the last failed request failed; None without one.
    """

    def __init__(self, config: EndpointConfig, cache: PartFile):
        self.config = config
        self.calls = self.cost = 0
        self.stopped: str | None = None
        self.failure: str | None = None
        self._cache = cache
        self._replies = {entry["key"]: entry for entry in cache.entries}
        self._key = config.key()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._consecutive_failures = 0
        self._last_failure = ""  # the last failure, also one that passed
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def ask(self, requests: list[Entry], desc: str) -> list[Entry | None]:
        """Replies to requests; those that are in the cache need no call.

        Args:
            requests: `messages` and the settings of a chat completion; the model is added.
            desc: Label of the progress bar.

        Returns:
            For each its entry of the cache, see the class; None where the budget (`stopped`) or a failure (`failure`)
            prevented it.

        Raises:
            UserError: The endpoint refuses all requests, or does not tell the tokens that `max_cost` counts.
        """
        bodies = [{"model": self.config.model, **request} for request in requests]
        keys = [content_hash(body) for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._replies}
        total = len(set(keys))
        with (
            tqdm(total=total, initial=total - len(missing), desc=desc, unit="verdict") as progress,
            ThreadPoolExecutor(self.config.threads) as pool,
        ):
            try:
                for asked in as_completed([pool.submit(self._ask, *item) for item in missing.items()]):
                    progress.update(asked.result())
                    if self._last_failure:
                        progress.set_postfix_str(f"last failure: {self._last_failure[:60]}")
            except BaseException:
                self._ended.set()  # or the pool would wait until all have been asked
                raise
        return [self._replies.get(key) for key in keys]

    def _ask(self, key: str, body: Entry) -> bool:
        """Sends a request until it is answered or fails for good; returns whether it was answered."""
        pause, reason = 0.0, ""
        for attempt in range(self.config.max_retries + 1):
            if self._ended.wait(pause) or not self._may_call():
                return False
            try:
                self._keep(key, self._call(body))
                return True
            except _Retryable as error:
                self._last_failure = reason = str(error)
                # Threads that failed together must not come back together.
                pause = max(error.wait, random.uniform(0.5, 1.0) * min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
            except _Rejected as error:
                self._last_failure = reason = str(error)
                break
        with self._lock:
            self.failure = reason
            self._consecutive_failures += 1
            if self._consecutive_failures == _MAX_FAILURES:
                self._stop(f"{_MAX_FAILURES} requests in a row failed")
        return False

    def _may_call(self) -> bool:
        """Counts a call, if the budget allows it; returns whether it does."""
        with self._lock:
            if self.config.max_calls is not None and self.calls >= self.config.max_calls:
                self._stop(f"--max_calls {self.config.max_calls} is used up")
            if self.config.max_cost is not None and self.cost >= self.config.max_cost:
                self._stop(f"--max_cost {self.config.max_cost} is used up, with {self.cost} tokens")
            may_call = not self._ended.is_set()
            self.calls += may_call
            return may_call

    def _stop(self, reason: str) -> None:
        self.stopped = self.stopped or reason
        self._ended.set()

    def _keep(self, key: str, reply: Entry) -> None:
        with self._lock:
            entry = {"key": key, **reply, "tstamp": time.time()}
            self._cache.add(entry)
            self._replies[key] = entry
            self._consecutive_failures = 0
            self.cost += reply["tokens"] or 0
        if reply["tokens"] is None and self.config.max_cost is not None:
            self._ended.set()
            raise UserError("--max_cost: the endpoint does not tell how many tokens a reply took; use --max_calls")

    def _call(self, body: Entry) -> Entry:
        """Calls the endpoint once."""
        request = urllib.request.Request(
            f"{self.config.base_url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            method="POST",
        )
        try:
            with self._opener.open(request, timeout=self.config.timeout) as response:
                return read_reply(response.read())
        except urllib.error.HTTPError as error:
            raise self._status_error(error) from None
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke or timed out
            raise _Retryable(f"{self.config.base_url}: {getattr(error, 'reason', None) or error!r}") from None

    def _status_error(self, error: urllib.error.HTTPError) -> Exception:
        """The exception for a status other than 200."""
        try:
            text = " ".join(error.read(1000).decode(errors="replace").split())[:300]
        except (OSError, http.client.HTTPException):
            text = ""
        # Some servers repeat a key that they refuse.
        message = f"HTTP {error.code}: {text.replace(self._key, '***') if self._key else text}"
        if error.code in _FATAL or 300 <= error.code < 400:
            self._ended.set()
            key = f"{self.config.api_key_env} is {'set' if self._key else 'not set'}"
            return UserError(f"--base_url: {self.config.base_url} says {message}; check URL, model and key ({key})")
        if error.code in _RETRYABLE or error.code >= 500:
            return _Retryable(message, _retry_after(error.headers))
        flags = [flag for setting, flag in _REFUSED.items() if setting in text]
        return _Rejected(f"{message}; try {flags[0]}" if flags else message)


def read_reply(raw: bytes) -> Entry:
    """Reads a chat completion.

    Returns:
        `text`; `top_logprobs` of its last token, by token, or None; `tokens` of prompt and reply, or None.

    Raises:
        _Retryable: It is none.

    Example:
        >>> read_reply(b'{"choices": [{"message": {"content": "Rating: [[5]]"}}], "usage": {"total_tokens": 9}}')
        {'text': 'Rating: [[5]]', 'top_logprobs': None, 'tokens': 9}
    """
    try:
        reply = json.loads(raw)
        choice = reply["choices"][0]
        text = _text_of(choice)
        tokens = (reply.get("usage") or {}).get("total_tokens")
        of_tokens = (choice.get("logprobs") or {}).get("content") or []
        top = {t["token"]: float(t["logprob"]) for t in of_tokens[-1]["top_logprobs"]} if of_tokens else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Retryable(f"a reply that is no chat completion ({type(error).__name__})") from None
    if not isinstance(text, str) or not isinstance(tokens, int | None):
        raise _Retryable("a chat completion without a text")
    return {"text": text, "top_logprobs": top, "tokens": tokens}


def _text_of(choice: Entry) -> Any:
    """The text of a reply; empty where it was refused, or where thinking took all the tokens there were."""
    message = choice["message"]
    content = message["content"]
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type", "text") == "text")
    is_empty = content is None and (message.get("refusal") or choice.get("finish_reason") == "length")
    return "" if is_empty else content


def _retry_after(headers: Message) -> float:
    try:
        return min(max(float(headers.get("Retry-After", 0)), 0.0), 2 * LONGEST_WAIT)
    except ValueError:  # a date, which a server's clock and ours may read apart
        return 0.0
