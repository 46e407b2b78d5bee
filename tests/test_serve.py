"""`vdit serve`: requests and results over HTTP, the queue, and who may ask for what."""

import importlib.util
import io
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from test_export_weights import trained

import vdit
from experiments import base
from vdit import cli, main, serve
from vdit.errors import UserError
from vdit.serve import folder as folders
from vdit.serve import guard, pages, start, work
from vdit.serve.folder import Folder, new_id
from vdit.serve.http import application
from vdit.serve.queue import MOST, Full, Job, Queue, State
from vdit.serve.work import Studio

URL = "http://127.0.0.1:8000"
PROMPT = {"prompt": "a red ball falls", "steps": 2}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights."""
    config = base.get_config("smoke")
    config.data.frames, config.data.size = 9, (16, 16)
    path = tmp_path_factory.mktemp("served") / "work"
    trained(config, path, "vae", "dit")
    return path


@pytest.fixture(scope="module")
def studio(workdir: Path) -> Iterator[Studio]:
    folder = Folder(workdir / "served")
    model = vdit.load(workdir)
    yield Studio(model, lambda files: model, folder, name="work")
    folder.close()


@pytest.fixture(scope="module")
def queue(studio: Studio) -> Iterator[Queue]:
    queue = Queue(studio.work)
    yield queue
    queue.close()


@pytest.fixture(scope="module")
def client(studio: Studio, queue: Queue) -> TestClient:
    return TestClient(application(studio, queue, guard.LOCAL), base_url=URL)


def ended(client: TestClient, queue: Queue, name: str) -> dict[str, Any]:
    """The state of a request once it is over."""
    wait = threading.Event()
    while client.get(f"/api/jobs/{name}").json()["state"] in ("waiting", "running"):
        wait.wait(0.02)
    return client.get(f"/api/jobs/{name}").json()


def made(client: TestClient, queue: Queue, **asked: Any) -> list[dict[str, Any]]:
    """The results of a request."""
    answer = client.post("/api/jobs", json=PROMPT | asked)
    assert answer.status_code == 202, answer.text
    state = ended(client, queue, answer.json()["id"])
    assert (state["state"], state["error"]) == ("done", ""), state
    assert state["step"] == state["steps"] and state["previews"]
    return [client.get(f"/api/results/{name}").json() for name in state["results"]]


def errors(answer: Any, status: int = 422) -> dict[str, str]:
    """Fields and sentences of what was refused."""
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text
    return {one["field"]: one["message"] for one in answer.json()["errors"]}


def frames(client: TestClient, name: str) -> np.ndarray:
    """The pixels of a result, from its lossless WebP."""
    image: Any = Image.open(io.BytesIO(client.get(f"/results/{name}.webp").content))
    shown = []
    for index in range(image.n_frames):
        image.seek(index)
        shown.append(np.asarray(image.convert("RGB")))
    scale = len(shown[0]) // 16
    return np.stack(shown)[:, ::scale, ::scale]


def picture(colour: tuple[int, int, int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, kind)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# The page, requests and results


def test_the_page_has_what_the_model_takes(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert 'id="prompt"' in page.text and 'id="pick"' in page.text
    assert 'id="shot"' not in page.text  # it never saw a clip of several
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/page.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/style.css").headers["content-type"].startswith("text/css")
    takes = client.get("/api/model").json()
    assert (takes["frames"], takes["size"], takes["given"]) == (9, "16x16", "any")
    assert takes["shots"] is False and takes["oracle"] is True and takes["lora"] == []
    assert takes["example"]
    assert 'id="shot"' in pages.index(takes | {"shots": True})
    assert 'id="pick"' not in pages.index(takes | {"given": "none"})
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/api/model", "/api/jobs", "/api/jobs/{name}", "/api/uploads", "/api/results"} <= {
        *paths
    }


def test_results_are_those_of_generate_and_stay(
    client: TestClient, queue: Queue, studio: Studio
) -> None:
    asked = {"num": 2, "seed": 7, "guidance": 3.0, "negative": "a blue box"}
    results = made(client, queue, **asked)
    assert [result["settings"]["seed"] for result in results] == [7, 8]
    again: Any = studio.plain.generate(
        "a red ball falls", steps=2, watch=lambda done, x0: None, **asked
    )
    for result, other in zip(results, again, strict=True):
        settings = result["settings"]
        assert settings["prompt"] == PROMPT["prompt"] and settings["steps"] == 2
        assert settings["negative"] == "a blue box" and settings["reading"]
        assert set(result["files"]) == {"mp4", "gif", "webp", "json"}
        np.testing.assert_allclose(
            frames(client, result["id"]).astype(int), other.video.astype(int), atol=1
        )
        for suffix, begins in (("mp4", b"\0\0\0"), ("gif", b"GIF89a"), ("webp", b"RIFF")):
            answer = client.get(f"/results/{result['id']}.{suffix}?download=true")
            assert answer.content.startswith(begins)
            name = f"a-red-ball-falls-{settings['seed']}.{suffix}"
            assert name in answer.headers["content-disposition"]
            part = client.get(answer.url.path, headers={"range": "bytes=0-3"})
            assert part.status_code == 206 and len(part.content) == 4
    # Another server on the same folder shows them.
    with Queue(studio.work) as other_queue:
        client = TestClient(application(studio, other_queue, guard.LOCAL), base_url=URL)
        listed = [row["id"] for row in client.get("/api/results").json()]
        assert listed[:2] == [results[1]["id"], results[0]["id"]]
        assert client.get("/api/results?most=1").json()[0]["id"] == listed[0]
        assert client.get(f"/api/results?before={listed[0]}").json()[0]["id"] == listed[1]


WRONG = (
    ({"prompt": " "}, {"prompt": "a prompt is needed"}),
    ({"prompt": "aaa " * 300}, {"prompt": "tokens long; allowed: "}),
    ({"steps": 0}, {"steps": "sample.steps is 0: 1 to "}),
    ({"seconds": -1, "size": "16"}, {"seconds": "more than 0", "size": "HEIGHTxWIDTH"}),
    ({"seconds": 3600}, {"seconds": "at most 32 times as many pixels are allowed here"}),
    ({"size": "8000x8000"}, {"size": "at most 32 times as many pixels"}),
    ({"seed": -1}, {"seed": "seeds of 0 to 4294967295"}),
    ({"num": 99}, {"num": "less than or equal to 16"}),
    ({"guidance": 1, "negative": "x"}, {"negative": "negative with guidance 1"}),
    ({"shots": [{"start": 1, "caption": "x"}]}, {"shots": "the first one must start at 0"}),
    ({"given": [{"at": 0}]}, {"given": "those of an upload or of a result"}),
    ({"given": [{"upload": "../x", "at": 0}]}, {"given": "no such upload"}),
    ({"given": [{"result": new_id(), "at": 99}]}, {"given": "the clip lasts from 0 to 0.8 s"}),
    ({"lora": ["x"]}, {"lora": "there are no adapters 'x': known are none"}),
    ({"sed": 1}, {"sed": "Extra inputs"}),
    ({"prompt": 3}, {"prompt": "valid string"}),
)


@pytest.mark.parametrize("asked, said", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_wrong_is_said_beside_its_field(
    client: TestClient, asked: dict[str, Any], said: dict[str, str]
) -> None:
    found = errors(client.post("/api/jobs", json=PROMPT | asked))
    assert found.keys() == said.keys(), found
    for field, words in said.items():
        assert words in found[field] and "\n" not in found[field]


def test_what_is_no_request(client: TestClient) -> None:
    kind = {"content-type": "application/json"}
    for body in (b"", b"[1", b"[]", b'{"prompt": "\\ud800"}', b'{"seconds": NaN}', b"\xff\xfe"):
        found = errors(client.post("/api/jobs", content=body, headers=kind))
        assert all(field in ("body", "prompt", "seconds") for field in found), found
    assert errors(client.get("/api/jobs/x"), 404)
    assert errors(client.get("/api/results/x"), 404)
    assert errors(client.get("/nowhere"), 404) == {"": "Not Found"}
    assert errors(client.put("/api/jobs"), 405)


def test_frames_are_given_by_uploads_and_results(client: TestClient, queue: Queue) -> None:
    sent = client.post("/api/uploads", files={"file": ("../red.png", picture((200, 30, 40)))})
    assert sent.status_code == 201, sent.text
    red = sent.json()
    assert (red["name"], red["width"], red["height"], red["frames"]) == ("red.png", 16, 16, 1)
    assert client.get(f"/api/uploads/{red['id']}/picture").content.startswith(b"\x89PNG")
    given = [{"upload": red["id"], "at": 0.4}]
    (first,) = made(client, queue, given=given)
    video = frames(client, first["id"])
    np.testing.assert_array_equal(video[4], np.broadcast_to([200, 30, 40], (16, 16, 3)))
    assert first["settings"]["given"][0]["upload"] == red["id"]
    # Extension: the last frames of a result, by way of its MP4.
    (second,) = made(client, queue, given=[{"result": first["id"], "last": 5, "at": 0}], seed=3)
    further = frames(client, second["id"])
    assert np.abs(further[:5].astype(int) - video[-5:]).mean() < 12
    whole = client.post("/api/jobs", json=PROMPT | {"given": [{"result": first["id"], "at": 0}]})
    assert "fills the clip of 0.8 s" in errors(whole)["given"]


def test_bad_uploads_are_refused_and_leave_nothing(
    client: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sorted(studio.folder.uploads.iterdir())

    def sent(name: str, data: bytes) -> str:
        answer = client.post("/api/uploads", files={"file": (name, data)})
        (message,) = errors(answer).values()
        assert str(studio.folder.root) not in message and "\n" not in message
        return message

    assert sent("notes\n.txt", b"no picture at all").startswith("notes")
    sent("cut.png", picture((1, 2, 3))[:40])
    sent("empty.mp4", b"")
    assert errors(client.post("/api/uploads", data={"file": "x"}))
    assert errors(client.post("/api/uploads", content=b"x"))
    large = {"content-length": str(folders.UPLOAD * 2)}
    assert "are allowed" in errors(client.post("/api/uploads", headers=large), 413)["body"]
    assert sorted(studio.folder.uploads.iterdir()) == there
    monkeypatch.setattr(folders, "KEPT", 1)
    for _ in range(2):
        assert client.post("/api/uploads", files={"file": ("a.png", picture((1, 1, 1)))}).is_success
    assert len(list(studio.folder.uploads.iterdir())) == 3  # the file, its picture, its JSON


# --------------------------------------------------------------------------------------------------
# The queue


def held() -> tuple[Queue, threading.Event, threading.Event, list[Any]]:
    """A queue whose work waits at its second step; and what it has worked on."""
    begun, go, order = threading.Event(), threading.Event(), list[Any]()

    def steps(job: Job) -> None:
        order.append(job.request)
        job.at(1)
        begun.set()
        go.wait()
        job.at(2)
        job.results.append(f"result of {job.request}")

    return Queue(steps), begun, go, order


def test_each_waits_for_those_before_and_gets_its_own() -> None:
    queue, begun, go, order = held()
    with queue:
        jobs = [Job(name, total=2) for name in "abcd"]
        for job in jobs:
            queue.add(job)
        begun.wait()
        assert [queue.place(job) for job in jobs] == [0, 1, 2, 3]
        assert jobs[0].state == "running" and jobs[1].state == "waiting"
        queue.cancel(jobs[1])  # at once
        assert jobs[1].state == "cancelled" and [queue.place(job) for job in jobs] == [0, 0, 1, 2]
        go.set()
        wait = threading.Event()
        while queue.load():
            wait.wait(0.01)
        assert order == ["a", "c", "d"]
        assert [job.results for job in jobs] == [
            [f"result of {name}"] if name != "b" else [] for name in "abcd"
        ]
        assert [job.state for job in jobs] == ["done", "cancelled", "done", "done"]


def test_a_queue_is_as_long_as_it_may_be() -> None:
    queue, begun, go, _ = held()
    with queue:
        queue.add(Job("first"))
        begun.wait()
        for _ in range(MOST):
            queue.add(Job("next"))
        with pytest.raises(Full, match="try again later"):
            queue.add(Job("last"))
        go.set()


def test_what_fails_is_said_and_the_next_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(job: Job) -> None:
        if job.request is not None:
            raise job.request

    with Queue(fail) as queue:
        jobs = [
            Job(error)
            for error in (UserError("that is\nwrong"), KeyError("a bug"), MemoryError(), None)
        ]
        for job in jobs:
            queue.add(job)
        wait = threading.Event()
        while queue.load():
            wait.wait(0.01)
    assert [job.state for job in jobs] == [State.FAILED] * 3 + [State.DONE]
    assert jobs[0].error == "that is wrong" and "KeyError" in jobs[1].error
    assert jobs[2].error.startswith("the memory is full")
    assert "a bug" in capsys.readouterr().err


def test_a_request_that_runs_ends_within_a_step(
    client: TestClient, queue: Queue, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one behind it is worked on; neither leaves half a result."""
    reached, go = threading.Event(), threading.Event()
    shown = work.Preview.__call__

    def held(self: work.Preview, done: int, x0: Any) -> None:
        shown(self, done, x0)
        if self.job.total == 50 and done == 3:
            reached.set()
            go.wait()

    monkeypatch.setattr(work.Preview, "__call__", held)
    there = sorted(studio.folder.root.glob("*.*"))
    first = client.post("/api/jobs", json=PROMPT | {"steps": 50}).json()["id"]
    reached.wait()
    second = client.post("/api/jobs", json=PROMPT | {"seed": 99}).json()
    assert second["place"] == 1 and second["state"] == "waiting"
    assert client.get(f"/api/jobs/{first}/preview").headers["content-type"] == "image/webp"
    assert client.delete(f"/api/jobs/{first}").json()["state"] == "cancelled"
    go.set()
    (name,) = ended(client, queue, second["id"])["results"]
    assert client.get(f"/api/results/{name}").json()["settings"]["seed"] == 99
    state = client.get(f"/api/jobs/{first}").json()
    assert (state["state"], state["step"], state["results"]) == ("cancelled", 3, [])
    new = {path.stem for path in studio.folder.root.glob("*.*")} - {path.stem for path in there}
    assert new == {name}


