"""What the vLLM plugin costs, and whether it decides as transformers does.

    python benchmarks/serving.py decisions  [--prompts 300] [--dtype float32]
    python benchmarks/serving.py throughput [--rounds 5] [--requests 256]
    python benchmarks/serving.py latency    [--requests 200]
    python benchmarks/serving.py soak       [--requests 20000] [--plain]

Runs in vLLM's environment with this package installed, and starts the servers itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from refusal_tokens.checkpoint import load_checkpoint, load_info
from refusal_tokens.decision import decide, margins
from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.prefill import profile_rows
from refusal_tokens.rates import rate
from refusal_tokens.rows import Row, read_rows
from refusal_tokens.serving.launch import Server, running
from refusal_tokens.serving.requests import CHAT

ROOT = Path(__file__).resolve().parent.parent
# Two servers share the memory, of the machine or of the GPU.
OPTIONS = (
    "--max-model-len 1024 --enforce-eager --max-num-seqs 64 --gpu-memory-utilization 0.2 "
    "--dtype {dtype}"
)
CONCURRENT = 64
# By how much a number between 32 and 64 is rounded, where the control logits lie.
ROUNDING = {"bfloat16": 2.0**-3, "float32": 2.0**-19}


@dataclass(frozen=True)
class Bench:
    """A running server, and what is known of its model."""

    url: str
    model: str
    pid: int


def policies_of(knobs: Sequence[str]) -> dict[str, Policy]:
    """Eight policies that differ in rule, knobs and bounds; the first six decide greedily."""
    first, last = knobs[0], knobs[-1]
    return {
        "default": Policy(),
        "strict": Policy(bias=dict.fromkeys(knobs, 4.0)),
        "lax": Policy(bias=dict.fromkeys(knobs, -6.0)),
        "bias": Policy(rule="bias", bias={first: 3.0, last: -3.0}),
        "threshold": Policy(rule="threshold", bias={first: 2.0}),
        "floor": Policy(bias={first: -2.0}, bounds={first: Bounds(min_bias=-2.0)}),
        "capped": Policy(bias={last: 9.0}, bounds={last: Bounds(max_bias=1.0)}),
        "locked": Policy(bias={first: 1.0}, bounds={first: Bounds(locked=True)}),
    }


@contextmanager
def served(
    checkpoint: Path, port: int, plain: bool = False, dtype: str = "bfloat16"
) -> Iterator[Bench]:
    """Start a server with the plugin, or the same without it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, policy in policies_of(load_info(checkpoint).taxonomy.knobs).items():
            save_policy(Path(folder) / f"{name}.json", policy)
        server = Server(checkpoint, [Path(folder)], port=port, options=OPTIONS.format(dtype=dtype))
        command, environment = server.command(), server.environment()
        if plain:
            first, last = command.index("--tokenizer-mode"), command.index("--max-model-len")
            command = command[:first] + command[last:]
        with running(command, environment, server.url) as pid:
            yield Bench(server.url, server.name, pid)


def body(bench: Bench, row: Row, **fields: Any) -> dict[str, Any]:
    """A request for one token."""
    base = {"model": bench.model, "messages": list(row.prompt), "max_tokens": 1, "temperature": 0}
    return {**base, **fields}


def under(policy: str) -> dict[str, Any]:
    """The arguments that choose a policy."""
    return {"vllm_xargs": {"rt_policy": policy}}


async def each(jobs: Sequence[Any], work: Any) -> list[Any]:
    """Run ``work(client, job)`` for all jobs, ``CONCURRENT`` at a time."""
    gate = asyncio.Semaphore(CONCURRENT)
    limits = httpx.Limits(max_connections=CONCURRENT)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def one(job: Any) -> Any:
            async with gate:
                return await work(client, job)

        return await asyncio.gather(*map(one, jobs))


def sample(count: int, seed: int = 0) -> list[Row]:
    """Return some of the shipped test rows."""
    from refusal_tokens.taxonomy import default_taxonomy

    rows = read_rows([ROOT / "data" / "test.jsonl"], default_taxonomy())
    return random.Random(seed).sample(list(rows), count)


def expected(
    checkpoint: Path, rows: Sequence[Row], dtype: str = "bfloat16"
) -> tuple[np.ndarray, Any]:
    """Return the control logits by transformers, (rows, 1 + categories), and the taxonomy."""
    loaded = load_checkpoint(checkpoint, dtype=dtype, device="cpu")
    profile = profile_rows(loaded, rows)
    return profile.control_logits.astype(np.float64), loaded.info.taxonomy


def category_of(reply: Any) -> str | None:
    """Return the category of a reply's decision; None for a response."""
    found: str | None = reply["choices"][0]["refusal_tokens"]["category"]
    return found


