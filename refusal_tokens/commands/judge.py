"""``judge``: judge replies again, compare judges with labels, or train the classifier."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal_tokens.commands.common import add_map, command, data_files, map_of, next_line
from refusal_tokens.errors import InputError
from refusal_tokens.files import check_new_file

if TYPE_CHECKING:
    from refusal_tokens.agreement import Agreement, Label
    from refusal_tokens.correction import Corrected
    from refusal_tokens.evaluation import Evaluation
    from refusal_tokens.outcomes import Outcome
    from refusal_tokens.rates import Rate

LABELS = "data/labels/judge_labels.jsonl"


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands,
        "judge",
        _judge,
        "Judge an outcomes file again, compare judges with --labels, or --train the classifier.",
    )
    added.add_argument("outcomes", nargs="?", help="an outcomes .parquet file to judge again")
    added.add_argument(
        "--judge",
        nargs="+",
        choices=("rules", "classifier", "llm"),
        help="one for outcomes; several with --labels alone; default: rules, classifier",
    )
    added.add_argument("--labels", help=f"labelled replies, such as {LABELS}")
    added.add_argument("--data", nargs="+", help="files of the rows that were replied to")
    added.add_argument("--train", nargs="+", metavar="FILE", help="files of rows with replies")
    added.add_argument("--output", type=Path, help="an outcomes .parquet or .safetensors file")
    added.add_argument("--classifier", help="a .safetensors file; default: the shipped one")
    added.add_argument("--taxonomy", help="YAML file; default: the five categories of CoCoNot")
    add_map(added)
    _add_llm(added)
    added.add_argument("--overwrite", action="store_true", help="replace what is there")
    added.add_argument("--json", action="store_true", help="print JSON")


def _add_llm(added: argparse.ArgumentParser) -> None:
    group = added.add_argument_group("LLM judge")
    group.add_argument("--endpoint", help="base address, such as http://127.0.0.1:8000/v1")
    group.add_argument("--model", help="the model's name at the endpoint")
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key")
    group.add_argument("--max-requests", type=int, help="stop after this many, retries included")
    group.add_argument("--max-tokens", type=int, help="stop once this many tokens are spent")
    group.add_argument("--concurrency", type=int, default=4, help="requests at a time; default 4")
    group.add_argument("--timeout", type=float, default=60.0, help="seconds for one answer")
    group.add_argument(
        "--cache", help="a .jsonl file that keeps each verdict, so that an interrupted run goes on"
    )
    group.add_argument("--rubrics", help="YAML file; default: the shipped one")


def _judge(options: argparse.Namespace) -> None:
    _check(options)
    if options.train:
        _train(options)
    elif options.outcomes:
        _again(options)
    else:
        _compare(options)


def _check(options: argparse.Namespace) -> None:
    if not (options.train or options.outcomes or options.labels):
        raise InputError(f"nothing to judge; give an outcomes file, or --labels {LABELS}")
    if options.train and options.outcomes:
        raise InputError("--train goes without an outcomes file")
    if options.train or options.outcomes:
        if options.output is None:
            raise InputError("--output is missing: the file to write")
        check_new_file(options.output, options.overwrite)
    elif options.output is not None:
        raise InputError(
            "--output goes with an outcomes file or --train; --labels alone writes none"
        )
    if options.outcomes and len(options.judge or []) != 1:
        raise InputError("--judge: one is needed: rules, classifier or llm")
    for name in ("max_requests", "max_tokens", "concurrency", "timeout"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name.replace('_', '-')}: found {value}; allowed: above 0")


def _rows(options: argparse.Namespace, paths: list[str]) -> list[Any]:
    from refusal_tokens.rows import read_rows
    from refusal_tokens.taxonomy import default_taxonomy, load_taxonomy

    taxonomy = load_taxonomy(options.taxonomy) if options.taxonomy else default_taxonomy()
    return read_rows(data_files(paths), taxonomy, row_map=map_of(options.map), labelled=False)


def _train(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from refusal_tokens.files import file_sha256
    from refusal_tokens.judge_classifier import save_classifier, train_classifier

    files = data_files(options.train)
    judge, error = train_classifier(_rows(options, options.train))
    hashes = {Path(file).name: file_sha256(file) for file in files}
    save_classifier(options.output, replace(judge, made={**judge.made, "files": hashes}))
    if options.json:
        print(json.dumps({"output": str(options.output), "held_out_error": asdict(error)}))
        return
    print(f"{options.output}: error on held-out groups of written replies{error}")
    following = ["judge", "--labels", LABELS, "--judge", "rules", "classifier", "--classifier"]
    print("\n" + next_line("refusal-tokens", *following, options.output))


def _compare(options: argparse.Namespace) -> None:
    from refusal_tokens.agreement import read_labels, reasons
    from refusal_tokens.judging import compare_judges, make_judge

    labels = read_labels(options.labels)
    judges = [make_judge(name, options) for name in options.judge or ("rules", "classifier")]
    found, pairs = compare_judges([judge for judge, _ in judges], labels)
    if options.json:
        record = {
            "judges": [asdict(one) for one in found],
            "pairs": [{"first": a, "second": b, **asdict(one)} for (a, b), one in pairs.items()],
            "reason_fits": {token: asdict(share) for token, share in reasons(labels).items()},
        }
        print(json.dumps(record))
        return
    between = [
        f"{a} and {b}: kappa {one.kappa or 'one verdict only'}  n={one.n}"
        for (a, b), one in pairs.items()
    ]
    print("\n".join([f"{options.labels}: {len(labels)} replies", "", *_table(found), *between]))
    print("\n".join(["", *_reason_lines(labels), *_cost(judges)]))
    print("\nNext: refusal-tokens judge OUTCOMES.parquet --judge rules --output JUDGED.parquet")


def _table(found: list[Agreement]) -> list[str]:
    width = max(12, *(len(one.judge) for one in found))
    lines = [f"{'refused, by':{width}}  {'precision':26}{'recall':26}{'specificity':26}kappa"]
    for one in found:
        rates = (one.precision, one.recall, one.specificity)
        shown = "".join(f"{rate!s:26}" for rate in rates)
        lines.append(f"{one.judge:{width}}  {shown}{one.kappa or 'one verdict only'}  n={one.n}")
    for one in found:
        lines.append(
            f"{one.judge}: {one.judge_undecided} left undecided; not counted: "
            f"{one.label_undecided} that the reader left undecided"
        )
    return lines


def _reason_lines(labels: tuple[Label, ...]) -> list[str]:
    from refusal_tokens.agreement import reasons

    shares = reasons(labels)
    return ["the refusal's reason fits its token, by the reader:"] * bool(shares) + [
        f"{token:26}{share}" for token, share in shares.items()
    ]


def _cost(judges: list[tuple[Any, Any]]) -> list[str]:
    lines = []
    for judge, endpoint in judges:
        if endpoint is not None:
            lines.append(f"{judge.name}: {endpoint.requests} requests, {endpoint.tokens} tokens")
            if judge.unreadable:
                lines.append(f"{judge.unreadable} answers were no verdict: undecided, not kept")
    return lines


def _again(options: argparse.Namespace) -> None:
    from refusal_tokens.agreement import read_labels
    from refusal_tokens.judging import against_labels, judge_again, make_judge, prompts_of
    from refusal_tokens.outcomes import read_outcomes, write_outcomes

    outcomes, metadata = read_outcomes(options.outcomes)
    name = options.judge[0]
    if name != "rules" and not options.data:
        raise InputError(f"--judge {name} reads the prompts too; name their files with --data")
    labels = read_labels(options.labels) if options.labels else None
    prompts = None
    if options.data:
        prompts = prompts_of(outcomes, metadata, _rows(options, options.data))
    judge, endpoint = make_judge(name, options)
    judged = judge_again(judge, outcomes, prompts)
    known = against_labels(judge, labels) if labels else None
    write_outcomes(options.output, judged, {**metadata, "judge": judge.name})
    found = _found(outcomes, judged, metadata, known)
    if options.json:
        print(json.dumps({"output": str(options.output), "judge": name, **found.record()}))
        return
    following = ["compare", options.output, "OTHER.parquet", "--output", "DIR"]
    lines = [*found.lines(), *_cost([(judge, endpoint)]), ""]
    print("\n".join([*lines, next_line("refusal-tokens", *following)]))


@dataclass(frozen=True)
class _Found:
    """What judging again says.

    Attributes:
        report: of the outcomes under the new verdicts; None where the file does not state its
            categories.
        max_new_tokens: of the replies.
        rates: by opening token and by kind of prompt: text that refuses, and replies undecided.
        corrected: the same rates corrected for the judge, by labels; empty without.
        unchanged: verdicts that are as before.
    """

    report: Evaluation | None
    max_new_tokens: int
    rates: Mapping[str, tuple[Rate, int]]
    corrected: Mapping[str, Corrected]
    unchanged: Rate

    def record(self) -> dict[str, Any]:
        return {
            "report": asdict(self.report) if self.report else None,
            "unchanged": asdict(self.unchanged),
            "refused": {t: asdict(r) | {"undecided": u} for t, (r, u) in self.rates.items()},
            "corrected": {name: asdict(one) for name, one in self.corrected.items()},
        }

    def lines(self) -> list[str]:
        from refusal_tokens.evaluation_table import evaluation_table

        lines = []
        if self.report:
            lines += [evaluation_table(self.report, self.max_new_tokens, None), ""]
        lines.append("Text that refuses, by the token that opens it, and by kind of prompt")
        last = "corrected for the judge" if self.corrected else ""
        lines.append(f"{'':26}{'observed':26}{'undecided':11}{last}".rstrip())
        for name, (found, undecided) in self.rates.items():
            line = f"{name:26}{found!s:26}{undecided:<11}{self.corrected.get(name, '')}"
            lines.append(line.rstrip())
        return [*lines, f"verdicts as before        {self.unchanged}"]


def _found(
    before: Sequence[Outcome],
    after: Sequence[Outcome],
    metadata: Mapping[str, Any],
    known: Agreement | None,
) -> _Found:
    from refusal_tokens.evaluation import evaluate_outcomes
    from refusal_tokens.judging import corrections, refused_by_opening
    from refusal_tokens.outcomes import distinct
    from refusal_tokens.rates import rate
    from refusal_tokens.taxonomy import taxonomy_from_dict

    report = None
    if "taxonomy" in metadata:
        report = evaluate_outcomes(after, taxonomy_from_dict(metadata["taxonomy"], "outcomes"))
    rates = refused_by_opening(after)
    rates |= {k.kind: (k.by_text, k.undecided) for k in (report.kinds if report else ())}
    pairs = zip(distinct(before), distinct(after), strict=True)
    same = [a.verdict == b.verdict for a, b in pairs]
    return _Found(
        report,
        metadata.get("max_new_tokens", 0),
        rates,
        corrections(rates, known) if known else {},
        rate(sum(same), len(same)),
    )