def test_each_choice_of_adapters_is_a_model(studio: Studio, tmp_path: Path) -> None:
    model, loaded = studio.plain, list[Any]()

    def load(files: Any) -> Any:
        loaded.append(list(files))
        return model

    folder = Folder(tmp_path / "served")
    files = ["/some/where/a.safetensors", "/some/where/b.safetensors:0.5"]
    studio = Studio(model, load, folder, work.named(files), "another")
    assert [*studio.lora] == ["a.safetensors", "b.safetensors:0.5"]
    for names in ([], [*studio.lora], ["a.safetensors"], [*studio.lora]):
        studio.model(names)
    assert loaded == [[], files[:1]]  # two are kept
    with pytest.raises(UserError, match="two files of the name a.safetensors"):
        work.named([files[0], "/else/a.safetensors"])
    with Queue(studio.work) as queue:
        client = TestClient(application(studio, queue, guard.LOCAL), base_url=URL)
        page = client.get("/").text
        assert 'value="a.safetensors"' in page and "/some/where" not in page
        (result,) = made(client, queue, lora=["a.safetensors"])
        assert result["settings"]["lora"] == ["a.safetensors"]
        found = errors(client.post("/api/jobs", json=PROMPT | {"lora": [files[0]]}))
        assert "known are a.safetensors, b.safetensors:0.5" in found["lora"]
    folder.close()