def decisions(checkpoint: Path, options: argparse.Namespace) -> None:
    """Compare vLLM's decisions with transformers', greedy, in one dtype."""
    rows = sample(options.prompts)
    logits, taxonomy = expected(checkpoint, rows, options.dtype)
    policies = dict(list(policies_of(taxonomy.knobs).items())[:6])

    async def ask(client: httpx.AsyncClient, job: Any) -> str | None:
        row, name = job
        answer = await client.post(bench.url + CHAT, json=body(bench, row, **under(name)))
        answer.raise_for_status()
        return category_of(answer.json())

    jobs = [(row, name) for name in policies for row in rows]
    with served(checkpoint, 8211, dtype=options.dtype) as bench:
        found = asyncio.run(each(jobs, ask))
    near = 4 * ROUNDING[options.dtype]
    wrong, far = 0, 0
    for index, (name, policy) in enumerate(policies.items()):
        setting = policy.knobs(taxonomy)
        wanted = [taxonomy.knobs[d - 1] if d else None for d in decide(logits, setting)]
        got = found[index * len(rows) : (index + 1) * len(rows)]
        differ = [i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b]
        gaps = [distance(logits[i], setting) for i in differ]
        wrong, far = wrong + len(differ), far + sum(gap > near for gap in gaps)
        shown = ", ".join(f"{gap:.2f}" for gap in gaps)
        print(
            f"{name:<10} equal {len(rows) - len(differ)} of {len(rows)}; nats from a tie: {shown}"
        )
    print(f"equal: {rate(len(found) - wrong, len(found))}; beyond rounding of a tie: {far}")


def distance(logits: np.ndarray, setting: Any) -> float:
    """How far a prompt is from another decision, nats: by its margin, its floor or its route."""
    margin, _ = margins(logits[None], setting)
    biased = logits[1:] + (setting.bias if setting.rule == "bias" else 0.0)
    top = np.sort(biased)[::-1]
    floor = np.abs(logits[1:] + setting.floor - logits[0]).min()
    near = [abs(float(margin[0])), float(floor)]
    return min([*near, float(top[0] - top[1])] if len(top) > 1 else near)


def throughput(checkpoint: Path, options: argparse.Namespace) -> None:
    """Compare tokens a second with and without the plugin, in turn."""
    rows = sample(options.requests)
    names = list(policies_of(load_info(checkpoint).taxonomy.knobs))
    with both(checkpoint) as servers:
        ratios = []
        for number in range(options.rounds + 1):
            order = ("steered", "plain") if number % 2 else ("plain", "steered")
            speed = {which: tokens_a_second(servers[which], rows, which, names) for which in order}
            # The first round warms both up.
            if number:
                ratios.append(speed["steered"] / speed["plain"])
                print(f"round {number}: {speed['steered']:.0f} and {speed['plain']:.0f} tokens/s")
    report("throughput with the plugin / without", ratios)


@contextmanager
def both(checkpoint: Path) -> Iterator[dict[str, Bench]]:
    """Start the server with the plugin and the one without."""
    with ExitStack() as stack:
        steered = stack.enter_context(served(checkpoint, 8211))
        yield {
            "steered": steered,
            "plain": stack.enter_context(served(checkpoint, 8212, plain=True)),
        }


def tokens_a_second(bench: Bench, rows: Sequence[Row], which: str, names: Sequence[str]) -> float:
    """Generate 48 tokens for each prompt; no reply may end before."""
    # End of turn, of text; both servers refuse to stop early.
    fields = {"max_tokens": 48, "logit_bias": {"0": -100, "2": -100}, "stream": True}

    async def ask(client: httpx.AsyncClient, job: int) -> int:
        extra = under(names[job % len(names)]) if which == "steered" else {}
        asked = body(bench, rows[job], **fields, **extra)
        asked["stream_options"] = {"include_usage": True}
        used = 0
        async for event in events(client, bench.url, asked):
            used = (event.get("usage") or {}).get("completion_tokens", used)
        return used

    began = time.perf_counter()
    total = sum(asyncio.run(each(range(len(rows)), ask)))
    return total / (time.perf_counter() - began)


