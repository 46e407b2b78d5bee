"""The addresses: the page and its files, requests, uploads, results. OpenAPI: /openapi.json."""

import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, File, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as NotHere

import vdit
from vdit.errors import UserError
from vdit.serve import pages
from vdit.serve.folder import KINDS, UPLOAD
from vdit.serve.guard import Guard
from vdit.serve.queue import Full, Job, Queue
from vdit.serve.requests import Asked, Refused, Wrong, checked, takes
from vdit.serve.work import Studio, about
from vdit.show import slug

PAGE = 60  # results in an answer, at most
FORM = 2**12  # bytes of an upload's form around the file


class JobState(BaseModel):
    """How far a request is."""

    id: str
    state: str = Field(description="waiting, running, done, failed or cancelled")
    place: int = Field(description="requests before it, that which runs among them")
    step: int = Field(description="denoising steps that are done, of all its videos")
    steps: int
    seconds_left: float | None
    previews: int = Field(description="how many previews of x0 there have been")
    results: list[str] = Field(description="IDs of the videos that are done")
    error: str


class FieldError(BaseModel):
    """What is wrong, and with which field."""

    field: str
    message: str


class Errors(BaseModel):
    """The answer to what is refused."""

    errors: list[FieldError]


def application(
    studio: Studio, queue: Queue, hosts: frozenset[str] | None, token: str = ""
) -> Guard:
    """The program, as an ASGI application."""
    app = FastAPI(
        title="vdit", version=vdit.__version__, docs_url=None, redoc_url=None,
        description="Videos from text, shots and given frames. See docs/serve.md.",
    )  # fmt: skip
    said = {422: {"model": Errors, "description": "A field is wrong"}}
    for part in (page(studio), requests(studio, queue), files(studio)):
        app.include_router(part, responses=said)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(NotHere, _missing)
    return Guard(app, hosts, token, {"/api/uploads": UPLOAD + FORM})


def page(studio: Studio) -> APIRouter:
    """The page, its style and its script, and what the model takes."""
    router = APIRouter()
    model = takes(studio.plain) | about(studio)

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    def index() -> str:
        return pages.index(model)

    for name, kind in pages.FILES.items():
        text = pages.file(name)

        def answer(text: str = text, kind: str = kind) -> Response:
            return Response(text, media_type=kind, headers={"cache-control": "no-cache"})

        router.add_api_route(f"/{name}", _plain(answer), include_in_schema=False)

    @router.get("/api/model", summary="What the model takes")
    def model_takes() -> dict[str, Any]:
        return model

    return router


def _plain(answer: Callable[..., Response]) -> Callable[[], Response]:
    """A function whose defaults are no parameters of the address."""
    return lambda: answer()


def requests(studio: Studio, queue: Queue) -> APIRouter:
    """Requests for videos."""
    router = APIRouter(prefix="/api/jobs")

    def state(job: Job) -> JobState:
        return JobState(
            id=job.id, state=job.state, place=queue.place(job), step=job.step, steps=job.total,
            seconds_left=job.left(), previews=job.previews, results=list(job.results),
            error=job.error,
        )  # fmt: skip

    def known(name: str) -> Job:
        if (job := queue.get(name)) is None:
            raise HTTPException(404, "there is no such request (any more)")
        return job

    @router.post("", status_code=202, summary="Ask for videos")
    def ask(asked: Asked) -> JobState:
        request = checked(studio.plain, studio.folder, asked, list(studio.lora))
        steps = asked.steps or studio.plain.config.sample.steps
        job = Job(request, total=steps * asked.num)
        queue.add(job)
        return state(job)

    @router.get("/{name}", summary="How far a request is")
    def look(name: str) -> JobState:
        return state(known(name))

    @router.delete("/{name}", summary="Cancel a request")
    def cancel(name: str) -> JobState:
        queue.cancel(job := known(name))
        return state(job)

    @router.get("/{name}/preview", summary="x0 so far, an animated WebP", response_class=Response)
    def preview(name: str) -> Response:
        if not (job := known(name)).preview:
            raise HTTPException(404, "there is no preview yet")
        headers = {"cache-control": "no-store"}
        return Response(job.preview, media_type="image/webp", headers=headers)

    return router


def files(studio: Studio) -> APIRouter:
    """Uploads and results."""
    router, folder = APIRouter(), studio.folder

    @router.post("/api/uploads", status_code=201, summary="Send an image or a clip")
    def upload(file: Annotated[UploadFile, File()]) -> dict[str, Any]:
        try:
            name = Path((file.filename or "upload").replace("\\", "/")).name or "upload"
            return folder.add_upload(name, lambda to: shutil.copyfileobj(file.file, to))
        except UserError as error:
            raise Refused([Wrong("file", " ".join(str(error).split()))]) from error

    @router.get("/api/uploads/{name}/picture", response_class=FileResponse)
    def picture(name: str) -> FileResponse:
        if (path := folder.picture(name)) is None:
            raise HTTPException(404, "there is no such upload (any more)")
        return FileResponse(path, media_type="image/png")

    @router.get("/api/results", summary="The newest results, or those before one")
    def listed(
        before: Annotated[str, Query(description="an ID")] = "",
        most: Annotated[int, Query(ge=1, le=PAGE)] = PAGE,
    ) -> list[dict[str, Any]]:
        return list(folder.results(most, before))

    @router.get("/api/results/{name}", summary="A result: its settings and its files")
    def one(name: str) -> dict[str, Any]:
        if (found := folder.result(name)) is None:
            raise HTTPException(404, "there is no such result")
        return found

    @router.get("/results/{name}.{suffix}", response_class=FileResponse, summary="A file")
    def file(name: str, suffix: str, download: bool = False) -> FileResponse:
        path, found = folder.file(name, suffix), folder.result(name)
        if path is None or found is None:
            raise HTTPException(404, "there is no such file")
        settings = found["settings"]
        title = f"{slug(str(settings.get('prompt', '')))}-{settings.get('seed', 0)}.{suffix}"
        shown = title if download else None
        return FileResponse(path, media_type=KINDS[suffix], filename=shown)

    return router


def _errors(status: int, wrong: list[Wrong]) -> JSONResponse:
    return JSONResponse({"errors": [one._asdict() for one in wrong]}, status)


def _invalid(request: Request, error: Any) -> JSONResponse:
    """What pydantic refuses, in the same form as the rest."""
    wrong = []
    for one in error.errors():
        place = () if one["type"] == "json_invalid" else one["loc"][1:]
        wrong.append(Wrong(".".join(map(str, place)) or "body", _sentence(one["msg"])))
    return _errors(422, wrong)


def _sentence(text: str) -> str:
    """Printable, on one line, and short."""
    plain = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return re.sub(r"\s+", " ", plain)[:300]


def _refused(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, Refused):
        return _errors(422, error.wrong)
    status = 503 if isinstance(error, Full) else 422
    return _errors(status, [Wrong("", " ".join(str(error).split()))])


def _missing(request: Request, error: Any) -> JSONResponse:
    return _errors(error.status_code, [Wrong("", str(error.detail))])
