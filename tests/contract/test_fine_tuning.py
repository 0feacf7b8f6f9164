"""The fine-tuning loop as OpenAI's users write it, with the official `openai` package, over a scripted trainer."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from pydantic import BaseModel

import fake_trainer
from api_world import BASE
from live_server import Live, live_server
from onebase_server.jobs.process import RunCommand

LINE = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}
GOOD = (json.dumps(LINE) + "\n").encode() * 10


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan") / "plan.json"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, plan: Path) -> Iterator[Live]:
    plan.write_text("{}")
    trainer = RunCommand(program=(sys.executable, fake_trainer.__file__, str(plan)))
    with live_server(tmp_path_factory.mktemp("fine-tuning"), trainer=trainer) as live:
        yield live


@pytest.fixture
def client(live: Live, plan: Path) -> Iterator[OpenAI]:
    plan.write_text("{}")
    plan.with_name("go").unlink(missing_ok=True)
    live.says = "Hello there."
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=None)


def upload(client: OpenAI, data: bytes = GOOD) -> str:
    return client.files.create(file=("train.jsonl", data), purpose="fine-tune").id


def wait_for_end(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    while job.status not in ("succeeded", "failed", "cancelled"):
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def test_files_come_back_as_they_went(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "my data.jsonl"
    path.write_bytes(GOOD)
    file = client.files.create(file=path, purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose, file.object) == ("my data.jsonl", len(GOOD), "fine-tune", "file")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read() == GOOD
    assert file.id in [each.id for each in client.files.list(purpose="fine-tune")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_large_file_is_streamed_and_pages_are_walked(client: OpenAI) -> None:
    data = GOOD * 3000  # past several chunks of the body
    ids = [upload(client, data), upload(client), upload(client)]
    assert client.files.content(ids[0]).read() == data
    assert [each.id for each in client.files.list(limit=1, order="asc") if each.id in ids] == ids
    expiring = client.files.create(
        file=("x.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert expiring.expires_at == expiring.created_at + 3600


@pytest.mark.parametrize(
    ("file", "fields", "param"),
    [
        (("a.jsonl", b"nope"), {"purpose": "fine-tune"}, "file"),
        (("a.txt", GOOD), {"purpose": "fine-tune"}, "file"),
        (("a.jsonl", GOOD), {"purpose": "fun"}, "purpose"),
        (("a.jsonl", GOOD), {}, "purpose"),
        (None, {"purpose": "fine-tune"}, "file"),
        (("a.jsonl", GOOD), {"purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        (
            ("a.jsonl", GOOD),
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            "expires_after[seconds]",
        ),
    ],
)
def test_a_bad_upload_is_400_and_leaves_nothing(live: Live, file: Any, fields: dict[str, str], param: str) -> None:
    files = {"file": file} if file else {"other": ("x", b"x")}
    before = sorted(live.settings.home.files.iterdir())
    reply = httpx.post(f"{live.url}/v1/files", files=files, data=fields, timeout=None)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert sorted(live.settings.home.files.iterdir()) == before


@pytest.mark.slow
def test_from_a_file_to_a_chat_with_the_new_model(client: OpenAI, plan: Path) -> None:
    plan.write_text('{"steps": 4, "every": 2}')
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client),
        suffix="pirate",
        seed=7,
        metadata={"team": "blue"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    )
    assert (job.object, job.status, job.seed, job.metadata) == (
        "fine_tuning.job",
        "validating_files",
        7,
        {"team": "blue"},
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    job = wait_for_end(client, job)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.fine_tuned_model == f"ft:{BASE}:onebase:pirate:{job.id[-8:]}"
    assert (job.hyperparameters.batch_size, job.trained_tokens) == (4, 1000)
    assert job.finished_at is not None

    answer = client.chat.completions.create(model=job.fine_tuned_model, messages=[{"role": "user", "content": "Hi"}])
    assert answer.model == job.fine_tuned_model
    assert (answer.choices[0].message.content or "").endswith("says: Hello there.")
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    metrics = [event.data for event in events if event.type == "metrics"]
    assert len(metrics) == 4
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [point.step_number for point in checkpoints] == [4, 2]
    assert checkpoints[0].metrics.train_loss == 0.5
    for point in checkpoints:
        client.chat.completions.create(
            model=point.fine_tuned_model_checkpoint, messages=[{"role": "user", "content": "Hi"}]
        )
    client.models.delete(checkpoints[0].fine_tuned_model_checkpoint)
    assert [point.step_number for point in client.fine_tuning.jobs.checkpoints.list(job.id)] == [2]
    table = client.files.content(job.result_files[0]).text
    assert table.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,2.00000")
    assert job.id in [each.id for each in client.fine_tuning.jobs.list(extra_query={"metadata[team]": "blue"})]
    assert job.id not in [each.id for each in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})]

    again = client.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=upload(client))
    assert wait_for_end(client, again).status == "succeeded"


@pytest.mark.slow
def test_every_documented_field_is_there_null_where_it_does_not_apply(client: OpenAI, live: Live, plan: Path) -> None:
    """Against the official package's own types, strictly, before a job has ended and after, failed jobs too."""
    plan.write_text('{"steps": 4, "every": 2, "holds": 0}')
    made = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client), validation_file=upload(client))
    broken = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, GOOD.splitlines(True)[0]))
    jobs = [get(f"{live.url}/v1/fine_tuning/jobs/{made.id}").json()]
    plan.with_name("go").touch()
    done, failed = wait_for_end(client, made), wait_for_end(client, broken)
    jobs += [get(f"{live.url}/v1/fine_tuning/jobs/{job.id}").json() for job in (done, failed)]
    for job in jobs:
        fits(FineTuningJob, job)
        assert (job["organization_id"], job["integrations"], job["metadata"]) == ("org-onebase", [], None)
        assert (job["error"] is None) == (job["status"] != "failed")
        assert (job["fine_tuned_model"] is None) == (job["status"] != "succeeded")
        assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": job["hyperparameters"]}}
    assert jobs[0]["estimated_finish"] is None
    page = get(f"{live.url}/v1/fine_tuning/jobs/{done.id}/events?limit=100").json()
    assert (page["object"], page["has_more"]) == ("list", False)
    for event in page["data"]:
        fits(FineTuningJobEvent, event)
    page = get(f"{live.url}/v1/fine_tuning/jobs/{done.id}/checkpoints").json()
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    for checkpoint in page["data"]:
        fits(FineTuningJobCheckpoint, checkpoint)
    page = get(f"{live.url}/v1/files").json()
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    assert {file["purpose"] for file in page["data"]} >= {"fine-tune", "fine-tune-results"}
    for file in page["data"]:
        fits(FileObject, file)


