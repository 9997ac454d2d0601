"""What lies in deploy/ fits the server: metrics that the board queries, flags that are given, paths that are probed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fewbit.engine.types import Stats
from fewbit.serve.auth import OPEN_PATHS
from fewbit.serve.metrics import Metrics

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"


def served_flags() -> set[str]:
    section = re.search(
        r"## fewbit serve\n\n```text\n(.*?)```", (ROOT / "docs" / "cli.md").read_text("utf8"), re.DOTALL
    )
    return set(re.findall(r"(--[a-z-]+)", section[1]))


def seconds(words: list[str], flag: str) -> float:
    given = [w.partition("=")[2] or words[i + 1] for i, w in enumerate(words) if w.partition("=")[0] == flag]
    return float(given[0])


def test_every_metric_of_the_board_exists():
    metrics = Metrics()
    metrics.render({"storyteller": Stats(blocks=1)})
    there = set()
    for metric in metrics.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        there |= {metric.name + suffix for suffix in suffixes}
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    asked += [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    names = {name for text in asked for name in re.findall(r"fewbit:\w+", text)}
    assert len(names) > 15
    assert names <= there, names - there
    assert all("fewbit:" in text for text in asked)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_unit_gives_flags_that_exist_and_time_to_drain():
    unit = (DEPLOY / "fewbit.service").read_text()
    fields = dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"[A-Za-z]+=", line))
    words = shlex.split(fields["ExecStart"])
    assert words[1] == "serve"
    assert {w.partition("=")[0] for w in words if w.startswith("--")} <= served_flags()
    assert fields["KillMode"] == "mixed"  # else the engine is told to stop when the server is
    assert float(fields["TimeoutStopSec"]) > seconds(words, "--drain")
    assert fields["RuntimeDirectory"] in words[words.index("--control") + 1]


def test_the_manifest_gives_flags_that_exist_and_time_to_drain():
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][0] == "serve"
    assert {w.partition("=")[0] for w in container["args"][1:]} <= served_flags()
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > seconds(container["args"], "--drain") + pause
    probes = {container[kind]["httpGet"]["path"] for kind in ("livenessProbe", "readinessProbe")}
    assert probes == OPEN_PATHS - {"/"}  # what is asked without a key
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert (
        {p["containerPort"] for p in container["ports"]}
        == {p["port"] for p in service["spec"]["ports"]}
        == {8000, 8001}
    )
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize("pattern", [r"127\.0\.0\.1:8000(/[\w/]+)'", r"EXPOSE (\d+) 8001"])
def test_the_image_probes_what_needs_no_key(pattern):
    (found,) = re.findall(pattern, (DEPLOY / "Dockerfile").read_text())
    assert found in OPEN_PATHS | {"8000"}


def test_the_image_has_the_kernels_that_the_server_looks_for():
    last = (DEPLOY / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    steps = [
        last.index(text) for text in ("install -y --no-install-recommends gcc", "USER fewbit", "RUN fewbit doctor")
    ]
    assert steps == sorted(steps)  # as the user whose they must be
    assert "XDG_CACHE_HOME=/home/fewbit/.cache" in last[: steps[1]]
