"""A run as Ray's dashboard and its Prometheus endpoint show it, seen with a real browser."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.metrics import RAY_PREFIX
from tests.integration.browser import Page, browser, why_not
from tests.integration.commands import Command, wait_until

ROOT = Path(__file__).resolve().parents[2]

RUN = "small llama 2:4"
"""name of the run's folder"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    reason = why_not()
    if reason is None and shutil.which("prometheus") is None:
        reason = "prometheus is not installed"
    if reason is not None:
        if os.environ.get("TWOFOUR_NEED_BROWSER") == "1":
            pytest.fail(f"the test of the dashboard cannot run: {reason}")
        pytest.skip(reason)
    with browser() as opened:
        yield opened


Series = dict[tuple[str, ...], float]


def scraped() -> dict[str, Series]:
    """What the endpoints say of our metrics: name -> values by their own labels, in their order."""
    found: dict[str, Series] = {}
    for text in answers():
        for name, labels, value in re.findall(r"(?m)^(\w*twofour_\w+)\{(.*)\} (\S+)$", text):
            of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            assert of["run"] == RUN
            own = tuple(of[key] for key in ("stage", "unit", "source", "rank") if key in of)
            assert own not in found.setdefault(name, {}), f"{name}{own} twice"
            found[name][own] = float(value)
    return {name.removeprefix(f"{RAY_PREFIX}twofour_"): series for name, series in found.items()}


def discovery() -> Path:
    """The file that the session's Ray writes for Prometheus."""
    import ray  # as the fixture that has started it

    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    return folder / "prom_metrics_service_discovery.json"


def answers() -> Iterator[str]:
    """What the endpoints of the session's Ray say, in Prometheus's format."""
    for target in json.loads(discovery().read_text())[0]["targets"]:
        # Two of its ports are fixed; where another Ray of this machine has them, they are silent.
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer,
        ):
            yield answer.read().decode()


def test_a_run_on_the_dashboard_and_on_the_metrics_endpoint(
    page: Page, environment: dict[str, str], small: list[str], tmp_path: Path
) -> None:
    words = [
        *small, "cluster.executor=ray", "cluster.kind=ray", f"run.dir={tmp_path / RUN}",
        "stages=[prune,distill]", "prune.baselines=[]", "prune.rotation_steps=2",
        "distill.num_tokens=4096000", "distill.checkpoint_every_steps=100000",
        "distill.heldout_every_steps=5", "distill.heldout_tokens=1024",
    ]  # fmt: skip
    wait_for_endpoints()
    command = Command("prune", *words, environment=environment, folder=tmp_path)
    try:
        wait_until(lambda: re.search(r"distill: [1-9]\d*/8000 steps", command.said()[0]), command)
        seen = watched(command)
        check_pages(page, command.said()[0])
        check_panels(command, tmp_path)
    finally:
        cancel = ("cancel", str(tmp_path / RUN))
        done = Command("manage", *cancel, environment=environment, folder=tmp_path).finished(120)
    assert done.returncode == 0, done.stderr
    assert command.wait(300) == os.EX_TEMPFAIL, command.said()[1]
    check_values(seen, tmp_path / RUN)
    wait_until_gone()


def wait_for_endpoints() -> None:
    """A Ray that has just been started has no metrics yet, and takes no job."""
    deadline_s = time.monotonic() + 300
    while not discovery().is_file() or not any("ray_node_mem" in text for text in answers()):
        assert time.monotonic() < deadline_s, "no metrics of the machine"
        time.sleep(0.5)


def check_pages(page: Page, said: str) -> None:
    """The name in the list of jobs, then the job's page: its log, stages, progress and workers."""
    found = re.search(
        r"dashboard: (http://127\.0\.0\.1:\d+)/#/jobs/(twofour-small-llama-2-4-\w+)", said
    )
    assert found, said
    url, job = found.groups()
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    page.open(f"{url}/#/jobs")
    page.wait_for("Authentication Token Required")
    page.type("input[type=password]", token)
    page.click("[role=dialog] button", "SUBMIT")
    page.wait_for(RUN)
    rows = page.ask("[...document.querySelectorAll('tr')].map(e => e.innerText)")
    (row,) = (row for row in rows if RUN in row)
    assert job in row and "RUNNING" in row
    page.open(f"{url}/#/jobs/{job}")
    page.wait(r"/distill: \d+\/8000 steps, loss/.test(document.body.innerText)")  # its log
    page.click("h4", "Task Table")
    lengthen(page, 10_000)
    for pattern in (r"\tprune \d+\/\d+\t", r"\tdistill 1\/1\t", r"\tdistill \d+\/8000\t"):
        page.wait(f"/{pattern}/.test(document.body.innerText)")
    assert "Board.drain" not in page.text
    page.open(f"{url}/#/actors")
    lengthen(page, 100)
    page.wait_for(f"progress of {RUN}")
    page.open(f"{url}/api/train/v2/runs/v1")  # Ray has no page for it
    page.wait_for(f'"name":"{RUN} distill"')