async def events(client: httpx.AsyncClient, url: str, asked: Any) -> AsyncIterator[Any]:
    """Yield the chunks of a stream."""
    async with client.stream("POST", url + CHAT, json=asked) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def latency(checkpoint: Path, options: argparse.Namespace) -> None:
    """Compare the time to the first text, one request at a time, in turn."""
    rows = sample(options.requests)

    async def first_text(client: httpx.AsyncClient, bench: Bench, row: Row, **extra: Any) -> float:
        asked = body(bench, row, max_tokens=4, stream=True, **extra)
        began = time.perf_counter()
        async for event in events(client, bench.url, asked):
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                return time.perf_counter() - began
        return time.perf_counter() - began

    async def measure(servers: dict[str, Bench]) -> list[tuple[float, float]]:
        pairs = []
        async with httpx.AsyncClient(timeout=600) as client:
            for number, row in enumerate(rows):
                # Whoever comes second must not profit: the prompts of a pair differ.
                other = rows[number - 1]
                steered = await first_text(client, servers["steered"], row, **under("strict"))
                plain = await first_text(client, servers["plain"], other)
                pairs.append((steered, plain))
        return pairs[len(pairs) // 10 :]

    with both(checkpoint) as servers:
        pairs = asyncio.run(measure(servers))
    steered, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"first text, median of {len(pairs)}: {steered * 1e3:.2f} ms with, {plain * 1e3:.2f} ms "
        f"without: {steered / plain:.4f}"
    )


def report(what: str, ratios: Sequence[float]) -> None:
    """Print the median of paired ratios."""
    print(
        f"{what}: median {statistics.median(ratios):.4f}, from {min(ratios):.4f} to "
        f"{max(ratios):.4f}, {len(ratios)} pairs"
    )


def soak(checkpoint: Path, options: argparse.Namespace) -> None:
    """Send a mix of requests; count wrong decisions, and watch the servers' memory."""
    rows = sample(200)
    logits, taxonomy = expected(checkpoint, rows)
    policies = policies_of(taxonomy.knobs)
    settings = {name: policy.knobs(taxonomy) for name, policy in policies.items()}
    counts: Counter[str] = Counter()
    rng = random.Random(0)
    jobs = [
        (rng.randrange(len(rows)), rng.choice(list(policies)), rng.random())
        for _ in range(options.requests)
    ]

    async def ask(client: httpx.AsyncClient, job: Any) -> None:
        index, name, chance = job
        if options.plain:
            asked = body(bench, rows[index], max_tokens=12)
            (await client.post(bench.url + CHAT, json=asked)).raise_for_status()
            counts["answered without the plugin"] += 1
            return
        asked = body(bench, rows[index], **under(name), max_tokens=12)
        if chance < 0.02:
            asked["vllm_xargs"] = {"rt_policy": name, "rt_bias_nothing": 1}
            answer = await client.post(bench.url + CHAT, json=asked)
            counts["malformed, refused" if answer.status_code == 400 else "malformed, let in"] += 1
        elif chance < 0.03:
            async for _ in events(client, bench.url, {**asked, "stream": True, "max_tokens": 200}):
                break
            counts["cut off"] += 1
        else:
            answer = await client.post(bench.url + CHAT, json=asked)
            counts[judged(answer, logits[index], settings[name], name, taxonomy)] += 1

    with served(checkpoint, 8211, plain=options.plain) as bench:
        memory = []
        parts = 20
        for part in range(parts):
            asyncio.run(each(jobs[part::parts], ask))
            memory.append(resident(bench.pid))
            print(f"{sum(counts.values())} requests, {memory[-1]:.0f} MiB", flush=True)
    print(", ".join(f"{what}: {count}" for what, count in sorted(counts.items())))
    warm = parts // 4
    print(f"memory after warm-up {memory[warm]:.0f} MiB, at the end {memory[-1]:.0f} MiB")


def judged(answer: Any, logits: np.ndarray, setting: Any, name: str, taxonomy: Any) -> str:
    """Say what became of a good request."""
    if answer.status_code != 200:
        return f"failed with {answer.status_code}"
    found = answer.json()["choices"][0]
    decision = int(decide(logits[None], setting)[0])
    wanted = taxonomy.knobs[decision - 1] if decision else None
    if "<|re" in found["message"]["content"]:
        return "control token in the text"
    if found["refusal_tokens"]["policy"] != name:
        return "wrong policy"
    if found["refusal_tokens"]["category"] == wanted:
        return "right"
    return (
        "near a tie" if distance(logits, setting) <= 4 * ROUNDING["bfloat16"] else "wrong decision"
    )


def resident(pid: int) -> float:
    """Return the resident memory of a process and its children, MiB."""
    pids, total = [pid], 0
    while pids:
        one = pids.pop()
        try:
            pids += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1])
        except FileNotFoundError:
            continue
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["decisions", "throughput", "latency", "soak"])
    parser.add_argument("--checkpoint", default="runs/smollm2-135m-lora-smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="soak a server without the plugin")
    parser.add_argument("--dtype", choices=list(ROUNDING), default="bfloat16", help="of decisions")
    options = parser.parse_args()
    measure = {"decisions": decisions, "throughput": throughput, "latency": latency, "soak": soak}
    measure[options.what](Path(options.checkpoint), options)


if __name__ == "__main__":
    main()
