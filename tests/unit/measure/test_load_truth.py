"""What is measured of a stub server is what its script says: latencies, goodput, schedules, whatever goes wrong."""

from __future__ import annotations

import asyncio
import statistics

import pytest
from stub_server import DONE, Script, answer, event, stub_server, text_chunk, usage_chunk

from fewbit.errors import RequestError
from fewbit.measure.load import (
    Asking,
    Endpoint,
    Load,
    Result,
    Sample,
    client_of,
    measure,
    ratios,
    report,
    schedule,
    served_models,
)
from virtual_time import run_virtually

EXACT = pytest.approx


def loaded(script, load: Load, run=run_virtually, **options) -> tuple[Result, object]:
    """The result of a load on a stub, and the stub."""

    async def main():
        async with stub_server(script) as stub:
            asking = Asking("stub", options.pop("route", "completions"), timeout_s=options.pop("timeout_s", 600.0))
            endpoint = Endpoint(client_of(stub.url, options.pop("key", None)), asking)
            ((result,),) = await measure([endpoint], [load], [], **options)
            return result, stub

    return run(main())


def closed(count: int, limit: int = 1) -> Load:
    return Load([Sample(f"prompt {i}", 16, None) for i in range(count)], None, limit)


def test_latencies_are_those_of_the_script():
    gaps = [0.02, 0.05, 0.03, 0.1]
    result, _ = loaded(lambda n, body: Script(answer(0.3 + 0.1 * n, gaps, tail=0.5)), closed(3))
    made = report(result)
    assert made["completed"] == 3
    assert [f.ttft for _, f in result.good] == EXACT([0.3, 0.4, 0.5])
    assert made["mean_ttft_ms"] == EXACT(400)
    assert made["std_ttft_ms"] == EXACT(statistics.pstdev([300, 400, 500]))
    assert made["mean_tpot_ms"] == EXACT(50)
    assert made["mean_itl_ms"] == EXACT(50)
    assert made["median_itl_ms"] == EXACT(40)
    assert made["p99_itl_ms"] == EXACT(100)
    assert made["median_e2el_ms"] == EXACT(600)  # not the half second until the stream's end
    assert made["total_output_tokens"] == 15
    assert made["total_input_tokens"] == 21
    assert made["duration"] == EXACT(0.5 + 0.5 + 0.6 + 0.5 + 0.7)  # to the last content of the last answer
    assert made["output_throughput"] == EXACT(15 / 2.8)
    assert made["aiperf"]["inter_token_latency"]["avg"] == EXACT(50)
    assert made["aiperf"]["inter_chunk_latency"]["p50"] == EXACT(40)
    assert made["aiperf"]["time_to_second_token"]["avg"] == EXACT(20)
    assert made["aiperf"]["request_latency"]["max"] == EXACT(700)
    assert made["mean_schedule_lag_ms"] is None


def test_several_tokens_in_a_chunk_count_once_as_a_gap_and_all_in_tpot():
    result, _ = loaded(lambda n, body: Script(answer(0.1, [0.2, 0.2, 0.2], tokens=13)), closed(1))
    made = report(result)
    assert made["mean_itl_ms"] == EXACT(200)
    assert made["mean_tpot_ms"] == EXACT(600 / 12)
    assert made["tokens"]["chunks"] == 4


def test_an_empty_chunk_or_a_role_is_no_first_token():
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    words = [event({"choices": [{"delta": {"content": "w "}}]})] * 2
    ending = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    parts = [(0.1, role), (0.4, words[0]), (0.1, words[1]), (0.3, ending), (0.0, usage_chunk(5, 2)), (0.0, DONE)]
    result, stub = loaded(lambda n, body: Script(parts), closed(1), route="chat")
    made = report(result)
    assert made["mean_ttft_ms"] == EXACT(500)
    assert made["mean_first_chunk_ms"] == EXACT(100)  # what others take for it
    assert made["mean_itl_ms"] == EXACT(100)
    assert made["mean_e2el_ms"] == EXACT(600)
    path, _, body = stub.seen[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "prompt 0"}]
    assert body["max_completion_tokens"] == 16