def fits(model: type[BaseModel], value: dict[str, Any]) -> None:
    """Every field is there, and each is of its type to the letter. (The checkpoint's own metrics may be left out.)"""
    assert set(model.model_fields) <= set(value), f"{model.__name__} lacks {set(model.model_fields) - set(value)}"
    model.model_validate_json(json.dumps(value), strict=True)


def test_lists_page_by_the_last_id_and_bound_their_limits(client: OpenAI, live: Live) -> None:
    one = upload(client, GOOD.splitlines(keepends=True)[0])  # fails at once: no process is started
    ids = [wait_for_end(client, client.fine_tuning.jobs.create(model=BASE, training_file=one)).id for _ in range(3)]
    walked = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert [job for job in walked if job in ids] == ids[::-1]
    assert len(walked) == len(set(walked))
    events = list(client.fine_tuning.jobs.list_events(ids[0], limit=1))
    assert [event.message.partition(":")[0] for event in events] == [
        "The job failed",
        "Validating training file",
        "Created fine-tuning job",
    ]
    first = client.fine_tuning.jobs.list_events(ids[0], limit=2)
    assert (first.has_more, len(first.data)) == (True, 2)
    jobs = f"{live.url}/v1/fine_tuning/jobs"
    wrong = [
        (f"{jobs}?limit=0", "limit"),
        (f"{jobs}?limit=x", "limit"),
        (f"{jobs}?after=ftjob-none", "after"),
        (f"{jobs}?metadata=all", "metadata"),
        (f"{jobs}/{ids[0]}/events?after={client.fine_tuning.jobs.list_events(ids[1]).data[0].id}", "after"),
        (f"{jobs}/{ids[0]}/checkpoints?after=ftckpt_none", "after"),
        (f"{live.url}/v1/files?limit=10001", "limit"),
        (f"{live.url}/v1/files?order=up", "order"),
    ]
    for url, param in wrong:
        reply = get(url)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), f"{url} {reply.text}"


def test_integrations_are_taken_told_and_not_used(client: OpenAI) -> None:
    file_id = upload(client, GOOD.splitlines(keepends=True)[0])
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file_id,
        integrations=[{"type": "wandb", "wandb": {"project": "mine", "tags": ["a"]}}],
    )
    assert wait_for_end(client, job).integrations == []
    told = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert [event.message for event in told if event.level == "warn"] == [
        "Integrations are not offered here and were ignored"
    ]


