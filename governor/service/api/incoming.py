"""Turn an HTTP body into an iterator of requests: uploads that stream to the disk, forms, CSV, JSON.

An upload is written to a file of its own as it comes, at most a piece of it in memory, and hashed on the way: only a
complete upload is parsed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeVar, cast

import anyio.to_thread
from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from governor.model.errors import BadInput, quoted
from governor.service.api.bodies import BatchRun
from governor.service.api.templates import RENDERED_MOST
from governor.service.errors import INVALID_REQUEST, UNSUPPORTED_MEDIA, ApiError
from governor.service.store.store import Key

Model = TypeVar("Model", bound=BaseModel)
IN_MEMORY = 2**20
KEY_PATTERN = re.compile(r"[\x21-\x7e]{1,200}")
KEY_HEADER = "idempotency-key"
FORM, _JSON = "multipart/form-data", "application/json"
# The fields of a form besides its file; each is a JSON value.
_FIELDS = ("runs", "deadline_s", "finalize", "settings", "name", "via", "finish_by")
# A field may be as long as a prompt; by default the module takes an eighth of that.
csv.field_size_limit(RENDERED_MOST)


@dataclass(slots=True)
class Upload:
    """A complete body. `sha256` of its bytes; close the file."""

    file: IO[bytes]
    sha256: str


async def spooled(request: Request) -> Upload:
    """Return the body, on the disk if it is long. Raise BadInput for an empty one."""
    file = cast(IO[bytes], tempfile.SpooledTemporaryFile(IN_MEMORY))  # noqa: SIM115  (who gets it closes it)
    hashed = hashlib.sha256()
    size = 0
    try:
        async for part in request.stream():
            hashed.update(part)
            size += len(part)
            if size <= IN_MEMORY:
                file.write(part)
            else:
                await anyio.to_thread.run_sync(file.write, part)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return Upload(file, hashed.hexdigest())


def key_of(request: Request, who: str, fingerprint: str) -> Key | None:
    """Return the request's Idempotency-Key, if it has one. Raise `ApiError` for a key that cannot be kept."""
    key = request.headers.get(KEY_HEADER)
    if key is None:
        return None
    if not KEY_PATTERN.fullmatch(key):
        text = "header Idempotency-Key: 1 to 200 visible ASCII characters"
        raise ApiError(422, INVALID_REQUEST, text)
    return Key(f"{who} {request.method} {request.url.path}"[:255], key, fingerprint)


def fingerprint_of(*parts: object) -> str:
    """Return a hash of a request's content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


async def takes_json(request: Request) -> None:
    """Raise `ApiError` 415 for a body that is declared as anything but JSON."""
    kind = _kind(request)
    if not _is_json(kind):
        raise ApiError(415, UNSUPPORTED_MEDIA, f"content type {kind[:100]!r}: send application/json")


async def takes_lines(request: Request) -> None:
    """Check a route whose body is lines: raise `ApiError` 415 for a form, and for compressed content."""
    if _kind(request) == FORM:
        text = "send the lines themselves as the body, not a form: curl --data-binary @FILE"
        raise ApiError(415, UNSUPPORTED_MEDIA, f"content type {FORM!r}: {text}")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, UNSUPPORTED_MEDIA, f"content encoding {coding[:100]!r}: send the lines as they are")


def _kind(request: Request) -> str:
    """Return the content type; JSON if none is stated."""
    return request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()


def _is_json(kind: str) -> bool:
    return kind == _JSON or kind.endswith("+json")


async def knows_its_query(request: Request) -> None:
    """Check a post's query: raise `ApiError` 422 for an unknown parameter, since it was meant to count."""
    if request.method == "GET" or not request.query_params:
        return
    known = [each.alias for each in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "there is none here"
            raise ApiError(422, INVALID_REQUEST, f"there is no query parameter {name[:100]!r}: {there}")


QUERY = [Depends(knows_its_query)]
# The models of bodies, which OpenAPI has to be told of.
MODELS: dict[str, type[BaseModel]] = {"BatchRun": BatchRun}


def json_body(model: type[Model]) -> Any:
    """Return the dependency of a route with a JSON body of this model, parsed in a thread: it may be large."""
    MODELS[model.__name__] = model

    async def read(request: Request) -> Model:
        await takes_json(request)
        content = await request.body()
        return await anyio.to_thread.run_sync(lambda: _validated(content, model))

    return Depends(read)


def described(model: type[BaseModel]) -> dict[str, Any]:
    """Return OpenAPI's description of such a body."""
    schema = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    return {"requestBody": {"required": True, "content": {_JSON: schema}}}


# ---------------------------------------------------------------- batch-run


@dataclass(slots=True)
class RunBody:
    """The body of a batch-run: its inputs, to be read as often as needed, and the rest. Close it."""

    body: BatchRun
    file: IO[bytes] | None
    is_csv: bool
    fingerprint: str

    def inputs(self) -> Iterator[Mapping[str, Any]]:
        """Yield one mapping of fields for each input. Blocks. Raise BadInput for an invalid file."""
        if self.file is None:
            return iter(self.body.inputs)
        self.file.seek(0)
        return _csv_rows(self.file) if self.is_csv else _json_rows(self.file)

    def close(self) -> None:
        """Release the file."""
        if self.file is not None:
            self.file.close()


async def run_body(request: Request) -> RunBody:
    """Return the body of a batch-run or a preflight: JSON, or a form with a file of inputs."""
    kind = _kind(request)
    if kind == FORM:
        return await _form(request)
    if not _is_json(kind):
        raise ApiError(415, UNSUPPORTED_MEDIA, f"content type {kind[:100]!r}: send application/json or {FORM}")
    content = await request.body()
    body = await anyio.to_thread.run_sync(lambda: _validated(content, BatchRun))
    return RunBody(body, None, False, hashlib.sha256(content).hexdigest())


def _validated(content: bytes, model: type[Model]) -> Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise RequestValidationError(
            [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False, include_input=False)]
        ) from None