def test_reasoning_and_tool_calls_are_content():
    first = event({"choices": [{"delta": {"reasoning": "hm"}}]})
    second = event({"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}]})
    ending = event({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    result, _ = loaded(
        lambda n, b: Script([(0.1, first), (0.1, second), (0, ending), (0, DONE)]), closed(1), route="chat"
    )
    assert result.records[0].text == "hmf{}"
    assert report(result)["mean_ttft_ms"] == EXACT(100)


def test_without_usage_tokens_are_counted_again_or_as_chunks():
    script = lambda n, body: Script([*answer(0.1, [0.1, 0.1])[:-2], (0.0, DONE)])  # noqa: E731
    result, _ = loaded(script, closed(1))
    assert report(result)["tokens"]["counted_by"] == {"chunks": 1}
    assert report(result)["total_output_tokens"] == 3
    result, _ = loaded(script, closed(1), count_tokens=lambda text: 2 * len(text.split()))
    assert report(result)["tokens"]["counted_by"] == {"tokenizer": 1}
    assert report(result)["total_output_tokens"] == 6


def test_a_server_that_counts_wrong_is_told_on():
    counts = [3, 4, 2]  # of three words; the second may be the token that ended the text
    script = lambda n, body: Script(  # noqa: E731
        [(0.1, text_chunk("w w w", None)), (0, text_chunk("", "stop")), (0, usage_chunk(9, counts[n])), (0, DONE)]
    )
    load = Load([Sample("p", 16, prompt_tokens=tokens) for tokens in (9, 9, 8)], None, 1)
    made = report(loaded(script, load, count_tokens=lambda text: len(text.split()))[0])
    assert made["tokens"]["output_mismatches"] == 1
    assert made["tokens"]["input_mismatches"] == 1
    assert made["tokens"]["retokenized_output_tokens"] == 9
    assert made["tokens"]["shorter_than_asked"] == 3


def test_goodput_counts_what_meets_every_objective():
    # requests 0..9: TTFT 100..1000 ms, TPOT 10..100 ms
    script = lambda n, body: Script(answer(0.1 * (n + 1), [0.01 * (n + 1)] * 4))  # noqa: E731
    made = report(loaded(script, closed(10), objectives={"ttft": 0.55, "tpot": 0.085})[0])
    assert made["goodput"]["good_requests"] == 5
    assert made["goodput"]["share_of_all"] == 0.5
    assert made["request_goodput"] == EXACT(5 / made["duration"])
    made = report(loaded(script, closed(10), objectives={"tpot": 0.085, "e2el": 2.0})[0])
    assert made["goodput"]["good_requests"] == 8


def test_an_open_loop_keeps_its_schedule_under_a_slow_server():
    """The server takes a second for each answer; ten a second come nevertheless, and none is later for it."""
    due = schedule(50, 10, seed=3)
    load = Load(closed(50).samples, due, None)
    result, stub = loaded(lambda n, body: Script(answer(1.0, [0.5])), load)
    begin = stub.times[0] - due[0]
    assert [moment - begin for moment in stub.times] == EXACT(due)
    made = report(result)
    assert made["p99_schedule_lag_ms"] == EXACT(0, abs=1e-6)
    assert made["median_ttft_from_schedule_ms"] == EXACT(1000)
    assert made["max_concurrent_requests"] > 10


def test_waiting_for_a_place_counts_from_the_schedule():
    """Four at once into two places of a second each: sent a second late, and that second is nobody's but the load's."""
    load = Load(closed(4).samples, [0.0] * 4, 2)
    result, _ = loaded(lambda n, body: Script(answer(0.5, [0.5])), load)
    made = report(result, detailed=True)
    assert made["max_concurrent_requests"] == 2
    assert made["mean_ttft_ms"] == EXACT(500)
    assert made["mean_ttft_from_schedule_ms"] == EXACT(1000)
    assert made["mean_schedule_lag_ms"] == EXACT(500)
    assert made["start_times"] == EXACT([0, 0, 1, 1])
    assert made["scheduled_times"] == EXACT([0, 0, 0, 0])


def test_a_closed_loop_runs_so_many_at_a_time():
    result, stub = loaded(lambda n, body: Script(answer(1.0, [])), closed(12, 4))
    assert report(result)["max_concurrent_requests"] == 4
    assert report(result)["duration"] == EXACT(3)
    assert stub.connections == 4  # kept open from request to request


FAILURES = {
    "HTTP 503: too many": Script([(0.1, b'{"error": {"message": "too many", "type": "x"}}')], status=503),
    "HTTP 500: oops": Script([(0.1, b"oops")], status=500),
    "HTTP 404: (an empty body)": Script([], status=404),
    "error in the stream: out of memory": Script(
        [(0.1, text_chunk("a")), (0.1, event({"error": {"message": "out of memory"}})), (0, DONE)]
    ),
    "the connection ended in the middle of the answer": Script([(0.1, text_chunk("a"))], cut=True),
    "the stream ended without a finish_reason and without [DONE]": Script([(0.1, text_chunk("a"))]),
    "the answer held no content": Script([(0.1, text_chunk("")), (0, DONE)]),
    "the answer held no content, though usage counts 4 tokens": Script(
        [(0.1, text_chunk("", "stop")), (0, usage_chunk(3, 4)), (0, DONE)]
    ),
    "not an OpenAI chunk": Script([(0.1, b"data: {]\n\n"), (0, DONE)]),
    "not an OpenAI chunk (maximum recursion": Script(
        [(0.1, b"data: " + b'{"error": ' + b"[" * 100_000 + b"\n\n"), (0, DONE)]
    ),
    "no complete answer within 2 s": Script(answer(0.1, [3.0])),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_a_failure_is_counted_with_its_reason_and_spoils_nothing_else(reason):
    script = lambda n, body: FAILURES[reason] if n == 1 else Script(answer(0.1, [0.1]))  # noqa: E731
    result, _ = loaded(script, closed(3), timeout_s=2.0)
    made = report(result, detailed=True)
    assert (made["completed"], made["failed"]) == (2, 1)
    assert made["failures"][0]["requests"] == 1
    assert made["failures"][0]["reason"].startswith(reason)
    assert made["mean_ttft_ms"] == EXACT(100)
    assert made["errors"][0] == made["errors"][2] == ""
    assert made["errors"][1].startswith(reason)
    assert made["ttfts"] == EXACT([0.1, 0, 0.1])
    assert made["output_lens"] == [2, 0, 2]


def test_a_missing_end_is_forgiven_but_told():
    parts = answer(0.1, [0.1])[:-1]
    made = report(loaded(lambda n, body: Script(parts), closed(1))[0])
    assert made["completed"] == 1
    assert made["tokens"]["without_done"] == 1


def test_comments_and_events_in_pieces_change_nothing():
    whole = b"".join(part for _, part in answer(0, [0, 0])) + b": ping\n\n"
    parts = [(0.1, b": ping\n\n"), *((0.01, whole[i : i + 1]) for i in range(len(whole)))]
    made = report(loaded(lambda n, body: Script(parts), closed(1))[0])
    assert made["total_output_tokens"] == 3
    # complete is the first event with the second of the newlines that end it
    assert made["mean_ttft_ms"] == EXACT(100 + 10 * (whole.index(b"\n\n") + 2))


def test_a_connection_that_the_server_ended_is_replaced_unnoticed():
    script = lambda n, body: Script(answer(0.1, [0.1]), headers={"connection": "close"} if n % 2 else {})  # noqa: E731
    result, stub = loaded(script, closed(6))
    assert not result.failures
    assert stub.connections == 3


def test_nobody_there():
    async def main():
        async with stub_server(lambda n, body: Script([])) as stub:
            url = stub.url
        with pytest.raises(
            RequestError, match=r"GET /v1/models: cannot connect to 127.0.0.1:\d+ .*is a server running"
        ):
            await served_models(client_of(url, None))
        ((result,),) = await measure([Endpoint(client_of(url, None), Asking("m"))], [closed(3)], [])
        return report(result)

    made = run_virtually(main())
    assert made["failed"] == 3
    assert made["mean_ttft_ms"] is None
    assert made["failures"][0]["reason"].startswith("cannot connect")


def test_what_a_server_is_sent():
    _, stub = loaded(lambda n, body: Script(answer(0.1, [])), Load([Sample((1, 2, 3), 5)], None, 1), key="sk-1")
    path, headers, body = stub.seen[0]
    assert path == "/v1/completions"
    assert headers["authorization"] == "Bearer sk-1"
    assert body == {
        "model": "stub", "prompt": [1, 2, 3], "max_tokens": 5, "stream": True, "temperature": 0.0,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_a_chat_template_is_nobody_s_mistake():
    """The server counts the template's tokens too; what was counted of the text alone is not held against it."""
    load = Load([Sample("p", 16, prompt_tokens=3)], None, 1)
    made = report(loaded(lambda n, body: Script(answer(0.1, [])), load, route="chat")[0])
    assert made["tokens"]["input_mismatches"] == 0
    assert made["total_input_tokens"] == 7
    made = report(loaded(lambda n, body: Script(answer(0.1, [])), load)[0])
    assert made["tokens"]["input_mismatches"] == 1


def test_two_servers_in_turns():
    """The second is slower by half; the order changes from round to round; warm-ups count for nothing."""
    order = []

    async def main():
        def script(name, factor):
            def one(n, body):
                order.append((name, body["prompt"]))
                return Script(answer(0.1 * factor, [0.02 * factor] * 5))

            return one

        async with stub_server(script("a", 1.0)) as a, stub_server(script("b", 1.5)) as b:
            both = [Endpoint(client_of(s.url, None), Asking("stub")) for s in (a, b)]
            loads = [Load([Sample(f"{r}-{i}") for i in range(3)], None, 1) for r in range(4)]
            return await measure(both, loads, [Sample("warm")])

    first, second = run_virtually(main())
    found = ratios(first, second)
    assert found["median_ttft_ms"]["ratio"] == EXACT(1.5)
    assert found["mean_tpot_ms"]["values"] == EXACT([1.5] * 4)
    assert found["output_throughput"]["ratio"] == EXACT(1 / 1.5)
    assert [name for name, prompt in order if prompt != "warm"] == [c for c in "abbaabba" for _ in range(3)]
    assert [prompt for name, prompt in order].count("warm") == 2
    for number, result in enumerate(first):
        assert [prompt for name, prompt in order if prompt.startswith(f"{number}-")][:3] == [
            s.prompt for s in result.samples
        ]


@pytest.mark.slow
def test_in_real_time():
    """The same by the real clock, 32 streams at a time. A busy machine adds to each delay, and takes from none."""
    gaps = [0.2] * 15
    load = Load(closed(64).samples, schedule(64, 32, seed=1), None)
    result, _ = loaded(
        lambda n, body: Script(answer(1.0, gaps)), load, run=asyncio.run, objectives={"ttft": 30, "e2el": 90}
    )
    made = report(result)
    for key, truth in (("ttft", 1000), ("tpot", 200), ("itl", 200), ("e2el", 4000)):
        assert 0.98 * truth < made[f"median_{key}_ms"] < 20 * truth, key
    assert made["goodput"]["good_requests"] == 64
    assert made["duration"] > 0.98 * (load.due[-1] + 4.0)