def lengthen(page: Page, num_lines: int) -> None:
    """Have a table show so many lines in place of ten; what is typed while it is drawn anew is
    lost."""
    fields = "[...document.querySelectorAll('input')]"
    for _ in range(30):
        if page.ask(f"{fields}.some(e => Number(e.value) === {num_lines})"):
            return
        if page.ask(
            f"(e => !!e && (e.focus(), e.select(), true))({fields}.find(e => e.value === '10'))"
        ):
            page.insert(str(num_lines))
        time.sleep(1)
    pytest.fail("the table stays short")


def check_panels(command: Command, folder: Path) -> None:
    """Every panel of the dashboard for Grafana has data in a Prometheus that reads this Ray."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "prometheus.yml"
    config.write_text(f"""
global: {{scrape_interval: 1s}}
scrape_configs: [{{job_name: ray, file_sd_configs: [{{files: [{discovery()}]}}]}}]
""")
    panels = json.loads((ROOT / "cluster" / "grafana" / "twofour.json").read_text())["panels"]
    asked = {target["expr"] for panel in panels for target in panel["targets"]}
    without = {expression for expression in asked if "_mfu_ratio" in expression}  # of no CPU
    assert without

    def found(expression: str) -> bool:
        query = urllib.parse.urlencode({"query": expression.replace("$run", ".*")})
        try:
            with urllib.request.urlopen(f"http://{place}/api/v1/query?{query}", timeout=30) as said:
                answer = json.load(said)
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it is starting
                return False
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        except OSError:
            return False
        return bool(answer["data"]["result"])

    process = subprocess.Popen(
        ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'prometheus'}",
         f"--web.listen-address={place}", "--log.level=error"]
    )  # fmt: skip
    try:
        left = asked - without

        def all_found() -> bool:
            left.difference_update([one for one in left if found(one)])
            return not left

        wait_until(all_found, command)
        assert not [one for one in without if found(one)]
    finally:
        process.terminate()
        process.wait(60)


def watched(command: Command) -> list[dict[str, Series]]:
    """What was scraped until four steps were seen."""
    seen: list[dict[str, Series]] = []

    def look() -> bool:
        time.sleep(0.5)
        seen.append(scraped())
        steps = {now["step"][("distill",)] for now in seen if "step" in now}
        return len(steps) >= 4 and "heldout_perplexity" in seen[-1]

    wait_until(look, command)
    return seen


def check_values(seen: list[dict[str, Series]], run_dir: Path) -> None:
    """Progress only grows; figures are those of the run's own record at that step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    record = {line["step"]: line for line in lines if "distill/kl" in line}
    heldout = {line["step"]: line for line in lines if "distill/heldout_ce/heldout" in line}
    assert record and heldout
    perplexities = [math.exp(line["distill/heldout_ce/heldout"]) for line in heldout.values()]
    last: dict[tuple[str, ...], float] = {}
    for now in seen:
        for own, share in now.get("stage_progress_ratio", {}).items():
            assert last.get(own, 0.0) <= share <= 1.0
            assert own[0] != "prune" or share == 1.0, "stays after the stage has ended"
            last[own] = share
        assert "mfu_ratio" not in now, "no peak is known of a CPU"
        for perplexity in now.get("heldout_perplexity", {}).values():
            assert any(perplexity == pytest.approx(one) for one in perplexities)
    assert set(last) == {
        ("prune", "steps"), ("prune", "blocks"), ("distill", "sources tokenised"),
        ("distill", "steps"),
    }  # fmt: skip
    names = {
        "kl_nats": "kl", "loss": "loss", "tokens_per_second": "tokens_per_s",
        "goodput_ratio": "goodput", "gradient_norm": "grad_norm",
    }  # fmt: skip
    of_step = {int(now["step"]["distill",]): now for now in seen if {"step", *names} <= set(now)}
    torn = [
        step
        for step, now in of_step.items()
        for name, key in names.items()
        if now[name]["distill",] != pytest.approx(record[step][f"distill/{key}"], rel=1e-6)
    ]
    # Ray may send on what it was told while it is being told of the next step.
    assert len(of_step) >= 3 and len(set(torn)) <= 1, torn
    for now in of_step.values():
        assert now["tokens_per_second"]["distill",] > 0
        assert 0 < now["goodput_ratio"]["distill",] < 1


def wait_until_gone() -> None:
    """Nothing of a run stays behind it."""
    deadline_s = time.monotonic() + 60
    while scraped():
        assert time.monotonic() < deadline_s, scraped()
        time.sleep(0.5)
