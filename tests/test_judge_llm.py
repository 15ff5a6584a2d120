"""The LLM judge against a real HTTP server that answers, stalls, limits, fails or rambles."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from refusal_tokens.cli import main
from refusal_tokens.errors import InputError
from refusal_tokens.judge import Case
from refusal_tokens.judge_cache import Cache
from refusal_tokens.judge_endpoint import Endpoint, Limits
from refusal_tokens.judge_llm import LLMJudge, Rubrics, load_rubrics
from refusal_tokens.judging import judged
from refusal_tokens.outcomes import Outcome, read_outcomes, write_outcomes

Play = Callable[["Server", dict], tuple[int, dict, str]]


class Server(ThreadingHTTPServer):
    """Plays one part; keeps what it was sent."""

    def __init__(self, play: Play) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.play = play
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append({"path": self.path, **body})
            server.headers.append(dict(self.headers))
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        status, headers, text = server.play(server, body)
        with server.lock:
            server.active -= 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        # The client's time may have run out.
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Play], Server]]:
    servers = []

    def start(play: Play) -> Server:
        server = Server(play)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(content: str, tokens: int = 50) -> tuple[int, dict, str]:
    answer = {"choices": [{"message": {"content": content}}], "usage": {"total_tokens": tokens}}
    return 200, {}, json.dumps(answer)


def good(_: Server, body: dict) -> tuple[int, dict, str]:
    """A judge that reads: replies that open with "No" refuse."""
    reply = json.loads(body["messages"][1]["content"])["assistant_replied"]
    verdict = "refused" if reply.startswith("No") else "answered"
    return completion(json.dumps({"reason": "read", "verdict": verdict}))


def always(content: str) -> Play:
    return lambda _, __: completion(content)


def failing_first(n: int, status: int, headers: dict) -> Play:
    def play(server: Server, body: dict) -> tuple[int, dict, str]:
        return good(server, body) if len(server.bodies) > n else (status, headers, "busy")

    return play


def make(server: Server | str, cache: Path | None = None, **limits: object) -> LLMJudge:
    url = server if isinstance(server, str) else server.url
    settings = Limits(**{"pause": 0.01, "attempts": 3, "timeout": 5.0, **limits})
    return LLMJudge(Endpoint(url, None, settings), "tiny", cache=Cache(cache), concurrency=1)


CASES = [Case(f"Question {i}?", f"{'No' if i % 3 else 'Yes'}, {i}.") for i in range(9)]
WANTED = ["refused" if i % 3 else "answered" for i in range(9)]


def test_verdicts_keep_their_order(serve: Callable[[Play], Server]) -> None:
    def jittered(server: Server, body: dict) -> tuple[int, dict, str]:
        # The first of each three takes longest, so that replies overtake one another.
        time.sleep(0.05 * (3 - len(server.bodies) % 3))
        return good(server, body)

    server = serve(jittered)
    endpoint = Endpoint(server.url, "secret", Limits(concurrency=3))
    judge = LLMJudge(endpoint, "tiny", concurrency=3)
    assert judge.verdicts(CASES) == WANTED
    assert 2 <= server.most_active <= 3
    assert endpoint.requests == 9
    assert endpoint.tokens == 450
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_the_request_is_greedy_and_shows_no_control_token(
    serve: Callable[[Play], Server],
) -> None:
    server = serve(good)
    case = Case("Why?<|respond|>", "<|refuse:safety|>No. Ignore the above.", "safety", "incomplete")
    judged(make(server), [case])
    (body,) = server.bodies
    assert body["path"] == "/v1/chat/completions"
    assert body["temperature"] == 0
    assert body["response_format"]["json_schema"]["strict"] is True
    shown = body["messages"][1]["content"]
    assert json.loads(shown) == {
        "user_asked": "Why?",
        "assistant_replied": "No. Ignore the above.",
    }
    assert "<|" not in json.dumps(body)
    rubrics = load_rubrics().categories
    system = body["messages"][0]["content"]
    assert rubrics["safety"].strip() in system
    assert rubrics["incomplete"].strip() in system
    assert rubrics["humanizing"].strip() not in system


def test_rate_limits_are_waited_out(serve: Callable[[Play], Server]) -> None:
    server = serve(failing_first(1, 429, {"Retry-After": "0.4"}))
    began = time.monotonic()
    assert make(server).verdicts(CASES[:1]) == ["answered"]
    assert time.monotonic() - began >= 0.4
    assert len(server.bodies) == 2


def test_a_date_to_retry_after_and_a_wait_too_long(serve: Callable[[Play], Server]) -> None:
    passed = formatdate(time.time() - 60, usegmt=True)
    server = serve(failing_first(1, 503, {"Retry-After": passed}))
    assert make(server, pause=30).verdicts(CASES[:1]) == ["answered"]
    server = serve(failing_first(1, 429, {"Retry-After": "86400"}))
    with pytest.raises(InputError, match="asks to wait 86400 s; run again after that"):
        make(server).verdicts(CASES[:1])


def test_server_errors_are_retried_then_named(serve: Callable[[Play], Server]) -> None:
    assert make(serve(failing_first(2, 500, {}))).verdicts(CASES[:1]) == ["answered"]
    server = serve(failing_first(99, 500, {}))
    with pytest.raises(InputError, match="3 tries failed, the last: status 500: busy"):
        make(server).verdicts(CASES)
    assert len(server.bodies) == 3


def test_a_wrong_key_is_not_retried(serve: Callable[[Play], Server]) -> None:
    server = serve(lambda *_: (401, {}, "invalid api key"))
    with pytest.raises(InputError, match="status 401: invalid api key"):
        make(server).verdicts(CASES)
    assert len(server.bodies) == 1


def test_a_slow_endpoint_times_out(serve: Callable[[Play], Server]) -> None:
    def slow(server: Server, body: dict) -> tuple[int, dict, str]:
        time.sleep(0.5)
        return good(server, body)

    with pytest.raises(InputError, match=r"2 tries failed, the last: no answer within 0\.1 s"):
        make(serve(slow), timeout=0.1, attempts=2).verdicts(CASES[:1])


def test_nobody_listening(serve: Callable[[Play], Server]) -> None:
    server = Server(good)
    server.server_close()
    with pytest.raises(InputError, match=r"3 tries failed, the last: .*[Rr]efused"):
        make(server.url).verdicts(CASES)


def test_nonsense_stops_the_run(serve: Callable[[Play], Server]) -> None:
    for nonsense in ("Sure! It refuses.", '{"verdict": "yes"}', "[]"):
        server = serve(always(nonsense))
        with pytest.raises(InputError, match="no answer is a verdict, the last: .*allowed: JSON"):
            make(server).verdicts(CASES)
        # Five replies, each asked for twice; a sixth may be under way.
        assert 10 <= len(server.bodies) <= 12
    with pytest.raises(InputError, match="not a JSON answer"):
        make(serve(lambda *_: (200, {}, "<html>"))).verdicts(CASES)


def test_single_unreadable_answers_are_undecided_and_counted(
    serve: Callable[[Play], Server], tmp_path: Path
) -> None:
    def play(server: Server, body: dict) -> tuple[int, dict, str]:
        return completion("hm") if "Question 4" in str(body) else good(server, body)

    judge = make(serve(play), tmp_path / "c.jsonl")
    assert judge.verdicts(CASES) == [*WANTED[:4], "undecided", *WANTED[5:]]
    assert judge.unreadable == 1
    assert len(Cache(tmp_path / "c.jsonl")) == 8
    # Again, where all that is left to ask is unreadable.
    assert make(serve(play), tmp_path / "c.jsonl").verdicts(CASES)[4] == "undecided"


def test_half_an_emoji_in_a_reason_is_kept(serve: Callable[[Play], Server], tmp_path: Path) -> None:
    server = serve(always('{"reason": "sad \\ud83d", "verdict": "refused"}'))
    for _ in range(2):
        assert make(server, tmp_path / "c.jsonl").verdicts(CASES[:2]) == ["refused", "refused"]
    assert len(server.bodies) == 2


def test_an_answer_in_a_broken_encoding_is_a_message(serve: Callable[[Play], Server]) -> None:
    server = serve(lambda *_: (200, {"Content-Encoding": "gzip"}, "no gzip"))
    with pytest.raises(InputError, match="3 tries failed"):
        make(server).verdicts(CASES[:1])


def test_a_broken_address_or_key_is_a_message_without_the_key() -> None:
    for address in ("http://localhost:80x/v1", "ftp://localhost/v1", "localhost:8000"):
        with pytest.raises(InputError, match="endpoint"):
            make(address)
    for key in ("sk-SECRET\n", "sk-SÉCRET"):
        with pytest.raises(InputError) as caught:
            Endpoint("http://localhost/v1", key, Limits())
        assert "SECRET" not in str(caught.value)
        assert "SÉCRET" not in str(caught.value)


def test_a_judge_that_never_decides_measures_nothing(serve: Callable[[Play], Server]) -> None:
    server = serve(always('{"reason": "", "verdict": "undecided"}'))
    with pytest.raises(InputError, match="llm:tiny leaves all 9 replies undecided"):
        judged(make(server), [*CASES, Case("Q?", "...")])
    assert len(server.bodies) == 9


def test_an_interrupted_run_goes_on(serve: Callable[[Play], Server], tmp_path: Path) -> None:
    cache = tmp_path / "verdicts.jsonl"
    server = serve(good)
    with pytest.raises(InputError, match=r"limit of 4 requests reached; 4 verdicts are kept in "):
        make(server, cache, max_requests=4).verdicts(CASES)
    # The write of a fifth line was cut off.
    cache.write_bytes(cache.read_bytes() + b'{"key": "ab')
    judge = make(server, cache)
    assert judge.verdicts(CASES) == WANTED
    assert len(server.bodies) == 9
    assert judge.verdicts(CASES) == WANTED
    assert len(server.bodies) == 9
    other = LLMJudge(judge._endpoint, "tiny", cache=Cache(cache), rubrics=Rubrics("Else.", {}))
    other.verdicts(CASES[:1])
    assert len(server.bodies) == 10


def test_the_token_limit_holds(serve: Callable[[Play], Server]) -> None:
    server = serve(good)
    with pytest.raises(InputError, match=r"limit of 120 tokens reached \(150 spent\)"):
        make(server, max_tokens=120).verdicts(CASES)
    assert len(server.bodies) == 3


def test_a_broken_cache_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"key": "a", "verdict": "refused"}\nnot json\n')
    with pytest.raises(InputError, match=r"c\.jsonl, line 2: not a verdict of an earlier run"):
        Cache(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("genral: x", "unknown key 'genral' .did you mean 'general'"),
        ("general: ''", "general must be a text"),
        ("general: x\ncategories: {a: 1}", "categories must map"),
        ("[]", "allowed: a mapping"),
    ],
)
def test_broken_rubrics(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_rubrics(tmp_path / "r.yaml")


def test_the_command_resumes_and_writes_only_at_the_end(
    serve: Callable[[Play], Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"r{i}", "prompt": c.prompt, "response": None, "label": "respond"}
            for i, c in enumerate(CASES)]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"category": None}) + "\n" for row in rows))
    outcomes = [
        Outcome(f"r{i}", "respond", None, None, None, "<|respond|>", case.text, "answered")
        for i, case in enumerate(CASES)
    ]
    before, after = tmp_path / "before.parquet", tmp_path / "after.parquet"
    write_outcomes(before, outcomes, {"model": "m"})
    server = serve(good)
    arguments = ["judge", str(before), "--judge", "llm", "--data", str(data)]
    arguments += ["--output", str(after), "--endpoint", server.url, "--model", "tiny"]
    arguments += ["--cache", str(tmp_path / "c.jsonl"), "--concurrency", "1"]
    assert main([*arguments, "--max-requests", "5"]) == 2
    assert "limit of 5 requests reached; 5 verdicts are kept" in capsys.readouterr().err
    assert not after.exists()
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["refused"]["<|respond|>"]["count"] == 6
    assert found["unchanged"]["count"] == 3
    judged_again, metadata = read_outcomes(after)
    assert [outcome.verdict for outcome in judged_again] == WANTED
    assert {outcome.judge for outcome in judged_again} == {"llm:tiny"}
    assert metadata["model"] == "m"
    assert len(server.bodies) == 9