def test_a_file_of_another_purpose_can_not_be_trained_on(client: OpenAI) -> None:
    other = client.files.create(file=("train.jsonl", GOOD), purpose="user_data").id
    wrong: list[dict[str, Any]] = [
        {"training_file": other},
        {"training_file": upload(client), "validation_file": other},
    ]
    for fields in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.create(model=BASE, **fields)
        assert (caught.value.param, caught.value.code) == (list(fields)[-1], "invalid_file_purpose")


@pytest.mark.slow
def test_events_stream_until_the_job_ends(client: OpenAI, live: Live) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client))
    url = f"{live.url}/v1/fine_tuning/jobs/{job.id}/events"
    with httpx.stream("GET", url, params={"stream": "true"}, timeout=None) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    messages = [json.loads(line.removeprefix("data: "))["message"] for line in lines[:-1]]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-1] == "The job has successfully completed"


@pytest.mark.slow
def test_a_job_can_be_paused_resumed_and_cancelled(client: OpenAI, plan: Path) -> None:
    plan.write_text('{"holds": 1}')
    job = client.fine_tuning.jobs.create(model=BASE, training_file=upload(client))
    while job.status != "running":
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.cancel(job.id)
    assert caught.value.code == "invalid_job_state"


def test_a_bad_training_file_fails_the_job_in_openais_words(client: OpenAI) -> None:
    file_id = upload(client, GOOD.splitlines(keepends=True)[0])
    job = wait_for_end(client, client.fine_tuning.jobs.create(model=BASE, training_file=file_id))
    assert job.error is not None
    assert (job.status, job.error.code, job.error.param) == ("failed", "invalid_n_examples", "training_file")


@pytest.mark.slow
def test_old_scripts_with_top_level_hyperparameters_run(client: OpenAI) -> None:
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client),
        hyperparameters={"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5},
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (3, 0.5)
    assert wait_for_end(client, job).status == "succeeded"


SUPERVISED = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"model": "nothing"}, None, 404),
        ({"training_file": "file-none"}, "training_file", 400),
        ({"validation_file": "file-none"}, "validation_file", 400),
        ({"suffix": ""}, "suffix", 400),
        ({"suffix": "x" * 65}, "suffix", 400),
        ({"suffix": "a\0b"}, "suffix", 400),
        ({"seed": -1}, "seed", 400),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", 400),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", 400),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size", 400),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier", 400),
        ({"hyperparameters": {"n_epochs": 3}, "method": SUPERVISED}, "hyperparameters.n_epochs", 400),
        ({"method": {"type": "dpo"}}, "method.type", 400),
        ({"method": {"type": "reinforcement"}}, "method.type", 400),
        ({"metadata": {"k" * 65: "v"}}, None, 400),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", 400),
        ({"metadata": {"k": 1}}, "metadata.k", 400),
        ({"integrations": [{"type": "mlflow"}]}, "integrations[0].type", 400),
        ({"integrations": [{"type": "wandb"}]}, "integrations[0].wandb", 400),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}] * 6}, "integrations", 400),
        ({"method": {"type": "magic"}}, "method.type", 400),
        ({"method": {"supervised": {}}}, "method.type", 400),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 51}}}},
            "method.supervised.hyperparameters.n_epochs",
            400,
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}},
            "method.supervised.hyperparameters.beta",
            400,
        ),
        ({"seed": 2**31}, "seed", 400),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", 400),
        ({"epochs": 3}, "epochs", 400),
    ],
    ids=str,
)
def test_a_wrong_order_is_refused_by_field(
    client: OpenAI, fields: dict[str, Any], param: str | None, status: int
) -> None:
    body = {"model": BASE, "training_file": "file-none", **fields}
    if "training_file" not in fields:
        body["training_file"] = upload(client)
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/fine_tuning/jobs", body=body, cast_to=object)
    assert caught.value.status_code == status
    assert param is None or caught.value.param == param


def test_an_unknown_job_is_404_on_every_path(client: OpenAI) -> None:
    jobs = client.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as caught:
            call("ftjob-none")
        assert caught.value.code == "fine_tune_not_found"


def test_an_idempotency_key_makes_one_job(client: OpenAI) -> None:
    file_id, headers = upload(client), {"Idempotency-Key": "once"}
    jobs = [
        client.fine_tuning.jobs.create(model=BASE, training_file=file_id, extra_headers=headers).id for _ in range(3)
    ]
    assert len(set(jobs)) == 1
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.create(model=BASE, training_file=file_id, seed=9, extra_headers=headers)
