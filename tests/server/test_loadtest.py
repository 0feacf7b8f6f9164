"""The load generator against a small real HTTP server that answers in OpenAI's stream form."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from onebase.errors import InvalidInput
from onebase_server.loadtest.drive import Target, drive
from onebase_server.loadtest.report import percentiles, plot, summarize
from onebase_server.loadtest.workload import Workload, plan


class Answers(BaseHTTPRequestHandler):
    """Three content chunks and a usage chunk; the model `broken` answers 404."""

    protocol_version = "HTTP/1.0"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        broken = body["model"] == "broken"
        self.send_response(404 if broken else 200)
        self.end_headers()
        if broken:
            self.wfile.write(b'{"error": {"message": "no such model"}}')
            return
        chunks = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in ("a", " b", " c")]
        chunks.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})  # type: ignore[dict-item]
        for chunk in chunks:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_every_request_is_measured_and_counted(url: str) -> None:
    workload = Workload(models=("a", "b"), requests=6, concurrency=2)
    results, wall_s = asyncio.run(drive(Target(url), workload))
    record = summarize(results, wall_s, workload)
    assert record["completed"] == 6
    assert record["output_tokens_per_s"] == pytest.approx(18 / wall_s, rel=0.01)
    assert all(len(r.gaps_s) == 2 and r.ttft_s is not None for r in results)


def test_a_failed_request_is_counted_as_an_error_and_not_as_speed(url: str) -> None:
    workload = Workload(models=("a", "broken"), requests=4, concurrency=4)
    results, wall_s = asyncio.run(drive(Target(url), workload))
    record = summarize(results, wall_s, workload)
    assert (record["completed"], record["errors"]) == (2, 2)
    assert "404" in str(record["first_error"])


def test_the_same_workload_plans_the_same_requests() -> None:
    workload = Workload(models=("a", "b", "c"), requests=20, concurrency=None, rate=5.0, zipf=1.1, seed=3)
    assert list(plan(workload)) == list(plan(workload))
    arrivals = [request.at_s for request in plan(workload)]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] > 0


def test_zipf_makes_the_first_model_the_most_popular() -> None:
    workload = Workload(models=tuple(f"m{i}" for i in range(50)), requests=2000, concurrency=1, zipf=1.2)
    counts = Counter(request.model for request in plan(workload))
    assert counts["m0"] > 3 * counts["m9"] > 0


def test_a_shared_prefix_is_shared_by_all_prompts_and_the_rest_is_not() -> None:
    workload = Workload(models=("a",), requests=5, concurrency=1, prompt_tokens=20, shared_prefix_tokens=10)
    prompts = [request.prompt.split() for request in plan(workload)]
    assert len({tuple(p[:10]) for p in prompts}) == 1
    assert len({tuple(p[10:]) for p in prompts}) == 5


def test_contradicting_workloads_are_refused_by_field() -> None:
    with pytest.raises(InvalidInput) as both:
        Workload(models=("a",), concurrency=1, rate=1.0)
    with pytest.raises(InvalidInput) as long:
        Workload(models=("a",), prompt_tokens=5, shared_prefix_tokens=6)
    assert (both.value.param, long.value.param) == ("concurrency", "shared_prefix_tokens")


def test_percentiles_are_in_milliseconds() -> None:
    assert percentiles([0.001] * 99 + [0.1])["p50"] == 1.0
    assert percentiles([]) == {}


def test_the_plot_is_a_png(url: str, tmp_path: Path) -> None:
    results, _ = asyncio.run(drive(Target(url), Workload(models=("a",), requests=2, concurrency=1)))
    plot(results, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_answers_differ_in_length_by_the_spread_and_nothing_else_changes() -> None:
    even, spread = (
        list(plan(Workload(("a",), requests=200, concurrency=4, output_tokens=64, output_spread=each)))
        for each in (0.0, 0.5)
    )
    assert {request.output_tokens for request in even} == {64}
    lengths = [request.output_tokens for request in spread]
    assert min(lengths) in range(32, 40)
    assert max(lengths) in range(89, 97)
    assert len(set(lengths)) > 40
    assert [request.prompt for request in even] == [request.prompt for request in spread]
    with pytest.raises(InvalidInput, match="spread"):
        Workload(("a",), output_spread=1.0)