async def _form(request: Request) -> RunBody:
    form = await request.form(max_files=1, max_fields=len(_FIELDS), max_part_size=IN_MEMORY)
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        await form.close()
        raise ApiError(422, INVALID_REQUEST, "the form has no file: send it as the part `file`, JSONL or CSV")
    given: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name == "file":
            continue
        if name not in _FIELDS or not isinstance(value, str):
            await form.close()
            raise ApiError(422, INVALID_REQUEST, f"the form has a part that is not one of file, {', '.join(_FIELDS)}")
        try:
            given[name] = json.loads(value)
        except (ValueError, RecursionError):
            await form.close()
            raise ApiError(422, INVALID_REQUEST, f"{name} is not a JSON value") from None
    try:
        # The inputs are checked as they are read.
        body = _validated(json.dumps(given | {"inputs": [{}]}).encode(), BatchRun)
    except BaseException:
        await form.close()
        raise
    name = (upload.filename or "").lower()
    is_csv = name.endswith(".csv") or upload.content_type == "text/csv"
    sha256 = await anyio.to_thread.run_sync(lambda: hashlib.file_digest(upload.file, "sha256").hexdigest())  # type: ignore[arg-type]
    return RunBody(body, cast(IO[bytes], upload.file), is_csv, fingerprint_of(sha256, given))


def _json_rows(file: IO[bytes]) -> Iterator[Mapping[str, Any]]:
    found = 0
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise BadInput("not JSON", "file", number) from None
        if not isinstance(row, dict):
            raise BadInput("a JSON object with the fields of one input should stand here", "file", number)
        found += 1
        yield row
    if not found:
        raise BadInput("no inputs in it", "file")


def _csv_rows(file: IO[bytes]) -> Iterator[Mapping[str, Any]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        columns = list(reader.fieldnames or ())
        for name in columns:
            if columns.count(name) > 1:
                raise BadInput(f"two columns are called {quoted(name)}", "file", 1)
        found = 0
        for row in reader:
            if None in row or None in row.values():
                raise BadInput("the row has more or fewer fields than the header", "file", reader.line_num)
            found += 1
            yield row
        if not found:
            raise BadInput("no inputs in it", "file")
    except UnicodeDecodeError:
        # It is decoded ahead of the rows that are yielded.
        raise BadInput(f"not UTF-8 text somewhere after line {reader.line_num}", "file") from None
    except csv.Error as error:
        raise BadInput(f"not CSV: {error}", "file", reader.reader.line_num) from None
    finally:
        text.detach()


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is not a JSON number")