# --------------------------------------------------------------------------------------------------
# Files outside of the folder, other sites' pages, tokens


def test_no_other_file_can_be_read(client: TestClient, studio: Studio, tmp_path: Path) -> None:
    root = studio.folder.root
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": 1}')
    (root / "secret.json").write_text('{"secret": 1}')  # in the folder, but of no result
    (root / "uploads.json").write_text('{"secret": 1}')
    link, linked = new_id(), new_id()
    for suffix in ("json", "mp4"):
        os.symlink(secret, root / f"{link}.{suffix}")
    os.symlink(secret, root / "uploads" / linked)
    (root / "uploads" / f"{linked}.json").write_text('{"name": "x"}')
    os.symlink(secret, root / "uploads" / f"{linked}.png")
    names = (
        "..", "../secret", "..%2fsecret", "%2e%2e/secret", "%2e%2e%2fsecret", "..%5csecret",
        "....//secret", "%252e%252e%252fsecret", str(secret)[:-5], f"%2f{str(secret)[1:-5]}",
        "secret", "uploads", link, f"{link}%00", f"{link}%0a", f"./{link}", f"{link}/", "",
        f"{new_id()}/../secret", f"..%c0%af{link}", f"{link}.mp4%00", "C:%5csecret",
    )  # fmt: skip
    for name in names:
        for path in (
            f"/results/{name}.json", f"/results/{name}.mp4", f"/results/{name}",
            f"/api/results/{name}", f"/api/uploads/{name}/picture", f"/api/jobs/{name}",
            f"/api/jobs/{name}/preview", f"/{name}", f"/page/{name}",
        ):  # fmt: skip
            answer = client.get(path)
            assert 'secret"' not in answer.text, path
            assert answer.status_code in (200, 404, 405), (path, answer.status_code)
            if answer.status_code == 200:  # an address that the client has shortened
                assert answer.url.path in ("/", "/api/results"), path
    for name in (*names, linked):
        part = {"given": [{"upload": name, "at": 0}]}
        assert "no such upload" in errors(client.post("/api/jobs", json=PROMPT | part))[
            "given"
        ] or (name == "")
    listed = [row["id"] for row in client.get("/api/results").json()]
    assert link not in listed


