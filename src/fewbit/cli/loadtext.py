"""What `fewbit bench serve` says of its figures, in words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewbit.cli.common import note, pairs, table

ROWS = (
    ("time to first token", "ttft"),
    ("time per output token", "tpot"),
    ("inter-token latency", "itl"),
    ("end-to-end latency", "e2el"),
    ("late for its schedule", "schedule_lag"),
    ("first token, from schedule", "ttft_from_schedule"),
    ("end to end, from schedule", "e2el_from_schedule"),
)
"""Latencies of the table: in words, and in the keys of the JSON object."""


def print_result(made: dict[str, Any], rounds: int) -> None:
    """One server's figures; remarks on them go to stderr."""
    failed, tokens, client = made["failed"], made["tokens"], made["client"]
    rows = [
        ("server", f"{made['base_url']}, model {made['model_id']}"),
        ("load", _words_of_load(made)),
        ("requests", f"{made['completed']} answered, {failed} failed, {made['duration']:.2f} s"),
        ("requests/s", f"{made['request_throughput']:.2f}"),
        ("output tokens/s", f"{made['output_throughput']:.1f} ({made['total_output_tokens']:,} tokens)"),
        ("all tokens/s", f"{made['total_token_throughput']:.1f} ({made['total_input_tokens']:,} of prompts)"),
    ]
    if made["stopped"]:
        rows.append(("stopped", "early: requests under way then are not counted"))
    if (good := made["goodput"])["good_requests"] is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in good["objectives_ms"].items())
        rows.append(
            ("goodput", f"{made['request_goodput']:.2f} requests/s, {good['share_of_all']:.1%} within {limits}")
        )
    if used := made.get("utilization"):
        shares = "" if used["mbu"] is None else f": MBU {used['mbu']:.1%}, MFU {used['mfu']:.1%}"
        speeds = f"{used['bytes_per_s'] / 1e9:.2f} GB/s, {used['flops_per_s'] / 1e12:.4f} TFLOP/s"
        rows.append(("utilization", f"{speeds} at a mean batch of {used['batch']:.1f}{shares}"))
    pairs(rows)
    cuts = [key.removesuffix("_ttft_ms") for key in made if key.startswith("p") and key.endswith("_ttft_ms")]
    columns = ["mean", "median", *(cut for cut in cuts if cut != "p50"), "std"]
    shown = [
        (words, *(f"{made[f'{column}_{name}_ms']:.2f}" for column in columns))
        for words, name in ROWS
        if made[f"mean_{name}_ms"] is not None
    ]
    if shown:
        print()
        table(["milliseconds", *columns], shown)
    if rounds > 1:
        print()
        table(
            [f"over {rounds} rounds", "median", "least", "most"],
            [(name, *(f"{s[k]:.2f}" for k in ("median", "min", "max"))) for name, s in made["rounds"].items()],
        )
    for text in _remarks(made, tokens, client):
        note(text)


def _words_of_load(made: dict[str, Any]) -> str:
    if made["loop"] == "closed":
        how = f"closed loop, {made['max_concurrency']} at a time"
    else:
        rate = made["request_rate"]
        at = "at the trace's times" if rate is None and not made["ramp_up"] else made["ramp_up"] or f"{rate} requests/s"
        bound = f", {made['max_concurrency']} at a time at most" if made["max_concurrency"] else ""
        how = f"open loop, {at}, burstiness {made['burstiness']}{bound}"
    ending = "answers of full length" if made["ignore_eos"] else "answers end as they like"
    return f"{made['num_prompts']} x {made['dataset']['name']}, {how}, {ending}, seed {made['seed']}"


def _remarks(made: dict[str, Any], tokens: dict[str, Any], client: dict[str, Any]) -> Sequence[str]:
    """What a reader of the figures has to know."""
    found = [f"failed: {entry['requests']} x {entry['reason']}" for entry in made["failures"][:5]]
    if by := {source: count for source, count in tokens["counted_by"].items() if source != "usage"}:
        found.append(
            f"the server counts no tokens in {sum(by.values())} answers; there they are counted by {', '.join(by)}"
        )
    if tokens["output_mismatches"]:
        found.append(
            f"in {tokens['output_mismatches']} answers the server counts other tokens than the tokenizer does "
            f"({made['total_output_tokens']:,} and {tokens['retokenized_output_tokens']:,} in all)"
        )
    if tokens["input_mismatches"]:
        found.append(f"in {tokens['input_mismatches']} prompts the server counts other tokens than were meant")
    if (distinct := made["dataset"]["distinct_prompts"]) < made["num_prompts"]:
        found.append(f"only {distinct} prompts are different: a prefix cache makes the others cheap")
    if made["ignore_eos"] and tokens["shorter_than_asked"]:
        found.append(f"{tokens['shorter_than_asked']} answers are shorter than asked, though none was to end early")
    if tokens["without_done"]:
        found.append(f"{tokens['without_done']} streams ended without [DONE]")
    if not client["kept_up"]:
        found.append(
            f"this client was late by {client['late_p99_ms']:.1f} ms (99th percentile): its machine is too busy "
            "to tell latencies closer than that"
        )
    return found


def print_ratios(ratios: dict[str, Any], first: str, second: str) -> None:
    """What the second server's figures are of the first's."""
    print()
    table(
        [f"{second} over {first}", "ratio", "least", "most"],
        [(name, *(f"{entry[k]:.3f}" for k in ("ratio", "min", "max"))) for name, entry in ratios.items()],
    )
