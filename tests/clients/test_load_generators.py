"""aiperf and guidellm against a server: their own command lines complete, with no error and the tokens asked for."""

from __future__ import annotations

import json

import pytest
from client_server import run

pytestmark = pytest.mark.slow

REQUESTS, PROMPT, OUTPUT = 20, 64, 16


def test_aiperf(server, storyteller, program, tmp_path):
    run(
        [
            *(program("aiperf", "aiperf"), "profile", "-m", "storyteller", "--url", server.removeprefix("http://")),
            *("--endpoint-type", "chat", "--streaming", "--tokenizer", str(storyteller)),
            *("--synthetic-input-tokens-mean", str(PROMPT), "--output-tokens-mean", str(OUTPUT)),
            *("--concurrency", "4", "--request-count", str(REQUESTS), "--extra-inputs", "ignore_eos:true"),
            *("--artifact-dir", str(tmp_path / "out"), "--ui", "none"),
        ],
        tmp_path,
        HF_HUB_OFFLINE=None,  # with it aiperf takes a folder for a name on the Hub
        TRANSFORMERS_OFFLINE=None,
        HOME=str(tmp_path),
    )
    (file,) = (tmp_path / "out").rglob("profile_export_aiperf.json")
    report = json.loads(file.read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert "error_request_count" not in report or report["error_request_count"]["avg"] == 0
    assert report["output_sequence_length"]["avg"] == pytest.approx(OUTPUT, abs=1)


def test_guidellm(server, storyteller, program, tmp_path):
    run(
        [
            *(program("guidellm", "guidellm"), "run"),
            *("--backend", f"kind=openai_http,target={server},model=storyteller"),
            *("--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={storyteller}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
            *("--output", f"kind=json,path={tmp_path / 'out.json'}"),
        ],
        tmp_path,
        HOME=str(tmp_path),
    )
    report = json.loads((tmp_path / "out.json").read_text())
    (benchmark,) = report["benchmarks"]
    assert len(benchmark["requests"]["successful"]) == REQUESTS
    assert not benchmark["requests"]["errored"]
    assert {r["output_tokens"] for r in benchmark["requests"]["successful"]} == {OUTPUT}