def test_names_of_uploads_write_nothing_elsewhere(
    client: TestClient, studio: Studio, tmp_path: Path
) -> None:
    outside = sorted(studio.folder.root.parent.iterdir())
    for name in ("../../x.png", str(tmp_path / "x.png"), "..\\x.png", "a\0b.png", "x" * 5000, "."):
        body = {"file": (name, picture((9, 9, 9)))}
        answer = client.post("/api/uploads", files=body)
        assert answer.status_code in (201, 400, 422), answer.text
        if answer.status_code == 201:
            assert len(answer.json()["name"]) <= 80
    assert sorted(studio.folder.root.parent.iterdir()) == outside
    assert not list(tmp_path.iterdir())
    assert all(folders.ID.match(path.name) for path in studio.folder.uploads.iterdir())


def test_a_folder_of_uploads_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "served").mkdir()
    os.symlink(tmp_path / "else", tmp_path / "served" / "uploads")
    with pytest.raises(UserError, match="is a link"):
        Folder(tmp_path / "served")


def test_other_names_and_other_sites_are_refused(client: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", ""):
        assert "this page is called" in errors(client.get("/", headers={"host": host}), 421)["host"]
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        assert client.get("/api/model", headers={"host": host}).status_code == 200
    for headers in (
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "https://127.0.0.1:8000"},
        {"origin": "http://127.0.0.1:9000"}, {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):  # fmt: skip
        for path in ("/api/jobs", "/api/uploads"):
            assert "origin" in errors(client.post(path, json=PROMPT, headers=headers), 403)
        assert "origin" in errors(client.delete("/api/jobs/x", headers=headers), 403)
    mine = {"origin": URL, "sec-fetch-site": "same-origin"}
    errors(client.post("/api/jobs", json={"prompt": ""}, headers=mine))
    form = {"content-type": "text/plain"}  # what a form of another site can send
    errors(client.post("/api/jobs", content=json.dumps(PROMPT), headers=form))
    answer = client.get("/api/model")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_bodies_have_a_length_that_is_allowed(client: TestClient) -> None:
    assert errors(client.post("/api/jobs", content=b" " * (guard.JSON_BYTES + 1)), 413)
    assert errors(client.post("/api/jobs", content=iter([b"{}"])), 411)
    assert errors(client.post("/api/jobs", headers={"content-length": "-1"}), 411)


def test_a_token_is_asked_for(studio: Studio, queue: Queue) -> None:
    app = application(studio, queue, None, "a-secret-token")

    def asked(path: str, **headers: str) -> int:
        return TestClient(app, base_url="http://10.0.0.7").get(path, headers=headers).status_code

    for path in ("/", "/api/model", "/page.js", "/openapi.json", f"/results/{new_id()}.mp4"):
        assert asked(path) == 401
        assert asked(path, authorization="Bearer another-token") == 401
        assert asked(path, cookie="vdit_token=") == 401
    assert asked("/api/model", authorization="Bearer a-secret-token") == 200
    assert asked("/api/model?token=a-secret-token") == 401  # at the page alone
    client = TestClient(app, base_url="http://10.0.0.7")
    assert client.get("/?token=a-wrong-token").status_code == 401
    page = client.get("/?token=a-secret-token", follow_redirects=False)
    assert page.status_code == 303 and page.headers["location"] == "/"
    assert "HttpOnly; SameSite=Strict" in page.headers["set-cookie"]
    assert client.get("/").status_code == 200  # by the cookie
    assert client.get("/api/model").status_code == 200


def test_a_token_is_chosen_where_others_reach_the_page() -> None:
    assert start.chosen_token("127.0.0.1", None) == start.chosen_token("::1", None) == ""
    assert start.chosen_token("localhost", None) == ""
    tokens = {start.chosen_token(host, None) for host in ("0.0.0.0", "::", "10.0.0.1", "a.example")}
    assert len(tokens) == 4 and min(map(len, tokens)) >= 32
    assert start.chosen_token("0.0.0.0", "my-own-token") == "my-own-token"
    for wrong in ("", "short", "a;b=c;d=e", "äöüäöüäöü", "a b c d e f g"):
        with pytest.raises(UserError, match="8 to 200 letters"):
            start.chosen_token("127.0.0.1", wrong)


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line of `vdit serve` with wrong flags."""

    def call(*flags: str) -> str:
        try:
            assert cli.main(["serve", *flags]) == 2
        finally:
            main.FLAGS.unparse_flags()
        err = capsys.readouterr().err
        assert err.startswith("vdit: ") and err.count("\n") == 1, err
        return err

    return call


def test_without_the_extra_it_says_how_to_install_it(
    command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        serve.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else there(name)
    )
    assert "needs uvicorn: pip install 'vdit[web]'" in command("--workdir=base")
    assert cli.main(["serve", "--help"]) == 0


def test_wrong_flags_are_one_line_and_nothing_is_written(
    command: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ("--workdir=base", f"--out={out}")
        port = taken.getsockname()[1]
        assert "in use" in command(*flags, f"--port={port}")
        assert "0 to 65535 is allowed" in command(*flags, "--port=65536")
        assert "cannot listen on --host=nowhere.invalid" in command(
            *flags, "--host=nowhere.invalid"
        )
        assert "8 to 200 letters" in command(*flags, "--token=x")
        assert "is no folder" in command("--workdir=bose", f"--out={out}", "--port=0")
        assert "give --workdir=DIR" in command()
        assert "not a flag of --mode=serve" in command(*flags, "--prompt=x")
    assert not out.exists()
